"""All operators between two products become one kernel: a block for each token computes its rows.

Before::

    lv = R.add(x0, x1)                                   # [1, T, 2048]
    lv1 = R.mean(R.multiply(lv, lv), axis=[-1])          # and so on: a norm
    lv9 = R.call_tir(cls.linear_3072_2048_bfloat16, (lv8, w1), ...)
    lv10 = R.split(R.permute_dims(R.reshape(lv9, ...)))  # and so on: rotary embedding

After::

    rows = R.call_tir(cls.rows_0, (x0, x1, w0), out_ty=[lv's type, lv8's type])
    lv9 = R.call_tir(cls.linear_3072_2048_bfloat16, (rows[1], w1), ...)
    rows_1 = R.call_tir(cls.rows_1, (lv9, cos, sin), out_ty=...)

Products have a *level*: how many products lie before them on the longest way. Everything that needs products up to
one level is one region; what is cheap is computed again in a later region rather than kept. An operator whose loops
are no rows is left as it is, and counts as a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx

from moec.compiler.kernels.cpu.emit import HAND_WRITTEN
from moec.compiler.lowering.passes.dispatch_linear import LinearShape
from moec.compiler.lowering.passes.kernel_block import as_private_block
from moec.compiler.lowering.rows.region import (
    Region,
    build_region,
    for_every_block,
    is_costly,
    must_be_stored,
    sources,
)
from moec.compiler.lowering.rows.stages import (
    INSIDE,
    Item,
    Key,
    NotRowwise,
    Stage,
    Tensor,
    TopK,
    View,
    parse,
    tensor_of,
)
from moec.errors import CompileError

VIEWS = frozenset(f"relax.{name}" for name in ("reshape", "expand_dims", "squeeze", "flatten"))
VECTOR = 8
"""Columns that kernels of products take at a time."""
MOST_ROWS = 8192
"""Of products whose every block computes the region before it: with more there are too many blocks."""
KEPT = (*VIEWS, "relax.topk")
"""Operators that this pass takes as they are, before they are loops."""

RowsFactory = Callable[[Region, str], tirx.PrimFunc]
"""``(inputs..., outputs...)`` of a region."""
ProductFactory = Callable[["Product"], tirx.PrimFunc]
"""``(inputs..., (weight, [bias])..., [rounded], kept..., outputs...)`` of products that share their input."""


@tvm.transform.module_pass(opt_level=0, name="FuseRows")
class FuseRows:
    """Regions of row-wise operators become kernels.

    Args:
        rows: makes the kernel of a region.
        product: makes the kernel of products.
        products: gets what each kernel of products multiplies, by the kernel's name.
    """

    def __init__(
        self, rows: RowsFactory, product: ProductFactory, products: dict[str, Product] | None = None
    ) -> None:
        self.rows, self.product = rows, product
        self.products = {} if products is None else products

    def transform_module(self, module: tvm.IRModule, _context: Any) -> tvm.IRModule:
        """Rewrite every Relax function of ``module``."""
        builder = relax.BlockBuilder(module)
        kernels: dict[int, Any] = {}
        for name, function in module.functions_items():
            if isinstance(function, relax.Function):
                rewritten = _Rewriter(module, builder, kernels, self).rewrite(function)
                builder.update_func(name, rewritten.with_attr("global_symbol", name.name_hint))
        return relax.transform.DeadCodeElimination()(builder.get())


@dataclass(frozen=True)
class Product:
    """Products that share their input, and what the input is computed from."""

    shapes: tuple[LinearShape, ...]
    region: Region | None
    """What the kernel computes ``source`` from; ``None``: it reads it."""
    source: Key
    keeps: bool = False
    """Whether the region's outputs, the source among them, are results of the kernel."""


@dataclass
class _Barrier:
    """A call that is left as it is: a product, or an operator without rows."""

    variable: Any
    call: Any
    operands: list[Key]
    results: list[Item]
    level: int
    shape: LinearShape | None
    """Of a product."""


@dataclass
class _Group:
    """Products of one level that share their input."""

    barriers: list[_Barrier]
    fused: bool = False
    """Whether the input is computed by the kernel itself, from what lies before it."""

    @property
    def source(self) -> Key:
        """The input."""
        return self.barriers[0].operands[0]


