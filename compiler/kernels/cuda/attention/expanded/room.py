"""Attention of heads that latents stand for: what lies where in its workspace.

First comes what the kernels that attend to latents themselves use. Then, for T tokens of a step, the plan that says
which of them see expanded keys, and one region that is used twice: for a round of expanded keys and values, and for
queries and results in terms of latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.compiler.kernels.emit import ALIGNMENT_BYTES, STORAGE, i64

if TYPE_CHECKING:
    from moec.artifacts.model import AttentionSpec, LatentHeads
    from moec.compiler.kernels.emit import Buffer, Expr

ALIGNMENT = 256
"""Parts begin at multiples of so many bytes."""
ROWS = 128
"""Query rows of a block, and what the room for expanded keys is a multiple of."""
FIXED_BYTES = 32 << 20
"""Of expanded keys there is room for so many bytes, whatever the step."""
FIXED_ROWS = 4096
"""Or for so many positions, if that is less."""
MOST_RUNS = 256
"""Of tokens of one sequence that can see expanded keys; also the threads that plan."""
RUN_WORDS = 8
HEAD_WORDS = 8


@dataclass(frozen=True)
class Room:
    """Sizes of the workspace of one attention."""

    spec: AttentionSpec
    heads: LatentHeads
    own_bytes: int
    """What kernels that attend to latents need."""
    rounds: bool
    """Whether those of many tokens round results themselves."""

    @property
    def rope_dim(self) -> int:
        """Entries of a key that all heads share."""
        return self.spec.key_dim - self.spec.value_dim

    @property
    def position_bytes(self) -> int:
        """One position's latent, shared part, keys and values, 16 bits each."""
        heads = self.heads
        return 2 * (self.spec.key_dim + self.spec.query_heads * (heads.nope_dim + heads.value_dim))

    @property
    def latent_bytes(self) -> int:
        """A token's queries and results in terms of latents, float32."""
        return 4 * self.spec.query_heads * (self.spec.key_dim + self.spec.value_dim)

    @property
    def state_bytes(self) -> int:
        """A token's maximum and total for each head, from round to round, and whether it sees expanded keys."""
        return 8 * self.spec.query_heads + 4

    @property
    def fixed_rows(self) -> int:
        """Positions that there is room for in any step."""
        return max(ROWS, min(FIXED_ROWS, FIXED_BYTES // self.position_bytes) // ROWS * ROWS)

    @property
    def fixed_bytes(self) -> int:
        """The workspace without what depends on the tokens of a step."""
        if self.spec.selected:  # nothing is expanded
            return self.own_bytes + 4 * ALIGNMENT
        plan_bytes = 4 * (HEAD_WORDS + RUN_WORDS * MOST_RUNS)
        return self.own_bytes + plan_bytes + self.fixed_rows * self.position_bytes + 12 * ALIGNMENT

    @property
    def token_bytes(self) -> int:
        """The workspace for each token of a step."""
        return self.state_bytes + self.latent_bytes

    def rows(self, tokens: Expr) -> Expr:
        """Positions that there is room for in a step of ``tokens``, int64, a multiple of `ROWS`."""
        more = tokens * i64(self.latent_bytes // self.position_bytes)
        return T.bind(i64(self.fixed_rows) + tirx.truncdiv(more, i64(ROWS)) * i64(ROWS))


class Carver:
    """Emits, on the host, the addresses of parts that lie one after the other."""

    def __init__(self, workspace: Buffer, start: int | Expr) -> None:
        self.workspace = workspace
        self.place = _aligned(i64(start))

    def part(self, elements: int | Expr, dtype: str) -> Buffer:
        """The next part."""
        size = T.bind(i64(elements))
        pointer = T.bind(T.address_of(tirx.BufferLoad(self.workspace, [self.place])))
        self.place = _aligned(self.place + size * i64(2 if dtype in ("float16", "bfloat16") else 4))
        return T.decl_buffer((size,), STORAGE.get(dtype, dtype), data=pointer, align=ALIGNMENT_BYTES)


def _aligned(place: Expr) -> Expr:
    return T.bind(tirx.truncdiv(place + i64(ALIGNMENT - 1), i64(ALIGNMENT)) * i64(ALIGNMENT))


@dataclass(frozen=True)
class Expanded:
    """Which tokens see expanded keys, and one round of those keys."""

    room: Room
    capacity: Expr
    """Positions of a round, int64."""
    head: Buffer
    """int32: runs, tiles of query rows, rows of keys, all of chosen runs; tokens that are in none."""
    runs: Buffer
    """int32 ``[runs, RUN_WORDS]``, see `plan`."""
    chosen: Buffer
    """int32 ``[T]``, not 0 for tokens that see expanded keys."""
    state: Buffer
    """float32 ``[T, Hq, 2]``: maximum and total."""
    latents: Buffer
    """``[capacity, rank]`` of the weights' type."""
    shared: Buffer
    """``[capacity, rope]`` of the cache's type."""
    keys: Buffer
    """``[Hq, capacity, nope]`` of the cache's type."""
    values: Buffer
    """``[Hq, capacity, value_dim]`` of the cache's type."""


@dataclass(frozen=True)
class Absorbed:
    """Queries and results in terms of latents."""

    queries: Buffer
    """float32 ``[T, Hq, key_dim]``."""
    results: Buffer
    """float32 ``[T, Hq, rank]``."""
    rounded_queries: Buffer
    """``[T, Hq, nope]`` of the weights' type, where results will be."""
    rounded_results: Buffer
    """``[T, Hq, rank]`` of the weights' type: where results would be, or where queries were."""


def carve(room: Room, workspace: Buffer, tokens: Expr) -> tuple[Expanded, Absorbed]:
    """Emit where everything is, on the host, for a step of ``tokens``."""
    spec, heads = room.spec, room.heads
    first = Carver(workspace, room.own_bytes)
    head = first.part(HEAD_WORDS, "int32")
    runs = first.part(RUN_WORDS * MOST_RUNS, "int32")
    chosen = first.part(tokens, "int32")
    state = first.part(tokens * i64(2 * spec.query_heads), "float32")
    rows = room.rows(tokens)
    keys = Carver(workspace, first.place)
    expanded = Expanded(
        room,
        rows,
        head,
        runs,
        chosen,
        state,
        keys.part(rows * i64(spec.value_dim), heads.dtype),
        keys.part(rows * i64(room.rope_dim), spec.dtype),
        keys.part(rows * i64(spec.query_heads * heads.nope_dim), spec.dtype),
        keys.part(rows * i64(spec.query_heads * heads.value_dim), spec.dtype),
    )
    return expanded, _absorbed(room, workspace, first.place, tokens)


def carve_absorbed(room: Room, workspace: Buffer, tokens: Expr) -> Absorbed:
    """The same for a step in which all tokens attend to latents."""
    return _absorbed(room, workspace, room.own_bytes, tokens)


def _absorbed(room: Room, workspace: Buffer, start: int | Expr, tokens: Expr) -> Absorbed:
    spec, heads = room.spec, room.heads
    rows = T.bind(tokens * i64(spec.query_heads))
    latents = Carver(workspace, start)
    queries = latents.part(rows * i64(spec.key_dim), "float32")
    second = latents.place
    results = latents.part(rows * i64(spec.value_dim), "float32")
    rounded_queries = Carver(workspace, second).part(rows * i64(heads.nope_dim), heads.dtype)
    place = second if room.rounds else start
    rounded_results = Carver(workspace, place).part(rows * i64(spec.value_dim), heads.dtype)
    return Absorbed(queries, results, rounded_queries, rounded_results)
