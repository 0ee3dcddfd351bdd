"""One pass over the model with symbolic T: a functional graph of core ATen ops and markers.

Behind an encoder there are two numbers of tokens, S of the source and T of the decoder.

``torch.export`` would trace twice, once for the graph and once to decompose it; ``make_fx`` below autograd
gives the decomposed graph at once.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode

from moec.compiler.tracing import markers
from moec.compiler.tracing.model.build import has_encoder
from moec.compiler.tracing.positions import given_positions
from moec.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moec.compiler.tracing.session import Session

EXAMPLE_TOKENS = 37
"""T while tracing: a hint without meaning, chosen to equal no size that a model has."""
EXAMPLE_SOURCE = 41
"""S while tracing."""


@dataclass(frozen=True)
class Captured:
    """The graph of a whole model.

    Its placeholders are the parameters and buffers in the order of ``names``, then tokens and positions, and behind an
    encoder the source's tokens and positions.
    Every node has ``meta["val"]``, a fake tensor with symbolic T, and ``meta["module"]``, the path of the
    module it is from.
    """

    graph: fx.GraphModule
    names: tuple[str, ...]
    symbol: str
    """T's name in the shapes."""
    source_symbol: str | None
    """S's name in the shapes; ``None`` where there is no encoder."""


class _OneLinear(TorchFunctionMode):
    """Record every ``linear`` as the one form of a weight product."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return markers.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def capture(model: Any, session: Session) -> Captured:
    """Trace ``model`` (on the meta device) from tokens and positions ``[1, T]`` to logits ``[1, T, V]``.

    Behind an encoder also from a source's tokens and positions ``[1, S]``.
    """
    shapes = ShapeEnv()
    fake_mode = FakeTensorMode(shape_env=shapes)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with fake_mode:
        tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            for name, tensor in state.items()
        }
    sizes = (EXAMPLE_TOKENS, EXAMPLE_SOURCE) if has_encoder(model.config) else (EXAMPLE_TOKENS,)
    inputs = [_tokens(fake_mode, size) for size in sizes for _ in range(2)]

    def forward(values: list[torch.Tensor], *given: torch.Tensor) -> torch.Tensor:
        named = dict(zip(tensors, values, strict=True))
        with given_positions(*given[1::2]):
            arguments = _arguments(session, *given)
            logits: torch.Tensor = torch.func.functional_call(model, named, (), arguments).logits
        return logits

    functional = torch.func.functionalize(forward, remove="mutations")
    # The Python dispatcher lets functionalization infer shapes that hold a symbol.
    with fake_mode, torch.no_grad(), enable_python_dispatcher(), _OneLinear(), _module_paths(model):
        graph = make_fx(functional, tracing_mode="real")(list(tensors.values()), *inputs)
    if shapes.guards:
        raise UnsupportedModelError(
            f"{session.class_name} does different things for different numbers of tokens: {shapes.guards[0].expr}",
            "A compiled graph serves any number of tokens.",
        )
    symbol, *source = (str(each.shape[1]) for each in inputs[::2])
    return Captured(graph, tuple(tensors), symbol, source[0] if source else None)


def _arguments(
    session: Session, tokens: torch.Tensor, positions: torch.Tensor, *source: torch.Tensor
) -> dict[str, Any]:
    """What the model's ``forward`` is called with."""
    if source:
        return {
            "input_ids": source[0],
            "decoder_input_ids": tokens,
            "past_key_values": session.cache,
        }
    return {
        "input_ids": tokens,
        "position_ids": positions,
        "past_key_values": session.cache,
        "use_cache": True,
    }


def _tokens(fake_mode: FakeTensorMode, size: int) -> torch.Tensor:
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, DimDynamic.DUCK])
    example = torch.zeros(1, size, dtype=torch.int64)
    return fake_mode.from_tensor(example, symbolic_context=context)


@contextmanager
def _module_paths(model: torch.nn.Module) -> Iterator[None]:
    """Stamp every node with the path of the module in whose forward it was made."""
    stack: list[str] = []
    last: list[fx.Node] = []

    def stamp() -> None:
        mode = get_proxy_mode()
        if mode is None:
            return
        root = mode.tracer.graph._root
        node = last[0] if last else root
        while (node := node._next) is not root:
            node.meta["module"] = stack[-1] if stack else ""
            last[:] = [node]

    handles = []
    for path, module in model.named_modules():

        def enter(*_: Any, path: str = path) -> None:
            stamp()
            stack.append(path)

        def leave(*_: Any) -> None:
            stamp()
            stack.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
