"""``--fit``: units and their sizes, losses that are measured, and a policy that says what was chosen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import pytest
import torch

from moec.artifacts.ids import TensorName
from moec.artifacts.layout.footprint import footprint
from moec.artifacts.quantization import PLAIN, FormatRule, Quantization
from moec.compiler.calibration.products import Product
from moec.compiler.calibration.weights import CheckpointWeights
from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.fitting import fit
from moec.compiler.fitting.rounding import product_losses, relative_error
from moec.compiler.fitting.sensitivity import weigh_errors
from moec.compiler.fitting.units import MENU, fit_units, with_losses
from moec.compiler.profiling.calibration import Prompt
from moec.compiler.quantization import quantize
from moec.compiler.request import Calibration, FitRequest
from moec.errors import BudgetError, CheckpointError, UsageError
from moec.formats import FORMATS, METHODS, dequantize
from moec.planning.fitting.fit import with_options
from moec.planning.machines import common_machines
from tests.support.graphs import parts
from tests.support.notes import Notes
from tests.support.tiny_models import save

if TYPE_CHECKING:
    from pathlib import Path

    from moec.artifacts.fit import FitRecord
    from moec.compiler.checkpoint import Checkpoint
    from moec.compiler.partition import PartitionedModel

PROMPTS = (Prompt(None, (5, 17, 2, 40, 33, 9, 71)), Prompt(None, (8, 3, 60, 11, 12, 13, 90, 45)))


def prepared(name: str, folder: Path) -> tuple[Checkpoint, PartitionedModel]:
    checkpoint = open_checkpoint(save(name, folder / "checkpoint"))
    made = parts(name)
    return checkpoint, replace(made, packing=replace(made.packing, config_sha256=checkpoint.config_sha256))


def fitted(
    checkpoint: Checkpoint, made: PartitionedModel, target: FitRequest, prompts: tuple[Prompt, ...] = PROMPTS
) -> tuple[Quantization, FitRecord]:
    return fit(made, checkpoint, {}, target, Calibration(prompts=prompts), ("cpu",), Notes())


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v2_lite"])
def test_sizes_of_units_are_those_of_the_quantized_model(name: str) -> None:
    """Whatever is chosen: the plan's footprint is the one that the records have in the end."""
    made = parts(name)
    units = fit_units(made, {})
    assert {unit.role for unit in units} >= {"experts", "linear", "head"}
    zeros = [dict.fromkeys(unit.formats, 0.0) for unit in units]
    options = [with_losses(made, unit, zero, zero) for unit, zero in zip(units, zeros, strict=True)]
    for first in range(len(MENU)):
        chosen = [(first + 2 * number) % len(MENU) for number in range(len(units))]
        rules = tuple(
            FormatRule(parameter, MENU[kind])
            for unit, kind in zip(units, chosen, strict=True)
            for parameter in unit.parameters
        )
        found = quantize(made, Quantization("p", "nearest", {}, rules)).model
        assert footprint(found) == with_options(footprint(made.model), options, chosen)


def test_segments_have_few_variants() -> None:
    """One format a segment step: no function becomes more than there are formats, but where a table is in it too."""
    made = parts("deepseek_v2_lite")
    for unit in fit_units(made, {}):
        steps = {
            number
            for number, step in enumerate(made.model.steps)
            if step.kind == "segment" and set(step.weights) & set(unit.tensors)
        }
        assert unit.layer is not None or len(steps) == 1


def test_what_the_checkpoint_has_costs_nothing() -> None:
    made = parts("gpt_oss")
    down = made.packing.experts[0].down
    first = next(unit for unit in fit_units(made, {down: "mxfp4"}) if unit.layer == 0)
    assert first.kept == "mxfp4"
    assert first.formats == (*MENU, "mxfp4")
    assert all(unit.kept is None for unit in fit_units(made, {down: "mxfp4"}) if unit.layer != 0)


def test_losses_of_products_are_those_of_rounded_weights() -> None:
    """Against the whole matrix at once; of a table, against its rows."""
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(70, 64, generator=random), torch.randn(9, 64, generator=random)
    gradient, routing = torch.randn(2, 9, 70, generator=random)
    kind = FORMATS["int4-g32"]
    change = torch.from_numpy(dequantize(kind, METHODS["nearest"](kind, weight.numpy()))) - weight
    name = TensorName("w")
    found = product_losses(Product(name, weight, x, gradient, routing), kind.name, "nearest")
    result = x @ change.T
    assert found[0] == pytest.approx(float(0.5 * (gradient * result).square().sum()), rel=1e-5)
    assert found[1] == pytest.approx(float((routing * result).square().sum()), rel=1e-5)
    ids, gradient = torch.tensor([3, 69, 3, 0]), torch.randn(4, 64, generator=random)
    found = product_losses(Product(name, weight, ids, gradient), kind.name, "nearest")
    assert found[0] == pytest.approx(float(0.5 * (gradient * change[ids]).square().sum()), rel=1e-5)
    assert found[1] == 0.0
    share = float(change.square().sum() / weight.square().sum())
    assert relative_error(weight, kind.name, "nearest") == pytest.approx(share, rel=1e-5)


