"""Stage ``trace``: a config becomes one graph of the whole model, with no weight anywhere."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moec.compiler.tracing.capture import capture
from moec.compiler.tracing.experts import ExpertsFacts, read_experts
from moec.compiler.tracing.interface import INTERFACE
from moec.compiler.tracing.model.buffers import rebuild_buffers
from moec.compiler.tracing.model.build import DTYPES, build_config, build_model, expert_modules
from moec.compiler.tracing.model.distances import add_distance_buckets
from moec.compiler.tracing.model.rope import fix_rotary_tables
from moec.compiler.tracing.model.text_half import placeholders
from moec.compiler.tracing.patches import patched
from moec.compiler.tracing.session import Session
from moec.errors import CheckpointError, CompileError, MoecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import fx

    from moec.artifacts.model import DType


@dataclass(frozen=True)
class TracedModel:
    """A model as a graph from ``tokens`` and ``positions`` ``[1, T]`` to logits ``[1, T, V]``.

    Behind an encoder there are a source's tokens and positions ``[1, S]`` too.
    """

    model_type: str
    class_name: str
    dtype: DType
    """Storage type of weights and cache; the graph computes in float32."""
    stored: dict[str, torch.dtype]
    """Storage type of each parameter: ``dtype``, or float32 where transformers keeps it so."""
    vocab_size: int
    hidden_size: int
    max_context: int
    """Tokens, prompt and continuation together."""
    graph: fx.GraphModule
    """Placeholders are ``names`` in order, then tokens and positions; see ``tracing.capture.Captured``."""
    names: tuple[str, ...]
    """Parameters and buffers of the transformers model; tied ones once."""
    symbol: str
    """T's name in the shapes of the graph."""
    source_symbol: str | None
    """S's name; ``None`` where there is no encoder."""
    constants: dict[str, torch.Tensor]
    """Values of the buffers that no checkpoint has, on the CPU."""
    experts: dict[str, ExpertsFacts]
    """Facts of each experts module by its path."""
    placeholders: dict[str, int]
    """Token ids that stand for what the language model alone does not read; see ``ModelRecord.placeholders``."""


def trace(config: dict[str, Any], *, dtype: DType, max_context: int) -> TracedModel:
    """Trace the language model that ``config`` describes, computing in float32.

    Args:
        config: the checkpoint's ``config.json``. How its weights are stored (``quantization_config``) is
            ignored.
        dtype: element type to compile to, ``bfloat16``, ``float16`` or ``float32``. Parameters that
            transformers keeps in float32 stay so.
        max_context: tokens; rotary tables that depend on the length are settled for it.

    Raises:
        UnsupportedModelError: the model is no Mixture of Experts, or needs what no kernel has.
        CheckpointError: the config contradicts itself.
        CompileError: transformers' own code failed while it was traced.
    """
    settings = build_config(config)
    model = build_model(settings, DTYPES[dtype])
    facts = {path: read_experts(path, module) for path, module in expert_modules(model).items()}
    stored = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    model.float()
    constants = rebuild_buffers(model)
    constants |= fix_rotary_tables(model, max_context) | add_distance_buckets(model)
    session = Session(model, max_context)
    try:
        with session.interfaces(), patched(type(model).__module__), _quiet_fakes():
            model.set_attn_implementation(INTERFACE)
            model.set_experts_implementation(INTERFACE)
            captured = capture(model, session)
    except MoecError:
        raise
    except Exception as error:
        raise _explained(error, session.class_name, settings, facts) from error
    text = settings.get_text_config()
    return TracedModel(
        model_type=settings.model_type,
        class_name=session.class_name,
        dtype=dtype,
        stored=stored,
        vocab_size=int(text.vocab_size),
        hidden_size=int(text.hidden_size),
        max_context=max_context,
        graph=captured.graph,
        names=captured.names,
        symbol=captured.symbol,
        source_symbol=captured.source_symbol,
        constants=constants,
        experts=facts,
        placeholders=placeholders(settings),
    )


@contextmanager
def _quiet_fakes() -> Iterator[None]:
    """Torch logs the traceback of an operator that fails on shapes alone, and raises it as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _explained(
    error: Exception, class_name: str, settings: Any, facts: Mapping[str, ExpertsFacts]
) -> MoecError:
    """What an error of transformers' code means."""
    chosen = getattr(settings.get_text_config(), "num_experts_per_tok", None)
    experts = max(fact.experts for fact in facts.values())
    if isinstance(chosen, int) and chosen > experts:
        return CheckpointError(
            f"The config has every token choose {chosen} of {experts} experts.",
            "num_experts_per_tok cannot be more than there are.",
            "Check config.json against the model's page.",
        )
    return CompileError(
        f"{class_name} cannot be traced: {(str(error) or repr(error)).splitlines()[0][:200]}",
        "Its code does something that depends on values, or that moec's interfaces do not offer.",
        "See `moec models` for the types that compile.",
    )
