"""Writes a Relax function anew: a call for each region and for the products that share their input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import tvm
import tvm_ffi
from tvm import relax, tirx

from moec.compiler.kernels.linear_shape import rounded_type
from moec.compiler.kernels.rows.product import Activation, Product
from moec.compiler.kernels.rows.region import Region, build_region, is_flat
from moec.compiler.kernels.rows.stages import INSIDE, Item, Key
from moec.compiler.lowering.passes.fuse_rows.reading import read_function
from moec.compiler.lowering.passes.fuse_rows.regions import Regions, behind_of
from moec.compiler.lowering.passes.kernel_block import as_private_block

if TYPE_CHECKING:
    from moec.compiler.kernels.rows.product import Behind
    from moec.compiler.lowering.passes.fuse_rows.records import Barrier, Group

RowsFactory = Callable[[Region, str], tirx.PrimFunc]
"""``(inputs..., outputs...)`` of a region."""
ProductFactory = Callable[[Product], tirx.PrimFunc]
"""``(inputs..., (weight, [bias])..., [rounded], kept..., outputs...)`` of products that share their input; what is
behind them has its inputs and outputs after theirs."""


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
        self.groups = self.regions.groups()
        self.needed = self.regions.needed(self.groups)

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
        done: set[int] = set()
        for level in sorted({*self.needed, *(barrier.level for barrier in self.read.barriers)}):
            others = [
                barrier for barrier in self.read.barriers if barrier.level == level and barrier.shape is None
            ]
            own = self._groups_of(level)
            region = self._region_of(level) if level not in done else None
            first = None if others or region is None else self.regions.keeper(own, region)
            made: list[Group] = []
            if first is not None:
                behind, beside = self._behind(level, *first), self.regions.beside(first[0], own)
                if behind is not None:
                    done.add(level + 1)
                made = [first[0], *([] if beside is None else [beside])]
                self._emit_product(builder, *first, keeps=True, behind=behind, beside=beside)
            elif region is not None:
                self._emit_region(builder, region)
            for barrier in others:
                self._emit_barrier(builder, barrier)
            for group in own:
                if group not in made:
                    inside = self._region([group.source]) if group.fused else None
                    self._emit_product(builder, group, inside)

    def _groups_of(self, level: int) -> list[Group]:
        return [group for group in self.groups if group.barriers[0].level == level]

    def _region_of(self, level: int, known: Iterable[Key] = ()) -> Region | None:
        """What has to be in memory before the products of a level; ``known`` will be by then."""
        return self._region(list(self.needed[level]), known) if self.needed.get(level) else None

    def _region(self, outputs: list[Key], known: Iterable[Key] = ()) -> Region:
        memory = {*self.memory, *known}
        definitions = {
            key: definition for key, definition in self.read.definitions.items() if key not in memory
        }
        return build_region(definitions, self.read.tensors, outputs, self.read.weights)

    def _behind(self, level: int, group: Group, region: Region) -> Behind | None:
        """The region of the next level, where it is for what reads this group alone."""
        following = self._region_of(level + 1, region.outputs)
        if following is None or self.regions.keeper(self._groups_of(level + 1), following) is not None:
            return None
        return behind_of(group, following, {*self.memory, *region.outputs})

    def _emit_region(self, builder: Any, region: Region) -> None:
        kernel = self._kernel("rows", self.make.rows(region, "rows"))
        inputs = [self._value(builder, key) for key in region.inputs]
        self._call(builder, kernel, inputs, [(key, self._type(key)) for key in region.outputs])

    def _emit_product(
        self,
        builder: Any,
        group: Group,
        region: Region | None,
        *,
        keeps: bool = False,
        behind: Behind | None = None,
        beside: Group | None = None,
    ) -> None:
        """One call for all products of a group; the input rounded for tensor cores is a result beside theirs."""
        if behind is not None:
            group.begin_with(behind.results)
        groups = [group] if beside is None else [group, beside]
        shapes = group.shapes
        source = self.read.root(group.source) if keeps else group.source
        other = None
        if beside is not None:
            other = Product(beside.shapes, None, source, activation=_activation_beyond(beside))
        activation = _activation_beyond(group)
        if activation is None and beside is None:
            activation = self._activation(group)
        given = self.memory.get(Item(group.source, INSIDE))
        product = Product(
            shapes,
            region,
            source,
            keeps=keeps,
            alone=keeps and self.read.only_multiplied(source, groups),
            behind=behind,
            beside=other,
            activation=activation,
            given=given is not None,
            held=group.held,
        )
        kernel = self._kernel(shapes[0].name, self.make.product(product))
        self.make.products[str(kernel.name_hint)] = product
        inputs = [self._value(builder, key) for key in product.reads]
        weights = [
            self._value(builder, key)
            for each in groups
            for barrier in each.barriers
            for key in barrier.operands[1:]
        ]
        made = (key for each in reversed(groups) for barrier in each.barriers for key in barrier.results)
        results = [(key, self._type(key)) for key in (*product.kept, *made)]
        rounded = [
            self._rounded(each, own)
            for each, own in ((group, product), (beside, other))
            if each is not None and own is not None and own.has_rounded
        ]
        if activation is not None and product.has_activated:
            results.insert(0, (Item(activation.source, INSIDE), self._activated(group, activation)))
        if given is not None:
            weights.append(given)
        else:
            results = [*rounded, *results]
        self._call(builder, kernel, [*inputs, *weights], results)

    def _activation(self, group: Group) -> Activation | None:
        """What only the group's reader makes of its results."""
        if group.reader is None:
            return None
        source = group.reader.source
        region, reader = self._region([source]), group.reader.shapes[0]
        made = [barrier.results[0] for barrier in group.barriers]
        places = tuple(place for place, key in enumerate(made) if key in region.inputs)
        assert is_flat(region)
        assert len(places) == len(region.inputs)
        return Activation(region, source, tuple(made[place] for place in places), places, reader)

    def _activated(self, group: Group, activation: Activation) -> Any:
        *lead, _ = self.read.types[group.source].shape
        return relax.TensorType([*lead, activation.rounded_columns], rounded_type(activation.reader.dtype))

    def _rounded(self, group: Group, product: Product) -> tuple[Key, Any]:
        """A group's input as tensor cores take it, which a kernel makes for itself."""
        *lead, _ = self.read.types[group.source].shape
        kind = relax.TensorType([*lead, product.rounded_columns], rounded_type(product.shapes[0].dtype))
        return Item(group.barriers[0].variable, INSIDE), kind

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


def _activation_beyond(group: Group) -> Activation | None:
    """What a reader in another function makes of a group's results."""
    beyond = group.beyond
    if beyond is None:
        return None
    made = [barrier.results[0] for barrier in group.barriers]
    return replace(beyond.activation, places=tuple(map(made.index, beyond.results)))
