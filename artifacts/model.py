"""``model.json``: the chain of steps that turns tokens into logits, what each step computes, and every shape in it.

The chain is target independent: each target's module has one function for each name that a step mentions.
Dimension names: T tokens of a step (of all sequences together), E experts, H hidden size, I width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from moec.artifacts.activation import Expression
from moec.artifacts.ids import LayerId, ValueId
from moec.artifacts.states import StateSpec
from moec.artifacts.steps import Step
from moec.formats import format_of, row_bytes

DType: TypeAlias = Literal["bfloat16", "float16", "float32", "int64", "int32", "uint8", "bool"]

DTYPE_BYTES: dict[str, int] = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True)
class TensorSpec:
    """Element type and shape of a tensor; the string ``"T"`` stands for the tokens of a step."""

    dtype: DType
    shape: tuple[int | Literal["T"], ...]
    format: str | None = None
    """Of a quantized weight ``[N, K]``: a name in ``moec.formats.FORMATS``; what it stands for is of ``dtype``."""

    @property
    def stored(self) -> TensorSpec:
        """What lies in memory: itself, or where it is quantized the bytes of its rows, ``[N, row_bytes]``."""
        kind = format_of(self.format)
        if kind is None:
            return self
        rows, columns = self.shape
        return TensorSpec("uint8", (rows, row_bytes(kind, int(columns))))


@dataclass(frozen=True)
class FunctionSpec:
    """A dense segment's function: ``name(inputs..., weights...) -> outputs`` in every target's module."""

    name: str
    inputs: tuple[TensorSpec, ...]
    weights: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class LatentHeads:
    """The heads that one latent stands for (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    A cached key is ``[c, r]``: a latent c of the attention's ``value_dim`` entries and a rotated part r, which all
    heads share. Head h has the key ``[A_h c, r]`` and the value ``B_h c``; a step's query is ``[q_nope, q_rope]``.
    ``q_nope . (A_h c)`` is ``(A_h^T q_nope) . c``, and a sum of values is ``B_h (sum p c)``: a kernel may attend to
    latents themselves.
    """

    nope_dim: int
    """Entries of ``A_h c``."""
    value_dim: int
    """Entries of ``B_h c``, and of a head's result."""
    dtype: DType
    """Of A and B."""


@dataclass(frozen=True)
class AttentionSpec:
    """One distinct attention: kernel ``attention_<name>`` in every module.

    A token at position p sees positions ``max(0, p - window + 1) .. p`` (``window`` 0: all of them), and with
    ``chunk`` only those of its own chunk. Scores are ``softcap * tanh(scaling * q.k / softcap)`` where
    softcap is not 0. ``sinks`` adds one learned logit a head to the softmax's denominator. Where not ``causal``, a
    token sees all positions of its source: of its own sequence in an encoder, of the encoder's where ``cross``.
    """

    name: str
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scaling: float
    window: int
    chunk: int
    softcap: float
    sinks: bool
    latent: bool
    """The value is the first ``value_dim`` entries of the key (DeepSeek's MLA); no value cache exists."""
    dtype: DType
    """Of the cached keys and values; queries, results and sinks are float32."""
    heads: LatentHeads | None
    """What queries and results are of, where that is not the latent itself; only where ``latent``."""
    causal: bool = True
    cross: bool = False
    """Keys and values are the source's: an ``append`` step of the encoder wrote them. Never causal."""
    bias_reach: int = 0
    """A score has ``table[head, clamp(key's position - query's, -reach, reach) + reach]`` added to it; 0: none.

    T5's buckets of distances (arXiv 1910.10683, section 2.1), written out for every distance that has its own."""
    selected: bool = False
    """Of these positions a token sees only those that a `SelectionStep` has selected for it."""

    @property
    def query_dim(self) -> int:
        """Entries of a query head as the step has it."""
        return self.key_dim if self.heads is None else self.heads.nope_dim + self.key_dim - self.value_dim

    @property
    def result_dim(self) -> int:
        """Entries of a head's result."""
        return self.value_dim if self.heads is None else self.heads.value_dim

    @property
    def expanded(self) -> AttentionSpec:
        """The attention of the heads that latents stand for, each with keys and values of its own."""
        return replace(
            self,
            kv_heads=self.query_heads,
            key_dim=self.query_dim,
            value_dim=self.result_dim,
            latent=False,
            heads=None,
        )


@dataclass(frozen=True)
class SelectionSpec:
    """One distinct selection of positions (lightning indexer, arXiv 2512.02556): kernel ``selection_<name>``.

    A position s scores ``sum_h weight[h] * max(0, scaling * query[h] . key[s])`` for a token at position p, and the
    ``top_k`` best of ``0 .. p`` are selected, of equal ones the earlier.
    """

    name: str
    heads: int
    dim: int
    """Entries of a query head, and of the one key that all heads share."""
    scaling: float
    top_k: int
    dtype: DType
    """Of the cached keys; queries and weights are float32."""


@dataclass(frozen=True)
class ExpertBody:
    """One distinct expert: ``down(activation(gate_up(x)))``, kernel ``experts_<name>`` in every module.

    In the bundle an expert's parts lie in canonical order whatever the checkpoint's was: ``gate [I, H]``,
    ``up [I, H]``, ``gate_bias [I]``, ``up_bias [I]``, ``down [H, I]``, ``down_bias [H]`` (those that exist;
    see ``artifacts.layout.experts``).
    """

    name: str
    hidden: int
    intermediate: int
    gated: bool
    up_bias: bool
    down_bias: bool
    activation: Expression
    dtype: DType
    """Of its biases, and of its matrices where they are not quantized; its input and result are float32."""
    format: str | None = None
    """Of its matrices: a name in ``moec.formats.FORMATS``, or None where they are plain."""


@dataclass(frozen=True)
class ExpertsLayer:
    """The routed experts of one MoE layer, in ``weights/experts-<layer>.bin``."""

    layer: LayerId
    module: str
    """The module's path in transformers, e.g. ``model.layers.3.mlp.experts``."""
    body: str
    experts: int
    top_k: int
    capacity: int = 0
    """Tokens of one call that an expert takes (see ``CapacityStep``); 0: any number, or see ``capacity_share``."""
    capacity_share: float = 0.0
    """Of the tokens of one call an expert takes this share, rounded up; 0: see ``capacity``."""


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint's ``generation_config.json`` says, in transformers' terms."""

    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None
    do_sample: bool
    temperature: float
    top_k: int
    """0: off."""
    top_p: float
    repetition_penalty: float
    decoder_start_token_id: int | None = None
    """Begins what a decoder behind an encoder writes."""
    forced_bos_token_id: int | None = None
    """The first token after that, whatever the logits say."""
    forced_eos_token_id: int | None = None
    """The last token of the longest text that was asked for, whatever the logits say."""


@dataclass(frozen=True)
class ModelRecord:
    """The whole of ``model.json``.

    Inputs of the chain are the values ``tokens`` ``[1, T]`` int64 and ``positions`` ``[1, T]`` int64; its
    result is ``logits`` ``[1, T, V]``. Steps from ``last_step`` on are row-wise and only needed for the rows
    whose logits are wanted.

    An encoder-decoder model has a second chain, ``encoder``, on the same inputs. It runs once for each sequence, on the
    whole source, and ends in ``append`` steps, whose keys and values ``steps`` attends to.
    """

    model_type: str
    class_name: str
    dtype: DType
    """Storage type of weight matrices and of the cache; values and arithmetic are float32."""
    vocab_size: int
    hidden_size: int
    max_context: int
    """Tokens, prompt and continuation together."""
    values: dict[ValueId, TensorSpec]
    """What flows between steps; float32 but for token ids, positions and chosen experts."""
    functions: tuple[FunctionSpec, ...]
    attentions: tuple[AttentionSpec, ...]
    states: tuple[StateSpec, ...]
    bodies: tuple[ExpertBody, ...]
    experts: tuple[ExpertsLayer, ...]
    steps: tuple[Step, ...]
    last_step: int
    generation: GenerationDefaults
    encoder: tuple[Step, ...] = ()
    selections: tuple[SelectionSpec, ...] = ()
    """The distinct selections of positions."""
    placeholders: dict[str, int] = field(default_factory=dict)
    """Of a language model out of one that sees or hears: what else it would read (``image``, ``video``, ``audio``), and
    the token id that stands for it, which prompts may not have."""

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """Both chains, the decoder's first: where steps are told by number, the encoder's count on."""
        return (*self.steps, *self.encoder)
