"""The words of the ``state`` of one MoE layer, which the kernels of the expert cache share with the host.

``assign_experts(index [T, K] int64, state [W] int64, on_gpu [T, K] int64, on_cpu [T, K] int64)`` decides where each
chosen expert is read from, and who leaves; ``fetch_experts(state)`` brings what is missing, and meanwhile
``experts_cached_<body>(x, index, weight, table, state, workspace, out)`` computes, each expert as it arrives. See
``compiler/kernels/cuda/slots``.

E experts, S slots. All words are int64. The policies are those of ``moec.planning.policies``.
"""

from __future__ import annotations

from dataclasses import dataclass

ASSIGN = "assign_experts"
FETCH = "fetch_experts"
CACHED = "experts_cached_"
"""The functions' names in a CUDA target's module; the last one's goes on with the body's."""

MOST_ENTRIES = 256
"""Choices (T * K) of one call."""
MOST_CACHED_TOKENS = 8
"""Tokens that ``experts_cached_<body>`` takes; more need ``experts_<body>``, which begins when everything is there."""
MOST_EXPERTS = 1024
"""Of a layer, and so of slots."""
MOST_SHARED = 31
"""Misses up to which the CPU's share is told apart; what is true of so many is true of more."""
LEARN_TOKENS = 8
"""Where the policy counts no uses (see ``WORTH``), one of a layer's missing experts is fetched once in so many tokens,
whatever the CPU's share: what the CPU computes takes no slot, and an expert that is used again and again would stay
with the CPU for good."""
POLICY_CODES = {"lru": 0, "lfru": 1, "lrfu": 2, "lfu": 2, "static": 3}
"""Which score decides, by the policy's name; ``lrfu`` and ``lfu`` differ in their half-lives alone."""
PIECE_BYTES = 16 << 10
"""What is fetched and reported at a time."""

EXPERTS, SLOTS, STRIDE, POLICY = 0, 1, 2, 3
SLOT_ADDRESS, STAGE_ADDRESS, STAGE_PLACES = 4, 5, 6
"""Where the layer's slots begin; where missing experts go that get no slot, and how many of them find room there."""
CLOCK = 7
"""Tokens so far."""
FETCHES = 8
"""How many entries of the list of fetches are of this step."""
HITS, MISSES, CPU_MISSES, EVICTIONS = 9, 10, 11, 12
"""Counters: distinct experts of a step that had a slot, had none, had none and are the CPU's; experts that left."""
SECOND = 13
"""Bytes of an expert before those that only the second of its products reads; a multiple of 16."""
HALF_LIFE, ADMITS_BETTER = 14, 15
"""Of the policy: log2 of the tokens in which uses halve; whether a miss takes only slots of lesser keys than its."""
MOST_AHEAD = 4
"""Experts of a layer of which pieces are brought before its router has spoken; see ``moec.artifacts.words.ahead``."""
AHEAD_HOME, AHEAD_PIECES, AHEAD_FETCH = 16, 20, 24
"""``[MOST_AHEAD]`` each: where such an expert is in host memory; how many of its pieces are there, the first ones; and
its number among the step's fetches, -1 for none."""
AHEAD_PLACE = 28
"""Where these pieces lie, one after the other, ``PIECE_BYTES`` apart."""
AHEAD_CLOCK = 29
"""``CLOCK`` before the step that they were brought for; any other step has none."""
AHEAD_BYTES = 30
"""Counter: bytes that fetches took from there."""
NOTES = 31
"""Where the GPU keeps its notes of orders, 0: it makes none; see ``moec.artifacts.words.orders``."""
SHARE = 32
"""``[MOST_SHARED + 1]``: of so many misses, how many are the CPU's."""
WORTH = 64
"""Where the CPU would compute all missing experts of a step, the first one is fetched if its key is greater by so much
than the least key of a slot, or a slot is free; -1: once in ``LEARN_TOKENS``."""
SOURCE = 72
"""``[MOST_ENTRIES]``: addresses to fetch from, in the order of the misses' first choices."""
TARGET = SOURCE + MOST_ENTRIES
"""``[MOST_ENTRIES]``: addresses to fetch to."""
ARRIVED = TARGET + MOST_ENTRIES
"""``[MOST_ENTRIES]``, two int32 each: pieces that have been fetched before and from ``SECOND`` on."""
ORDER = ARRIVED + MOST_ENTRIES
"""``[MOST_ENTRIES]``: the choices, those whose experts are there first, then by fetch."""
POSITION = ORDER + MOST_ENTRIES
"""``[MOST_ENTRIES]``: each choice's place in this order."""
TABLE = POSITION + MOST_ENTRIES
"""``[E]``: where each expert that the step chose is to be read. Of others that have no slot it says nothing."""

_ALIGNMENT = 8
PARTS = ("home", "slot", "uses", "last", "prior", "fetch", "owner")
"""The arrays after ``TABLE``, in their order."""


@dataclass(frozen=True)
class StateWords:
    """Where the parts begin that come after ``TABLE``, for a layer of E experts."""

    home: int
    """``[E]``: addresses in host memory."""
    slot: int
    """``[E]``: each expert's slot, -1 for none."""
    uses: int
    """``[E]``: as in ``moec.planning.policies.PolicyState``."""
    last: int
    """``[E]``: ``CLOCK`` after the last step that chose the expert."""
    prior: int
    """``[E]``: as in ``moec.planning.policies.PolicyState``."""
    fetch: int
    """``[E]``: of an expert that the step chose, its number among the fetches, -1 for none."""
    owner: int
    """``[S]``: the expert in each slot, -1 for none."""
    size: int
    """Of everything."""


def state_words(experts: int, slots: int) -> StateWords:
    """The parts of a state, each at a multiple of 64 bytes."""
    each = -(-experts // _ALIGNMENT) * _ALIGNMENT
    places = {name: TABLE + number * each for number, name in enumerate(PARTS, 1)}
    return StateWords(**places, size=places["owner"] + -(-slots // _ALIGNMENT) * _ALIGNMENT)


def pieces(size_bytes: int) -> int:
    """How many pieces ``size_bytes`` are fetched in."""
    return -(-size_bytes // PIECE_BYTES)


def expert_pieces(stride_bytes: int, second_bytes: int) -> int:
    """How many pieces an expert is fetched in: first those of ``SECOND`` bytes, then those of the rest."""
    return pieces(second_bytes) + pieces(stride_bytes - second_bytes)
