"""The experts kernel: decode reads each chosen expert once, prefill multiplies on the matrix units."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels import reference
from benchmarks.kernels.cases import EXACT, ROUNDED, Case, judge
from benchmarks.random_weights.values import RowPool
from moec.artifacts.layout.experts import layout
from moec.artifacts.model import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.kernels.cases import Judgement
    from benchmarks.kernels.module import Module
    from moec.artifacts.model import ExpertBody

DECODE = ((1, 1), (1, 6), (1, 8), (2, 8), (8, 6))
"""(tokens, experts of each), all different: 1, 6, 8, 16 and 48 experts."""
POOL_BYTES = 5 << 30
"""Decode walks through so many bytes of experts before it comes back to the first."""
MOST_CALLS = 32
PREFILL = ((64, 512, 6), (64, 2048, 6), (24, 4096, 6))
"""Experts, tokens, experts of each token: 48, 192 and 1,024 rows an expert."""
PREFILL_AIM, MANY_ROWS = 0.5, 1024
"""Of torch's rate, from so many rows an expert on."""
DEVIATION = 0.02


class _Pool:
    """Experts in one block of device memory, and their table."""

    def __init__(self, body: ExpertBody, experts: int, device: torch.device) -> None:
        self.body, self.stride = body, layout(body).stride_bytes
        self.bytes = _random_bytes(body, experts, device)
        address = self.bytes.data_ptr()
        self.table = address + self.stride * torch.arange(experts, dtype=torch.int64, device=device)


def _random_bytes(body: ExpertBody, experts: int, device: torch.device) -> torch.Tensor:
    """``[experts, stride]``."""
    stride = layout(body).stride_bytes
    if body.format is not None:
        return _quantized_bytes(body, experts, device)
    values = experts * stride // DTYPE_BYTES[body.dtype]
    dtype = getattr(torch, body.dtype)
    normal = torch.empty(values, dtype=dtype, device=device).normal_(0, DEVIATION)
    return normal.view(torch.uint8).reshape(experts, stride)


def _quantized_bytes(body: ExpertBody, experts: int, device: torch.device) -> torch.Tensor:
    """Rows of each matrix from a pool, each expert's from another row on; biases are zero."""
    place = layout(body)
    memory = torch.zeros(experts, place.stride_bytes, dtype=torch.uint8, device=device)
    first = torch.arange(experts, device=device)[:, None]
    for part in place.parts:
        if len(part.shape) == 2:
            columns = body.intermediate if part.name == "down" else body.hidden
            pool = torch.from_numpy(RowPool(str(body.format), columns, DEVIATION).rows).to(device)
            number = (first + torch.arange(part.shape[0], device=device)) % len(pool)
            own = slice(part.offset_bytes, part.offset_bytes + part.size_bytes)
            memory[:, own] = pool[number].reshape(experts, -1)
    return memory


def expert_cases(
    module: Module, pool_bytes: int = POOL_BYTES, prefill: tuple[tuple[int, int, int], ...] = PREFILL
) -> Iterator[Callable[[], Case]]:
    """What makes each case; the memory is taken when one is made."""
    for body in module.model.bodies:
        for tokens, chosen in DECODE:
            yield partial(_decode, module, body, tokens, chosen, pool_bytes)
        for experts, tokens, chosen in prefill:
            yield partial(_prefill, module, body, experts, tokens, chosen)


def _decode(module: Module, body: ExpertBody, tokens: int, chosen: int, pool_bytes: int) -> Case:
    device, used = module.device, tokens * chosen
    count = max(used, min(pool_bytes // layout(body).stride_bytes, MOST_CALLS * used))
    pool = _Pool(body, count, device)
    weight = torch.rand(tokens, chosen, device=device)
    x = torch.randn(tokens, body.hidden, device=device)
    order = torch.randperm(count, device=device)
    calls, first = [], None
    for start in range(0, count - used + 1, used):
        index = order[start : start + used].reshape(tokens, chosen).clone()
        out = torch.empty(tokens, body.hidden, device=device)
        calls.append(_bind(module, body, pool, (x, index, weight), out))
        first = first or (calls[0], index, out)
    assert first is not None

    def check() -> Judgement:
        call, index, out = first
        return judge(call, out, reference.experts(body, pool.bytes, x, index, weight))

    expert_bytes = layout(body).expert_bytes
    moved = used * expert_bytes + 2 * x.nbytes
    flops = 2 * used * _weights(body)
    name = _name(body)
    bound = EXACT if tokens <= 8 else ROUNDED
    aim = 0.85 if used >= 6 else 0.60
    return Case(name, f"{used} experts, T={tokens}", calls, check, bound, moved, flops, "copy", aim)


def _weights(body: ExpertBody) -> int:
    """Of an expert's matrices."""
    return (3 if body.gated else 2) * body.hidden * body.intermediate


def _name(body: ExpertBody) -> str:
    return f"experts {body.hidden}/{body.intermediate} {body.format or body.dtype}"


def _bind(
    module: Module, body: ExpertBody, pool: _Pool, operands: tuple[torch.Tensor, ...], out: torch.Tensor
) -> Callable[[], None]:
    """A call with a workspace for as many experts as it has: the program's is for the model's own top-k."""
    tokens, chosen = operands[1].shape
    own = max((layer.top_k for layer in module.model.experts if layer.body == body.name), default=1)
    room = max(tokens, -(-tokens * chosen // own))
    return module.bind(f"experts_{body.name}", *operands, pool.table, out, tokens=room)


def _prefill(module: Module, body: ExpertBody, experts: int, tokens: int, chosen: int) -> Case:
    device = module.device
    pool = _Pool(body, experts, device)
    x = torch.randn(tokens, body.hidden, device=device)
    weight = torch.rand(tokens, chosen, device=device)
    # Every expert gets equally many rows: token t chooses chosen neighbours, round and round.
    begin = torch.arange(tokens, device=device)[:, None] * chosen
    index = ((begin + torch.arange(chosen, device=device)) % experts).contiguous()
    out = torch.empty_like(x)
    call = _bind(module, body, pool, (x, index, weight), out)
    rows = tokens * chosen // experts
    shape = layout(body)
    flops = 2 * tokens * chosen * _weights(body)
    moved = experts * shape.expert_bytes + 2 * x.nbytes
    name = _name(body)
    return Case(
        name,
        f"{experts} experts, {rows} rows each",
        [call],
        lambda: judge(call, out, reference.experts(body, pool.bytes, x, index, weight)),
        ROUNDED,
        moved,
        flops,
        "torch",
        PREFILL_AIM if rows >= MANY_ROWS else None,
        _torch_experts(body, experts, rows, device),
    )


def _torch_experts(body: ExpertBody, experts: int, rows: int, device: torch.device) -> Callable[[], None]:
    """The two products of every expert by torch, without gathering, activation and sum."""
    dtype, width = getattr(torch, body.dtype), body.intermediate * (2 if body.gated else 1)
    x = torch.randn(rows, body.hidden, dtype=dtype, device=device)
    middle = torch.randn(rows, body.intermediate, dtype=dtype, device=device)
    up = torch.empty(experts, width, body.hidden, dtype=dtype, device=device).normal_(0, DEVIATION)
    down = torch.empty(experts, body.hidden, body.intermediate, dtype=dtype, device=device).normal_(
        0, DEVIATION
    )

    def run() -> None:
        for expert in range(experts):
            torch.matmul(x, up[expert].T)
            torch.matmul(middle, down[expert].T)

    return run
