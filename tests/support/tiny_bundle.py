"""A complete, consistent bundle of a few kilobytes, made without compiling anything."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.artifacts.files.manifest import FORMAT_VERSION, Manifest, TargetRecord, TokenizerRecord
from moec.artifacts.files.records import write_record
from moec.artifacts.files.traces import TRACES_NAME, save_traces
from moec.artifacts.files.writer import BundleWriter
from moec.artifacts.ids import LayerId, TensorName, ValueId
from moec.artifacts.layout.experts import layout
from moec.artifacts.layout.footprint import footprint
from moec.artifacts.machine import MachineRecord
from moec.artifacts.model import (
    AttentionSpec,
    ExpertBody,
    ExpertsLayer,
    FunctionSpec,
    GenerationDefaults,
    ModelRecord,
    TensorSpec,
)
from moec.artifacts.packing import DenseTensor, ExpertSource, PackingRecord, RecipeStep
from moec.artifacts.paths import DENSE_NAME, experts_name, program_name
from moec.artifacts.program import Call, LocalSpec, Operand, ProgramRecord, SegmentProgram
from moec.artifacts.schedule import Budgets
from moec.artifacts.steps import AttentionStep, ExpertsStep, SegmentStep
from moec.artifacts.traces import Traces, layer_trace
from moec.artifacts.words.interface import interface
from moec.planning.planner import plan_many

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from moec.artifacts.program import Source
    from moec.artifacts.schedule import Schedule

H, V, HEADS, D = 16, 24, 2, 8

CPU = MachineRecord(
    "cpu", None, 0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, False, 8 << 30, 20.0, 1.0, 2, 1.0, 0.0, "made up"
)
GPU = MachineRecord(
    "gpu",
    "Some GPU",
    8 << 30,
    256.0,
    1.0,
    30.0,
    0.0,
    16.0,
    1.0,
    False,
    16 << 30,
    60.0,
    1.0,
    8,
    3.0,
    2.0,
    "made up",
)


def tiny_model(layers: Sequence[tuple[int, int, int]] = ((8, 2, 8), (6, 2, 8))) -> ModelRecord:
    """A model of MoE layers given as (experts, top-k, intermediate size); each follows one attention."""
    state = TensorSpec("float32", ("T", H))
    heads = TensorSpec("float32", (1, "T", HEADS, D))
    values: dict[ValueId, TensorSpec] = {
        ValueId("tokens"): TensorSpec("int64", (1, "T")),
        ValueId("positions"): TensorSpec("int64", (1, "T")),
        ValueId("logits"): TensorSpec("float32", (1, "T", V)),
        ValueId("x"): state,
    }
    matrix = TensorSpec("float32", (H, H))
    embed = TensorSpec("float32", (V, H))
    functions = [FunctionSpec("embed", (values[ValueId("tokens")],), (embed,), (state,))]
    steps: list[Any] = [
        SegmentStep("segment", "embed", (ValueId("tokens"),), (TensorName("embed"),), (ValueId("x"),), False)
    ]
    before = ValueId("x")
    for number, (_, top_k, _) in enumerate(layers):
        routed = (TensorSpec("int64", ("T", top_k)), TensorSpec("float32", ("T", top_k)))
        outputs = (heads, heads, heads, *routed)
        names = tuple(ValueId(f"{name}{number}") for name in ("q", "k", "v", "index", "weight"))
        values |= dict(zip(names, outputs, strict=True))
        values |= {ValueId(f"attended{number}"): heads, ValueId(f"moe{number}"): state}
        if f"layer_{top_k}" not in [function.name for function in functions]:
            functions.append(FunctionSpec(f"layer_{top_k}", (state,), (matrix,), outputs))
        weight = (TensorName(f"layers.{number}"),)
        steps.append(SegmentStep("segment", f"layer_{top_k}", (before,), weight, names, False))
        attended = ValueId(f"attended{number}")
        query, key, value, index, weights = names
        steps.append(
            AttentionStep("attention", "attn", LayerId(number), query, key, value, None, None, attended)
        )
        after = ValueId(f"moe{number}")
        steps.append(ExpertsStep("experts", LayerId(number), before, index, weights, after))
        before = after
    functions.append(FunctionSpec("head", (state,), (embed,), (values[ValueId("logits")],)))
    steps.append(
        SegmentStep("segment", "head", (before,), (TensorName("embed"),), (ValueId("logits"),), False)
    )
    sizes = sorted({intermediate for _, _, intermediate in layers})
    activation = ("mul", ("silu", "gate"), "up")
    return ModelRecord(
        model_type="tiny",
        class_name="TinyForCausalLM",
        dtype="float32",
        vocab_size=V,
        hidden_size=H,
        max_context=128,
        values=values,
        functions=tuple(functions),
        attentions=(
            AttentionSpec("attn", HEADS, HEADS, D, D, 0.5, 0, 0, 0.0, False, False, "float32", None),
        ),
        states=(),
        bodies=tuple(
            ExpertBody(f"e{size}", H, size, True, False, False, activation, "float32") for size in sizes
        ),
        experts=tuple(
            ExpertsLayer(LayerId(number), f"layers.{number}.experts", f"e{size}", experts, top_k)
            for number, (experts, top_k, size) in enumerate(layers)
        ),
        steps=tuple(steps),
        last_step=len(steps) - 1,
        generation=GenerationDefaults(1, (2,), None, False, 1.0, 0, 1.0, 1.0),
    )


def tiny_program(model: ModelRecord) -> ProgramRecord:
    """One call for each function of ``model``, and a local that it uses."""
    segments = []
    for function in model.functions:
        groups: dict[Source, tuple[TensorSpec, ...]] = {
            "input": function.inputs,
            "weight": function.weights,
            "local": (TensorSpec("float32", ("T", H)),),
            "output": function.outputs,
        }
        operands = tuple(
            Operand(source, number, spec.dtype, spec.shape)
            for source, specs in groups.items()
            for number, spec in enumerate(specs)
        )
        outputs = operands[len(operands) - len(function.outputs) :]
        local = LocalSpec("float32", (1, "T", H))
        segments.append(SegmentProgram(function.name, (local,), (Call("loops", operands),), outputs))
    return ProgramRecord(tuple(segments), ())


def tiny_traces(model: ModelRecord, tokens: int = 40, seed: int = 0) -> Traces:
    """Traces where low-numbered experts are likelier; two sequences, each begun by a prompt."""
    random = np.random.default_rng(seed)
    layers = []
    for layer in model.experts:
        scores = random.gumbel(size=(tokens, layer.experts)) - 0.4 * np.arange(layer.experts)
        chosen = np.argsort(-scores, axis=1)[:, : layer.top_k]
        layers.append(layer_trace(layer.experts, chosen, random.random((tokens, layer.top_k))))
    return Traces(
        tuple(layers), np.array([0, tokens // 2], np.int64), np.arange(tokens) % (tokens // 2) < tokens // 4
    )


def write_dense(path: Path, tensors: dict[str, npt.NDArray[np.float32]]) -> None:
    """A safetensors file of float32 tensors, 64-byte aligned by filler tensors."""
    header: dict[str, Any] = {}
    data = b""
    for number, (name, tensor) in enumerate(tensors.items()):
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + tensor.nbytes],
        }
        data += tensor.tobytes()
        filler = -len(data) % 64
        if filler:
            header[f"moec.padding.{number}"] = {
                "dtype": "U8",
                "shape": [filler],
                "data_offsets": [len(data), len(data) + filler],
            }
            data += bytes(filler)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tiny_manifest() -> Manifest:
    """A manifest without its file table, as a compiler gives it to ``commit``."""
    files = ("modules/cpu/segments.so", program_name("cpu"))
    return Manifest(
        format_version=FORMAT_VERSION,
        contents="bundle",
        moec_version="0.1.0",
        tools={"apache-tvm": "0.27.0"},
        model_name="someone/tiny",
        fingerprint="ab" * 32,
        targets=(TargetRecord("cpu", "cpu", ("x86-64-v3",), ("avx2",), files, interface()),),
        tokenizer=TokenizerRecord(("tokenizer/tokenizer.json",), False),
        quantization="none",
        formats={"float32": 64},
        fit=None,
        checkpoint_types={"F32": 64},
        files={},
        manifest_sha256="",
    )


def fill_bundle(folder: Path, model: ModelRecord | None = None) -> None:
    """Write everything but the manifest below ``folder``."""
    model = model or tiny_model()
    for name in ("weights", "modules/cpu", "tokenizer", "profile"):
        (folder / name).mkdir(parents=True)
    traces = tiny_traces(model)
    budgets = [Budgets(0, 1 << 20, 64, 16), Budgets(1 << 19, 1 << 20, 64, 16)]
    write_record(model, folder / "model.json")
    write_record(tiny_packing(model), folder / "packing.json")
    write_record(plan_many(traces, model, [(CPU, budgets[0]), (GPU, budgets[1])]), folder / "schedule.json")
    save_traces(traces, folder / TRACES_NAME)
    random = np.random.default_rng(1)
    tensors = {f"layers.{layer.layer}": random.random((H, H), np.float32) for layer in model.experts}
    write_dense(folder / DENSE_NAME, {"embed": random.random((V, H), np.float32), **tensors})
    strides = {body.name: layout(body).stride_bytes for body in model.bodies}
    for layer in model.experts:
        data = random.integers(0, 256, layer.experts * strides[layer.body], np.uint8)
        (folder / experts_name(layer.layer)).write_bytes(data.tobytes())
    (folder / "modules/cpu/segments.so").write_bytes(b"\x7fELF machine code")
    write_record(tiny_program(model), folder / program_name("cpu"))
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("Do what you like.\n")


def tiny_packing(model: ModelRecord) -> PackingRecord:
    """A packing record with each kind of recipe argument."""
    arguments = ({"ref": 0}, 0, 1.5, None, True, ("a", (1, 2)))
    recipe = RecipeStep("aten.transpose.int", arguments)
    return PackingRecord(
        config_sha256="cd" * 32,
        parameter_dtypes={"model.embed": "float32"},
        dense=(DenseTensor(TensorName("embed"), "float32", (V, H), ("model.embed",), (recipe,)),),
        experts=tuple(
            ExpertSource(
                layer.layer,
                f"{layer.module}.gate_up_proj",
                f"{layer.module}.down_proj",
                None,
                None,
                False,
                True,
            )
            for layer in model.experts
        ),
    )


def make_bundle(output: Path, model: ModelRecord | None = None) -> Path:
    """Write a whole bundle to ``output``."""
    with BundleWriter(output) as writer:
        fill_bundle(writer.folder, model)
        writer.commit(tiny_manifest())
    return output


def streaming_bytes(model: ModelRecord, resident: Schedule) -> int:
    """What a GPU with all experts would have to hold besides, were they to stream as well."""
    return resident.device.total + 2 * footprint(model).working_set_bytes
