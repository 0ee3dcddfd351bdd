"""Stage ``partition``: canonicalise, check, fold, stage, build."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from moec.artifacts.model import DType, GenerationDefaults, ModelRecord
from moec.artifacts.packing import DenseTensor, PackingRecord
from moec.compiler.partition.attentions import attention_spec, cache_numbers
from moec.compiler.partition.canonical import canonicalise, weight_only
from moec.compiler.partition.chain import Chain, ChainInputs
from moec.compiler.partition.folding import fold
from moec.compiler.partition.nodes import DTYPE_NAMES, marker_arguments
from moec.compiler.partition.records import PartitionedModel
from moec.compiler.partition.rowwise import check_rowwise
from moec.compiler.partition.segments import Functions
from moec.compiler.partition.stages import assign_encoder_stages, assign_stages, source_nodes
from moec.compiler.partition.token_axes import separate_tokens
from moec.compiler.tracing.markers import ATTENTION

if TYPE_CHECKING:
    import torch

    from moec.artifacts.steps import Step
    from moec.compiler.partition.chain import LaidOut
    from moec.compiler.trace import TracedModel

CONSTANT = "constant:"

CACHE_DTYPES: dict[DType, DType] = {"bfloat16": "float16", "float16": "float16", "float32": "float32"}
"""Of cached keys and values, by the storage type of the weights: of two 16-bit types the one with the longer
mantissa, since they are small numbers (normed, or products of normed ones) and lose accuracy, not range."""


def partition(traced: TracedModel, *, generation: GenerationDefaults, config_sha256: str) -> PartitionedModel:
    """Cut ``traced`` into a chain of steps over distinct segments.

    Args:
        traced: left as it is.
        generation: goes into the record as it is.
        config_sha256: of the checkpoint's config, so that no other model's weights are packed for this chain.

    Raises:
        UnsupportedModelError: an operation mixes the tokens of a step, which may be of different sequences.
        CompileError: the graph does not fall into segments.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.graph.graph, {}))
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = dict(zip(placeholders, traced.names, strict=False))
    inputs = _inputs(placeholders[len(names) :], traced)

    def source_name(node: fx.Node) -> str:
        name = names.get(node, str(node.target))
        return f"{CONSTANT}{name}" if node not in names or name in traced.constants else name

    def stored(node: fx.Node) -> torch.dtype | None:
        return traced.stored.get(names.get(node, ""))

    for each in inputs:
        separate_tokens(graph, each.tokens)
    canonicalise(graph, names.__contains__)
    check_rowwise(graph, [each.symbol for each in inputs], traced.class_name)
    dense, loose = fold(graph, names.__contains__, source_name, stored)
    passive = loose | weight_only(graph, names.__contains__)
    attentions = [node for node in graph.nodes if str(node.target) == ATTENTION]
    dtype = CACHE_DTYPES[traced.dtype]
    caches = cache_numbers(attentions, lambda node: attention_spec(node, dtype))
    chain = Chain(dtype, dense, loose, traced.experts, caches, Functions.empty())
    crossing = [node for node in attentions if marker_arguments(node)["cross"]]
    encoder: tuple[Step, ...] = ()
    if len(inputs) > 1:
        encoder = chain.build(assign_encoder_stages(graph, passive, crossing), inputs[1], None).steps
        passive |= source_nodes(graph, passive, crossing)
    (logits,) = next(reversed(graph.nodes)).all_input_nodes
    decoder = chain.build(assign_stages(graph, passive), inputs[0], logits)
    packing = _packing(chain, traced, config_sha256)
    lifted = {
        node.target: getattr(traced.graph, str(node.target)) for node in graph.nodes if node.op == "get_attr"
    }
    available = {**traced.constants, **lifted}
    used = {
        source.removeprefix(CONSTANT)
        for item in packing.dense
        for source in item.sources
        if _is_constant(source)
    }
    return PartitionedModel(
        model=_model(chain, traced, generation, decoder, encoder),
        functions=chain.functions.graphs,
        packing=packing,
        constants={name: available[name] for name in sorted(used)},
    )


def _inputs(placeholders: list[fx.Node], traced: TracedModel) -> list[ChainInputs]:
    """What the decoder's chain begins with, and the encoder's where there is one."""
    symbols = [traced.symbol] if traced.source_symbol is None else [traced.symbol, traced.source_symbol]
    return [
        ChainInputs(tokens, positions, symbol)
        for tokens, positions, symbol in zip(placeholders[::2], placeholders[1::2], symbols, strict=True)
    ]


def _model(
    chain: Chain,
    traced: TracedModel,
    generation: GenerationDefaults,
    decoder: LaidOut,
    encoder: tuple[Step, ...],
) -> ModelRecord:
    return ModelRecord(
        model_type=traced.model_type,
        class_name=traced.class_name,
        dtype=traced.dtype,
        vocab_size=traced.vocab_size,
        hidden_size=traced.hidden_size,
        max_context=traced.max_context,
        values=chain.values,
        functions=tuple(chain.functions.specs.values()),
        attentions=tuple(chain.attentions.values()),
        states=tuple(chain.states.values()),
        bodies=tuple(chain.bodies.values()),
        experts=tuple(chain.experts),
        steps=decoder.steps,
        last_step=decoder.last_step,
        generation=generation,
        encoder=encoder,
        selections=tuple(chain.selections.values()),
        placeholders=traced.placeholders,
    )


def _packing(chain: Chain, traced: TracedModel, config_sha256: str) -> PackingRecord:
    """A parameter has its storage type if anything is packed in it, and float32 otherwise."""
    dense: tuple[DenseTensor, ...] = tuple(chain.weights.values())
    dtypes: dict[str, DType] = {}
    for item in dense:
        for source in item.sources:
            if not _is_constant(source):
                narrow = item.dtype != "float32"
                dtypes[source] = (
                    DTYPE_NAMES[traced.stored[source]] if narrow else dtypes.get(source, "float32")
                )
    for experts in chain.sources:
        for name in (experts.up, experts.down, experts.up_bias, experts.down_bias):
            if name is not None:
                dtypes[name] = DTYPE_NAMES[traced.stored[name]]
    return PackingRecord(config_sha256, dtypes, dense, tuple(chain.sources))


def _is_constant(source: str) -> bool:
    return source.startswith(CONSTANT)
