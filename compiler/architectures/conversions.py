"""Experts that a checkpoint has one tensor each: the conversion that stacks them."""

from __future__ import annotations

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter


def stacked_experts(prefix: str, target: str, gate: str, up: str, down: str) -> tuple[WeightConverter, ...]:
    """The conversions for tensors ``<prefix>.<expert>.<matrix>.weight``; in patterns, ``*.`` is transformers' wildcard.

    Args:
        prefix: regular expression, e.g. ``r"\\.experts"``.
        target: where the stacked matrices are, e.g. ``".experts"``.
        gate: name of the matrix behind the activation function.
        up: name of the matrix that is multiplied with it.
        down: name of the matrix back to hidden size.
    """
    return (
        WeightConverter(
            [rf"{prefix}\.*.{gate}\.weight", rf"{prefix}\.*.{up}\.weight"],
            f"{target}.gate_up_proj",
            operations=[MergeModulelist(0), Concatenate(1)],
        ),
        WeightConverter(
            [rf"{prefix}\.*.{down}\.weight"], f"{target}.down_proj", operations=[MergeModulelist(0)]
        ),
    )