def test_a_choice_is_a_policy_and_a_record(tmp_path: Path) -> None:
    """Everything from a checkpoint to formats: what the record says is what the policy makes of the model."""
    checkpoint, made = prepared("gpt_oss", tmp_path)
    most = footprint(made.model)
    plain = most.dense_bytes + most.experts_bytes
    policy, record = fitted(checkpoint, made, FitRequest("1TiB", limit_bytes=1 << 40))
    assert {unit.format for unit in record.units} == {PLAIN}
    assert record.loss == 0.0
    everything = record.resident_bytes
    limit = everything - plain // 3
    policy, record = fitted(checkpoint, made, FitRequest("x", limit_bytes=limit))
    found = quantize(made, policy)
    assert record.resident_bytes <= limit
    facts = footprint(found.model)
    assert everything - record.resident_bytes == plain - facts.dense_bytes - facts.experts_bytes
    assert record.measured == "divergence"
    assert record.tokens == sum(len(prompt.token_ids or ()) for prompt in PROMPTS)
    assert record.loss == pytest.approx(sum(unit.loss for unit in record.units))
    formats = {tensor.sources[0]: tensor.format or PLAIN for tensor in found.packing.dense if tensor.sources}
    bodies = {body.name: body.format or PLAIN for body in found.model.bodies}
    for unit in record.units:
        if unit.role == "experts":
            layer = next(layer for layer in found.model.experts if layer.module == unit.name)
            assert bodies[layer.body] == unit.format
        else:
            assert {formats[parameter] for parameter in unit.parameters} == {unit.format}
    assert len({unit.format for unit in record.units}) > 1
    with pytest.raises(BudgetError, match="the least is"):
        fitted(checkpoint, made, FitRequest("1B", limit_bytes=1))
    with pytest.raises(CheckpointError, match="token 9999"):
        fitted(checkpoint, made, FitRequest("x", limit_bytes=limit), (Prompt(None, (1, 9999)),))
    with pytest.raises(CheckpointError, match="two tokens"):
        fitted(checkpoint, made, FitRequest("x", limit_bytes=limit), (Prompt(None, (1,)),))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        fitted(checkpoint, made, FitRequest("x", limit_bytes=limit), (Prompt("text", None),))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_time_is_met_on_a_machine(kind: str, tmp_path: Path) -> None:
    """By the cost model, with the calibration tokens' own routing; a machine's GPU counts where a target is one."""
    checkpoint, made = prepared("gpt_oss", tmp_path)
    machine = next(each for each in common_machines() if (each.gpu_name is None) == (kind == "cpu"))

    def chosen(milliseconds: float) -> FitRecord:
        target = FitRequest("t", milliseconds=milliseconds, machine=machine)
        return fit(made, checkpoint, {}, target, Calibration(prompts=PROMPTS), (kind,), Notes())[1]

    whole = chosen(1e9)
    assert {unit.format for unit in whole.units} == {PLAIN}
    assert whole.milliseconds_per_token is not None
    assert whole.machine == machine.name
    part = 0.7 if kind == "cpu" else 0.999
    found = chosen(part * whole.milliseconds_per_token)
    assert found.milliseconds_per_token is not None
    assert found.milliseconds_per_token <= part * whole.milliseconds_per_token
    assert found.loss > 0
    with pytest.raises(BudgetError, match=f"on {machine.name}: the least is"):
        chosen(1e-9)


def test_without_calibration_there_is_nothing_to_measure_on() -> None:
    with pytest.raises(UsageError, match="needs calibration"):
        fit(
            parts("gpt_oss"),
            cast("Checkpoint", None),
            {},
            FitRequest("8GiB", limit_bytes=8 << 30),
            Calibration(enabled=False),
            ("cpu",),
            Notes(),
        )


def test_weights_alone_are_weighed_where_a_model_cannot_be_run(tmp_path: Path) -> None:
    checkpoint, made = prepared("gpt_oss", tmp_path)
    units = fit_units(made, {})
    with ThreadPoolExecutor(2) as threads:
        found = weigh_errors(made.model, CheckpointWeights(checkpoint, made), units, "nearest", threads)
    assert found.measured == "weights"
    for unit in units:
        losses = found.losses[unit.name]
        assert losses[PLAIN] == 0 < losses["int8-g128"] < losses["int4-g32"] < losses["int4-g128"]
