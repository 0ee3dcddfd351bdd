"""Experts by the copy engine: the kernel in the emulator, the thread that fills its orders, a driver that copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.artifacts.schedule import Policy
from moec.artifacts.words import ahead, orders, slots
from moec.compiler.kernels.cpu.feed import feed
from moec.compiler.kernels.cuda.slots.assign import assign
from moec.compiler.kernels.cuda.slots.order import order
from moec.errors import DeviceError
from moec.runtime.tensors import aligned_empty
from tests.kernels.cuda.test_ahead import FIRST, PIECES, Ahead
from tests.kernels.cuda.test_slots import SECOND, STRIDE, Layer
from tests.support.cuda_emulator import Emulated
from tests.support.machine_code import machine_code
from tests.support.order_books import HostDriver, Orders
from tests.support.waiting import wait_until

SECOND_NS = 10**9


@cache
def kernels(head_pieces: int) -> Emulated:
    return Emulated(assign(), order(read_blocks=3, head_pieces=head_pieces, ahead_blocks=2))


@cache
def native() -> Callable[..., Any]:
    found: Callable[..., Any] = machine_code(feed(machine="x86_64"))[orders.FEED]
    return found


@pytest.fixture
def made() -> Iterator[Orders]:
    made = Orders(native())
    made.feeder.begin()
    yield made
    made.feeder.close()


def use(made: Orders, layer: Layer, chosen: list[int], head_pieces: int = 0) -> None:
    index = aligned_empty((1, len(chosen)), np.int64)
    index[...] = chosen
    places = aligned_empty(index.shape, np.int64), aligned_empty(index.shape, np.int64)
    kernels(head_pieces)(slots.ASSIGN, index, layer.state, *places)
    kernels(head_pieces)(orders.ORDER, layer.state, made.notes, made.words, made.copies)


def arrived(layer: Layer) -> NDArray[np.int32]:
    count = int(layer.state[slots.FETCHES])
    return layer.state[slots.ARRIVED : slots.ARRIVED + count].view(np.int32).reshape(-1, 2)


def layer_of(count: int = 0, stage_places: int = 3) -> Layer:
    return Layer(9, count, Policy("lru", 0, 0, "always"), stage_places=stage_places)


@pytest.mark.parametrize("head_pieces", [0, 1, 64])
def test_every_expert_is_brought_whole(made: Orders, head_pieces: int) -> None:
    layer, sent = layer_of(5), 0
    for chosen in ([0, 5, 6], [1, 5], [2], [0, 1, 2, 7, 8], [0, 3]):
        misses = int((layer.part("slot", 9)[chosen] < 0).sum())
        use(made, layer, chosen, head_pieces)
        for expert in chosen:
            address = int(layer.part("table", 9)[expert])
            assert layer.bytes_at(address) == layer.host[expert].tobytes()
        assert arrived(layer).tolist() == [[FIRST, PIECES - FIRST]] * misses
        sent += misses > 0
        assert made.words[orders.POSTED] == made.notes[orders.SENT] == sent
    made.feeder.check()
    heads = sent * min(head_pieces * slots.PIECE_BYTES, SECOND)
    assert sum(made.driver.sizes) == int(layer.state[slots.MISSES]) * STRIDE - heads
    assert made.notes[orders.COPIED] == made.notes[orders.ORDERED] == layer.state[slots.MISSES] + sent
    assert made.notes[orders.FED_BYTES] == sum(made.driver.sizes)
    assert made.notes[orders.LATE] == 0


def test_the_last_expert_comes_in_two_parts(made: Orders) -> None:
    use(made, layer_of(3), [3, 4, 5])
    assert made.driver.sizes == [STRIDE, STRIDE, SECOND, STRIDE - SECOND]


def test_what_has_no_slot_is_copied_to_the_stage(made: Orders) -> None:
    layer = layer_of(1)
    use(made, layer, [3, 4, 5])
    assert layer.state[slots.FETCHES] == 3
    for expert in (3, 4, 5):
        assert layer.bytes_at(int(layer.part("table", 9)[expert])) == layer.host[expert].tobytes()
    assert arrived(layer).tolist() == [[FIRST, PIECES - FIRST]] * 3
    assert made.driver.sizes == [STRIDE, STRIDE, SECOND, STRIDE - SECOND]


def test_copies_are_counted_beyond_32_bits(made: Orders) -> None:
    layer, many = layer_of(3), (1 << 32) - 2
    made.feeder._answers[orders.MADE] = many
    made.notes[orders.ORDERED], made.notes[orders.COPIED] = many, many
    use(made, layer, [3, 4])
    assert arrived(layer).tolist() == [[FIRST, PIECES - FIRST]] * 2
    assert made.notes[orders.COPIED] == 1
    made.feeder.check()


@pytest.mark.parametrize("bound", [1, FIRST, FIRST + 1, PIECES, 2 * PIECES])
@pytest.mark.parametrize("head_pieces", [0, 1])
def test_what_was_brought_ahead_is_not_copied_again(made: Orders, bound: int, head_pieces: int) -> None:
    layer = layer_of(3)
    own = Ahead(layer, bound, 3)
    scores = np.zeros((1, 9), np.float32)
    scores[0, [4, 6, 3]] = 3, 2, 1
    own.guess(scores)
    use(made, layer, [3, 4, 7], head_pieces)
    for expert in (3, 4, 7):
        assert layer.bytes_at(int(layer.part("table", 9)[expert])) == layer.host[expert].tobytes()
    assert arrived(layer).tolist() == [[FIRST, PIECES - FIRST]] * 3
    taken, head = int(layer.state[slots.AHEAD_BYTES]), min(head_pieces * slots.PIECE_BYTES, SECOND)
    assert own.words[ahead.FETCHED] >= taken > 0
    assert sum(made.driver.sizes) == 3 * STRIDE - taken - head


@pytest.mark.parametrize("how", ["closed", "time"])
def test_copies_that_do_not_come_are_made_by_the_kernel(how: str) -> None:
    made, layer = Orders(native()), layer_of(3)
    made.feeder._finalizer()  # the thread has left
    if how == "time":
        made.words[orders.PATIENCE] = SECOND_NS // 20
    else:
        made.book.close()
    layer.state[slots.NOTES] = made.notes.ctypes.data
    for turn, chosen in enumerate(([3, 4], [5, 3], [6])):
        use(made, layer, chosen)
        for expert in chosen:
            address = int(layer.part("table", 9)[expert])
            assert layer.bytes_at(address) == layer.host[expert].tobytes()
        if turn == 0:
            assert arrived(layer).tolist() == [[FIRST, PIECES - FIRST]] * 2
            resident = layer.part("slot", 9).tolist()
        else:
            assert layer.state[slots.FETCHES] == 0, "a copy that is late may still be written there"
            assert layer.part("slot", 9).tolist() == resident
        assert made.words[orders.POSTED] == made.words[orders.CANCELLED] == made.notes[orders.LATE] == 1
    made.notes[orders.COPIED] = made.notes[orders.ORDERED]
    use(made, layer, [7])
    assert layer.part("slot", 9)[7] >= 0
    assert made.words[orders.POSTED] == 2


def test_a_cancelled_order_is_counted_and_not_copied() -> None:
    made = Orders(native())
    made.copies[0, : orders.SIZE + 1] = 8, 8, 64
    made.words[orders.COUNT], made.words[orders.CANCELLED], made.words[orders.POSTED] = 3, 1, 1
    made.feeder.begin()
    wait_until(lambda: made.feeder.made >= 3)
    made.feeder.close()
    assert made.driver.sizes == []
    assert made.notes[orders.COPIED] == 3


def test_a_copy_that_the_driver_refuses_is_an_error_and_the_gpu_goes_on() -> None:
    made, layer = Orders(native(), HostDriver(refuses=1)), layer_of(3)
    made.feeder.begin()
    use(made, layer, [3, 4])
    for expert in (3, 4):
        assert layer.bytes_at(int(layer.part("table", 9)[expert])) == layer.host[expert].tobytes()
    with pytest.raises(DeviceError, match="The driver answered 700"):
        made.feeder.check()
    made.feeder.close()
