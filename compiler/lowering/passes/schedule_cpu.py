"""Loop nests that TVM generates get a CPU schedule: producers inlined, sums in vector lanes, rows across threads.

Before (RMSNorm after fusion, shortened)::

    for t, k in T.grid(T, 2048): sum[t] = sum[t] + x[t, k]
    for t in range(T):           scale[t] = rsqrt(sum[t] / 2048 + eps)
    for t, k in T.grid(T, 2048): y[t, k] = x[t, k] * scale[t] * weight[k]

After::

    if T * 2048 >= PARALLEL_ELEMENTS:
        for t in T.parallel(T): ...the same rows, shared between the threads
    else:
        for t in range(T):
            for k, lane in T.grid(128, T.vectorized(16)): partial[t, lane] += x[t, k * 16 + lane]
        for t, lane in T.grid(T, 16): sum[t] += partial[t, lane]
        for t, k in T.grid(T, 2048): y[t, k] = x[t, k] * rsqrt(sum[t] / 2048 + eps) * weight[k]

A decoding step has few rows: waking threads for them costs more than the rows themselves, so both forms are kept
and the step chooses. Element-wise inner loops are left to LLVM, which vectorizes them.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, sym, tirx

PARALLEL_ELEMENTS = 1 << 16
"""Elements of a step's largest loop nest from which threads are worth waking."""


@tvm.transform.module_pass(opt_level=0, name="ScheduleCpu")
class ScheduleCpu:
    """Schedule every function that TVM generated; hand-written kernels are left as they are.

    Args:
        lanes: float32 values in a vector register of the target.
    """

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes

    def transform_module(self, module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        """Schedule the PrimFuncs of ``module`` that are made of blocks."""
        scheduled = module.clone()
        for name, function in module.functions_items():
            if isinstance(function, tirx.PrimFunc) and _is_made_of_blocks(function):
                scheduled.update_func(name, schedule_function(function, self.lanes))
        return s_tir.transform.ConvertSSA()(scheduled)


def _is_made_of_blocks(function: tirx.PrimFunc) -> bool:
    """Whether it is loop nests under TVM's ``root`` block; hand-written and external kernels are not."""
    return isinstance(function.body, s_tir.SBlockRealize) and function.body.block.name_hint == "root"


def schedule_function(function: tirx.PrimFunc, lanes: int) -> tirx.PrimFunc:
    """One function in its serial form, or in both forms with a test between them."""
    serial, elements = _schedule(function, lanes, parallel=False)
    if isinstance(elements, int) and elements < PARALLEL_ELEMENTS:
        return serial
    shared, elements = _schedule(function, lanes, parallel=True)
    return _either(elements, shared, serial)


def _schedule(function: tirx.PrimFunc, lanes: int, *, parallel: bool) -> tuple[tirx.PrimFunc, Any]:
    schedule = s_tir.Schedule(function)
    root = schedule.get_sblock("root")
    _inline_producers(schedule, root)
    nests = [nest for block in schedule.get_child_blocks(root) for nest in _nests(schedule, block, lanes)]
    largest: Any = 0
    for block, inner in nests:
        largest = _larger(largest, _nest_elements(schedule, block))
        if parallel:
            _share_rows(schedule, block, inner)
    return schedule.mod["main"], largest


def _nests(schedule: Any, block: Any, lanes: int) -> list[tuple[Any, int]]:
    """The block's loop nests after splitting its sum, each with the number of loops that stay within a thread."""
    axes = _reductions(schedule, block)
    loops = schedule.get_loops(block)
    extent = schedule.get(loops[-1]).extent if loops else None
    if (
        len(axes) == 1
        and isinstance(extent, tirx.IntImm)
        and int(extent) % lanes == 0
        and int(extent) >= 4 * lanes
    ):
        try:
            return _sum_in_lanes(schedule, block, loops, lanes)
        except s_tir.ScheduleError:
            pass  # not a sum that can be reordered
    return [(block, max(len(axes), 1))]


def _sum_in_lanes(schedule: Any, block: Any, loops: list[Any], lanes: int) -> list[tuple[Any, int]]:
    """Sum ``lanes`` interleaved parts of a row side by side: LLVM may not reorder a float sum by itself."""
    _, lane = schedule.split(loops[-1], [None, lanes])
    partial = schedule.rfactor(lane, len(loops) - 1)
    schedule.vectorize(schedule.get_loops(partial)[-1])
    return [(partial, 2), (block, 1)]


def _inline_producers(schedule: Any, root: Any) -> None:
    """Inline each element-wise block that has one consumer; what several consumers read is worth keeping."""
    for block in schedule.get_child_blocks(root):
        consumers = schedule.get_consumers(block)
        if len(consumers) != 1 or _reductions(schedule, block):
            continue
        try:
            schedule.compute_inline(block)
        except s_tir.ScheduleError:
            continue


def _reductions(schedule: Any, block: Any) -> list[Any]:
    return [axis for axis in schedule.get(block).iter_vars if axis.iter_type == tirx.IterVar.CommReduce]


def _nest_elements(schedule: Any, block: Any) -> Any:
    """Iterations of the block: an int, or an expression of T."""
    elements: Any = 1
    for loop in schedule.get_loops(block):
        elements = elements * schedule.get(loop).extent
    elements = sym.Analyzer().simplify(elements) if not isinstance(elements, int) else elements
    return int(elements) if isinstance(elements, tirx.IntImm) else elements


def _larger(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        return max(left, right)
    if isinstance(left, int):
        return right
    return left if isinstance(right, int) else tirx.Max(left, right)


def _share_rows(schedule: Any, block: Any, inner: int) -> None:
    """Spread all loops but the ``inner`` ones over the threads."""
    loops = schedule.get_loops(block)
    outer = loops[: len(loops) - inner] or loops[:1]
    if outer and not (len(outer) == len(loops) and _reductions(schedule, block)):
        schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])


def _either(elements: Any, shared: tirx.PrimFunc, serial: tirx.PrimFunc) -> tirx.PrimFunc:
    """``shared`` where a step has enough elements, else ``serial``; both take the same parameters."""
    if isinstance(elements, int):
        return shared
    enough = elements >= tirx.IntImm("int64", PARALLEL_ELEMENTS)
    roots = shared.body.block, serial.body.block
    body = tirx.IfThenElse(enough, *(root.body for root in roots))
    # Both forms use the same temporary buffers: each is allocated once, around them.
    buffers = list(dict.fromkeys(buffer for root in roots for buffer in root.alloc_buffers))
    root = s_tir.SBlock([], [], [], "root", body, alloc_buffers=buffers)
    return shared.with_body(s_tir.SBlockRealize([], True, root))