@dataclass
class _Reading:
    """A function, read."""

    names: dict[Any, Any] = field(default_factory=dict)
    """Relax variable to key, or tuple of keys."""
    tensors: dict[Key, Tensor] = field(default_factory=dict)
    types: dict[Key, Any] = field(default_factory=dict)
    definitions: dict[Key, Any] = field(default_factory=dict)
    levels: dict[Key, int] = field(default_factory=dict)
    barriers: list[_Barrier] = field(default_factory=list)
    aliases: dict[Key, Key] = field(default_factory=dict)
    """Views with a shape that is no row: only their memory can be looked at in another shape."""


class _Rewriter:
    def __init__(self, module: Any, builder: Any, kernels: dict[int, Any], make: FuseRows) -> None:
        self.module, self.builder, self.kernels, self.make = module, builder, kernels, make
        self.read = _Reading()
        self.memory: dict[Key, Any] = {}
        self.weights: frozenset[Key] = frozenset()

    def rewrite(self, function: Any) -> Any:
        for parameter in function.params:
            self._external(parameter, parameter, 0)
        self.weights = frozenset(function.params[int(function.attrs["num_input"]) :])
        (block,) = function.body.blocks
        for binding in block.bindings:
            self._read(binding.var, binding.value)
        results = self._keys(function.body.body)
        builder = relax.BlockBuilder()
        with builder.function("rewritten", list(function.params)):
            with builder.dataflow():
                self._emit(builder, results)
                output = builder.emit_output(relax.Tuple([self._value(builder, key) for key in results]))
            builder.emit_func_output(output)
        return builder.get()["rewritten"]

    def _keys(self, value: Any) -> list[Key]:
        if isinstance(value, relax.Tuple):
            return [key for item in value.fields for key in self._keys(item)]
        if isinstance(value, tvm.ir.expr.Constant):
            return [self._constant(value)]
        names = self.read.names[value]
        return list(names) if isinstance(names, tuple) else [names]

    def _constant(self, value: Any) -> Key:
        """A number: part of every expression that reads it."""
        key = Item(value, 0)
        if key not in self.read.definitions:
            array = value.value.numpy()
            if array.ndim:
                raise CompileError(f"A segment holds a constant of shape {array.shape}; only numbers can be")
            self._declare(key, value.ty, 0)
            number = tirx.const(array.item(), str(array.dtype))
            self.read.definitions[key] = Stage(key, self.read.tensors[key], (), number, {})
        return key

    def _external(self, key: Key, value: Any, level: int) -> None:
        self._declare(key, value.ty, level)
        self.read.names[value] = key
        self.memory[key] = value

    def _declare(self, key: Key, kind: Any, level: int) -> None:
        self.read.types[key] = kind
        self.read.levels[key] = level
        try:
            self.read.tensors[key] = tensor_of(kind.shape, kind.dtype.dtype)
        except NotRowwise:
            return

    def _read(self, variable: Any, value: Any) -> None:
        if isinstance(value, (tvm.ir.Var, tvm.ir.expr.Constant, relax.Tuple)):
            keys = self._keys(value)
            self.read.names[variable] = tuple(keys) if isinstance(value, relax.Tuple) else keys[0]
        elif isinstance(value, relax.TupleGetItem):
            self.read.names[variable] = self._keys(value.tuple_value)[value.index]
        elif _name(value) in VIEWS:
            self._view(variable, value)
        elif _name(value) == "relax.topk":
            self._topk(variable, value)
        else:
            self._operator(variable, value)

    def _view(self, variable: Any, value: Any) -> None:
        (source,) = self._keys(value.args[0])
        tensors = self.read.tensors
        self._declare(variable, variable.ty, self.read.levels[source])
        self.read.names[variable] = variable
        if variable in tensors and source in tensors and _same_rows(tensors[variable], tensors[source]):
            self.read.definitions[variable] = View(variable, tensors[variable], source, tensors[source])
        else:
            self.read.aliases[variable] = source

    def _topk(self, variable: Any, value: Any) -> None:
        (source,) = self._keys(value.args[0])
        attributes, rank = value.attrs, len(value.args[0].ty.shape)
        plain = str(attributes.ret_type) == "both" and bool(attributes.largest)
        if not plain or int(attributes.axis) not in (-1, rank - 1) or source not in self.read.tensors:
            raise CompileError(f"A segment uses topk in a way that no router does: {attributes}")
        keys = (Item(variable, 0), Item(variable, 1))
        for key, kind in zip(keys, variable.ty.fields, strict=True):
            self._declare(key, kind, self.read.levels[source])
        tensors = self.read.tensors
        topk = TopK(keys[0], tensors[keys[0]], source, tensors[source], int(attributes.k), keys)
        self.read.definitions.update(dict.fromkeys(keys, topk))
        self.read.names[variable] = keys

    def _operator(self, variable: Any, value: Any) -> None:
        """A call of loops: stages where they are rows, a barrier otherwise."""
        if _name(value) != "relax.call_tir":
            raise CompileError(f"{_name(value) or type(value).__name__} is not lowered to loops")
        function = self.module[value.args[0]]
        operands = self._keys(value.args[1])
        level = max((self.read.levels[key] for key in operands), default=0)
        fields = list(variable.ty.fields) if isinstance(variable.ty, relax.TupleType) else [variable.ty]
        keys = [Item(variable, number) for number in range(len(fields))]
        self.read.names[variable] = tuple(keys) if isinstance(variable.ty, relax.TupleType) else keys[0]
        if (
            not function.attrs.get(HAND_WRITTEN, False)
            and len(value.args) == 2
            and self._stages(function, operands, keys, fields, level)
        ):
            return
        for key, kind in zip(keys, fields, strict=True):
            self._declare(key, kind, level + 1)
        self.read.barriers.append(_Barrier(variable, value, operands, keys, level, LinearShape.of(function)))

    def _stages(self, function: Any, operands: list[Key], keys: list[Item], fields: Any, level: int) -> bool:
        try:
            stages = parse(function, [*operands, *keys], keys[0].variable)
            known = all(key in self.read.tensors for key in operands)
        except NotRowwise:
            return False
        if not known:
            return False
        for key, kind in zip(keys, fields, strict=True):
            self._declare(key, kind, level)
        for stage in stages:
            self.read.definitions[stage.key] = stage
            self.read.tensors[stage.key] = stage.tensor
            self.read.levels[stage.key] = level
        return True

    # What follows writes the function anew.

    def _emit(self, builder: Any, results: list[Key]) -> None:
        groups = self._groups(results)
        needed = self._needed(results, groups)
        for level in sorted({*needed, *(barrier.level for barrier in self.read.barriers)}):
            barriers = [barrier for barrier in self.read.barriers if barrier.level == level]
            others = [barrier for barrier in barriers if barrier.shape is None]
            own = [group for group in groups if group.barriers[0].level == level]
            region = self._region(list(needed[level])) if needed.get(level) else None
            first = None if others or region is None else self._keeper(own, region)
            if first is not None:
                self._emit_product(builder, *first, keeps=True)
            elif region is not None:
                self._emit_region(builder, region)
            for barrier in others:
                self._emit_barrier(builder, barrier)
            for group in own:
                if first is None or group is not first[0]:
                    inside = self._region([group.source]) if group.fused else None
                    self._emit_product(builder, group, inside)

    def _keeper(self, groups: list[_Group], region: Region) -> tuple[_Group, Region] | None:
        """Products that can compute the region before them, and what they compute."""
        for group in groups:
            shape, source = group.barriers[0].shape, self._root(group.source)
            assert shape is not None
            fast = shape.dtype != "float32" and shape.columns % VECTOR == 0 and shape.batch is None
            fast &= sum(barrier.shape.rows for barrier in group.barriers if barrier.shape) <= MOST_ROWS
            if not fast or group.fused or source not in region.outputs:
                continue
            if math.prod(region.tensors[source].row) != shape.columns:
                continue
            whole = for_every_block(region, source)
            if whole is not None:
                return group, whole
        return None

    def _groups(self, results: list[Key]) -> list[_Group]:
        """Products by what they share; a product of a batch is a group of its own."""
        found: dict[Any, _Group] = {}
        for number, barrier in enumerate(self.read.barriers):
            shape = barrier.shape
            if shape is None:
                continue
            alike = (self._root(barrier.operands[0]), barrier.level, shape.columns, shape.dtype)
            key = alike if shape.batch is None else number
            found.setdefault(key, _Group([])).barriers.append(barrier)
        groups = list(found.values())
        for group in groups:
            group.fused = self._can_fuse(group, results)
        return groups

    def _can_fuse(self, group: _Group, results: list[Key]) -> bool:
        """Whether nobody else wants the group's input, and each of its elements stands for itself."""
        shape, root = group.barriers[0].shape, self._root(group.source)
        assert shape is not None
        others = [
            key for barrier in self.read.barriers if barrier not in group.barriers for key in barrier.operands
        ]
        if shape.dtype == "float32" or shape.columns % VECTOR or root not in self.read.definitions:
            return False
        if (
            any(self._root(key) == root for key in (*others, *results))
            or group.source not in self.read.tensors
        ):
            return False
        return self._stands_alone(root, group.barriers[0].level)

    def _stands_alone(self, key: Key, level: int) -> bool:
        definition = self.read.definitions.get(key)
        if definition is None or self._kept_earlier(key, level):
            return True
        if must_be_stored(definition):
            return False
        return all(self._stands_alone(source, level) for source in sources(definition))

    def _needed(self, results: list[Key], groups: list[_Group]) -> dict[int, dict[Key, None]]:
        """By level, what regions must put into memory: for barriers, for the result, for later regions."""
        needed: dict[int, dict[Key, None]] = {}

        def need(key: Key) -> None:
            root = self._root(key)
            if root in self.read.definitions:
                needed.setdefault(self.read.levels[root], {})[root] = None

        fused = [group for group in groups if group.fused]
        computed = {id(barrier) for group in fused for barrier in group.barriers}
        for barrier in self.read.barriers:
            for key in barrier.operands[1 if id(barrier) in computed else 0 :]:
                need(key)
        for group in fused:
            for earlier in self._read_from_earlier(self._root(group.source), group.barriers[0].level):
                need(earlier)
        self._need_results(results, needed)
        for level in range(max(needed, default=0), -1, -1):
            for key in list(needed.get(level, ())):
                for earlier in self._read_from_earlier(key, self.read.levels[key]):
                    need(earlier)
        return needed

    def _need_results(self, results: list[Key], needed: dict[int, dict[Key, None]]) -> None:
        """What only the caller wants waits for the next region that there is anyway, or for the last one."""
        roots = [self._root(key) for key in results]
        levels = sorted({*needed, max((self.read.levels[root] for root in roots), default=0)})
        for root in roots:
            if root in self.read.definitions:
                level = next(level for level in levels if level >= self.read.levels[root])
                needed.setdefault(level, {})[root] = None

    def _read_from_earlier(self, key: Key, level: int) -> list[Key]:
        """What a region of ``level`` reads that an earlier one has to keep."""
        found: dict[Key, None] = {}
        seen: set[Key] = set()

        def visit(key: Key) -> None:
            if key in seen or key not in self.read.definitions:
                return
            seen.add(key)
            if self._kept_earlier(key, level):
                found[key] = None
                return
            for source in sources(self.read.definitions[key]):
                visit(source)

        visit(key)
        return list(found)

    def _kept_earlier(self, key: Key, level: int) -> bool:
        definition = self.read.definitions[key]
        return self.read.levels[key] < level and (must_be_stored(definition) or is_costly(definition))

    def _root(self, key: Key) -> Key:
        """The tensor whose memory ``key`` looks at."""
        while True:
            definition = self.read.definitions.get(key)
            if key in self.read.aliases:
                key = self.read.aliases[key]
            elif isinstance(definition, View):
                key = definition.source
            else:
                return key

    def _region(self, outputs: list[Key]) -> Region:
        definitions = {
            key: definition for key, definition in self.read.definitions.items() if key not in self.memory
        }
        return build_region(definitions, self.read.tensors, outputs, self.weights)

    def _emit_region(self, builder: Any, region: Region) -> None:
        kernel = self._kernel("rows", self.make.rows(region, "rows"))
        inputs = [self._value(builder, key) for key in region.inputs]
        self._call(builder, kernel, inputs, [(key, self._type(key)) for key in region.outputs])

    def _emit_product(
        self, builder: Any, group: _Group, region: Region | None, *, keeps: bool = False
    ) -> None:
        """One call for all products of a group; the input rounded for tensor cores is a result beside theirs."""
        shapes = tuple(barrier.shape for barrier in group.barriers if barrier.shape is not None)
        source = self._root(group.source) if keeps else group.source
        product = Product(shapes, region, source, keeps)
        kernel = self._kernel(shapes[0].name, self.make.product(product))
        self.make.products[str(kernel.name_hint)] = product
        inputs = [self._value(builder, key) for key in (region.inputs if region else (group.source,))]
        weights = [self._value(builder, key) for barrier in group.barriers for key in barrier.operands[1:]]
        results = [(key, self._type(key)) for barrier in group.barriers for key in barrier.results]
        if keeps and region is not None:
            results = [*((key, self._type(key)) for key in region.outputs), *results]
        if shapes[0].dtype != "float32":
            *lead, columns = self.read.types[group.source].shape
            rounded = relax.TensorType([*lead, -(-int(columns) // VECTOR) * VECTOR], shapes[0].dtype)
            results.insert(0, (Item(group.barriers[0].variable, INSIDE), rounded))
        self._call(builder, kernel, [*inputs, *weights], results)

    def _call(self, builder: Any, kernel: Any, inputs: list[Any], results: list[tuple[Key, Any]]) -> None:
        types = [kind for _, kind in results]
        call = relax.call_tir(kernel, inputs, types if len(types) > 1 else types[0])
        result = builder.emit(call)
        for number, (key, _) in enumerate(results):
            single = len(types) == 1
            self.memory[key] = result if single else builder.emit(relax.TupleGetItem(result, number))

    def _type(self, key: Key) -> Any:
        if key in self.read.types:
            return self.read.types[key]
        tensor, tokens = self.read.tensors[key], self._tokens()
        return relax.TensorType(
            [tokens if extent is None else extent for extent in tensor.shape], tensor.dtype
        )

    def _tokens(self) -> Any:
        return next(
            extent
            for kind in self.read.types.values()
            for extent in kind.shape
            if isinstance(extent, tvm.ir.Var)
        )

    def _kernel(self, name: str, function: tirx.PrimFunc) -> Any:
        """``function`` in the module, once however often it is made."""
        digest = tvm_ffi.structural_hash(function, map_free_vars=True)
        if digest not in self.kernels:
            named = as_private_block(function)
            self.kernels[digest] = self.builder.add_func(named, f"{name}_{len(self.kernels)}")
        return self.kernels[digest]

    def _emit_barrier(self, builder: Any, barrier: _Barrier) -> None:
        arguments = [self._value(builder, key) for key in barrier.operands]
        call = barrier.call
        single = not isinstance(barrier.variable.ty, relax.TupleType)
        kinds = barrier.variable.ty if single else list(barrier.variable.ty.fields)
        assert len(call.args) == 2, "sizes are read off the operands"
        result = builder.emit(relax.call_tir(call.args[0], arguments, kinds))
        for number, key in enumerate(barrier.results):
            self.memory[key] = result if single else builder.emit(relax.TupleGetItem(result, number))

    def _value(self, builder: Any, key: Key) -> Any:
        """``key`` in memory, in its own shape."""
        if key not in self.memory:
            root = self._value(builder, self._root(key))
            self.memory[key] = builder.emit(relax.op.reshape(root, self.read.types[key].shape))
        return self.memory[key]


def _name(value: Any) -> str:
    return str(value.op.name) if isinstance(value, relax.Call) and hasattr(value.op, "name") else ""


def _same_rows(one: Tensor, other: Tensor) -> bool:
    """Whether a view keeps every token's row together: the same number of rows lies before the tokens."""
    return _before(one) == _before(other)


def _before(tensor: Tensor) -> int:
    if tensor.token_axis is None:
        return 0
    product = 1
    for extent in tensor.shape[: tensor.token_axis]:
        assert extent is not None
        product *= extent
    return product
