"""Writes a Relax function anew: a call for each region and for the products that share their input."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import tvm
import tvm_ffi
from tvm import relax, tirx

from moec.compiler.kernels.linear_shape import rounded_type
from moec.compiler.kernels.rows.product import Activation, Product
from moec.compiler.kernels.rows.region import Region, build_region, is_flat
from moec.compiler.kernels.rows.stages import INSIDE, Item, Key
from moec.compiler.lowering.passes.fuse_rows.reading import read_function
from moec.compiler.lowering.passes.fuse_rows.regions import Regions
from moec.compiler.lowering.passes.kernel_block import as_private_block

if TYPE_CHECKING:
    from moec.compiler.lowering.passes.fuse_rows.records import Barrier, Group

RowsFactory = Callable[[Region, str], tirx.PrimFunc]
"""``(inputs..., outputs...)`` of a region."""
ProductFactory = Callable[[Product], tirx.PrimFunc]
"""``(inputs..., (weight, [bias])..., [rounded], kept..., outputs...)`` of products that share their input."""


class Makers(NamedTuple):
    """Where kernels come from, and what is noted of them."""

    rows: RowsFactory
    product: ProductFactory
    products: dict[str, Product]
    """What each kernel of products multiplies, by the kernel's name."""


class FunctionWriter:
    """Writes functions of one module.

    Args:
        module: the module as it was.
        builder: gets the kernels.
        kernels: those that it has got, by structure.
        make: makes kernels.
        function: the function to write anew.
    """

    def __init__(
        self, module: Any, builder: Any, kernels: dict[int, Any], make: Makers, function: Any
    ) -> None:
        self.builder, self.kernels, self.make, self.function = builder, kernels, make, function
        self.read = read_function(module, function)
        self.regions = Regions(self.read)
        self.memory: dict[Key, Any] = dict(self.read.inputs)

    def write(self) -> Any:
        """The new function."""
        builder = relax.BlockBuilder()
        with builder.function("rewritten", list(self.function.params)):
            with builder.dataflow():
                self._emit(builder)
                results = [self._value(builder, key) for key in self.read.results]
                output = builder.emit_output(relax.Tuple(results))
            builder.emit_func_output(output)
        return builder.get()["rewritten"]

    def _emit(self, builder: Any) -> None:
        groups = self.regions.groups()
        needed = self.regions.needed(groups)
        for level in sorted({*needed, *(barrier.level for barrier in self.read.barriers)}):
            barriers = [barrier for barrier in self.read.barriers if barrier.level == level]
            others = [barrier for barrier in barriers if barrier.shape is None]
            own = [group for group in groups if group.barriers[0].level == level]
            region = self._region(list(needed[level])) if needed.get(level) else None
            first = None if others or region is None else self.regions.keeper(own, region)
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

    def _region(self, outputs: list[Key]) -> Region:
        definitions = {
            key: definition for key, definition in self.read.definitions.items() if key not in self.memory
        }
        return build_region(definitions, self.read.tensors, outputs, self.read.weights)

    def _emit_region(self, builder: Any, region: Region) -> None:
        kernel = self._kernel("rows", self.make.rows(region, "rows"))
        inputs = [self._value(builder, key) for key in region.inputs]
        self._call(builder, kernel, inputs, [(key, self._type(key)) for key in region.outputs])

    def _emit_product(
        self, builder: Any, group: Group, region: Region | None, *, keeps: bool = False
    ) -> None:
        """One call for all products of a group; the input rounded for tensor cores is a result beside theirs."""
        shapes = tuple(barrier.shape for barrier in group.barriers if barrier.shape is not None)
        source = self.read.root(group.source) if keeps else group.source
        activation, given = self._activation(group), Item(group.source, INSIDE) in self.memory
        product = Product(shapes, region, source, keeps, activation, given)
        kernel = self._kernel(shapes[0].name, self.make.product(product))
        self.make.products[str(kernel.name_hint)] = product
        inputs = [self._value(builder, key) for key in (region.inputs if region else (group.source,))]
        weights = [self._value(builder, key) for barrier in group.barriers for key in barrier.operands[1:]]
        results = [(key, self._type(key)) for barrier in group.barriers for key in barrier.results]
        if keeps and region is not None:
            results = [*((key, self._type(key)) for key in region.outputs), *results]
        if activation is not None:
            made = self._rounded(group, activation.rounded_columns, activation.reader.dtype)
            results.insert(0, (Item(activation.source, INSIDE), made))
        if given:
            weights.append(self.memory[Item(group.source, INSIDE)])
        elif shapes[0].dtype != "float32":
            rounded = self._rounded(group, product.rounded_columns, shapes[0].dtype)
            results.insert(0, (Item(group.barriers[0].variable, INSIDE), rounded))
        self._call(builder, kernel, [*inputs, *weights], results)

    def _rounded(self, group: Group, columns: int, dtype: str) -> Any:
        """The type of the input of a product with weights of ``dtype`` as tensor cores take it."""
        *lead, _ = self.read.types[group.source].shape
        return relax.TensorType([*lead, columns], rounded_type(dtype))

    def _activation(self, group: Group) -> Activation | None:
        if group.reader is None:
            return None
        shape, source = group.reader.barriers[0].shape, group.reader.source
        assert shape is not None
        region = self._region([source])
        results = tuple(key for barrier in group.barriers for key in barrier.results)
        assert is_flat(region)
        assert set(region.inputs) == set(results)
        return Activation(region, source, results, shape)

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

    def _emit_barrier(self, builder: Any, barrier: Barrier) -> None:
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
            root = self._value(builder, self.read.root(key))
            self.memory[key] = builder.emit(relax.op.reshape(root, self.read.types[key].shape))
        return self.memory[key]
