from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from moec.artifacts.experts import layout
from moec.artifacts.ids import LayerId, TensorName
from moec.artifacts.manifest import FileRecord, Manifest, render_manifest
from moec.artifacts.reader import open_bundle, open_modules, read_manifest
from moec.artifacts.records import parse_json
from moec.artifacts.verify import sha256_file
from moec.artifacts.writer import BundleWriter
from moec.errors import BundleError
from tests.support.tiny_bundle import H, fill_bundle, make_bundle, tiny_manifest, tiny_model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("pristine") / "tiny.moec")


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "tiny.moec"))


def reseal(folder: Path, **changes: Any) -> None:
    """Make the manifest fit the files again, as somebody would who edits a bundle on purpose."""
    manifest = Manifest(**vars(read_manifest(folder)))
    files = {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, sha256_file(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    changed = dataclasses.replace(manifest, files=files | changes.pop("files", {}), **changes)
    (folder / "manifest.json").write_bytes(render_manifest(changed))


def edit_json(path: Path, edit: Any) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    reseal(next(folder for folder in path.parents if (folder / "manifest.json").exists()))


def refuses(folder: Path, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert caught.value.what
    assert caught.value.why
    assert caught.value.do
    for word in words:
        assert word in str(caught.value)


def test_views_show_the_bytes_of_the_files(bundle: Path) -> None:
    opened = open_bundle(bundle)
    model = tiny_model()
    assert opened.model == model
    assert opened.manifest.targets[0] == opened.target("cpu")
    stride = layout(model.bodies[0]).stride_bytes
    raw = (bundle / "weights/experts-00001.bin").read_bytes()
    view = opened.expert_view(LayerId(1), 3)
    assert view.tobytes() == raw[3 * stride : 4 * stride]
    assert not view.flags.writeable
    assert view.ctypes.data % 4096 == 0
    dense = opened.dense_view(TensorName("layers.1"))
    assert dense.ctypes.data % 64 == 0
    assert opened.dense[TensorName("layers.1")].shape == (H, H)
    expected = safetensors.numpy.load_file(bundle / "weights/dense.safetensors")["layers.1"]
    np.testing.assert_array_equal(dense.view(np.float32).reshape(H, H), expected)
    traces = opened.traces()
    assert traces is not None
    assert traces.tokens == 40
    assert not any(name.startswith("moec.padding") for name in opened.dense)


def test_the_same_input_gives_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "again.moec")
    assert read_manifest(bundle) == read_manifest(other)
    assert (bundle / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()


def test_no_such_path(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "There is no bundle")


def test_not_a_bundle(tmp_path: Path) -> None:
    refuses(tmp_path, "is not a bundle")


def test_a_file_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuses(tmp_path / "file", "is not a bundle")


@pytest.mark.parametrize("name", ["model.json", "packing.json", "schedule.json", "weights/experts-00000.bin"])
def test_one_changed_byte(bundle: Path, name: str) -> None:
    path = bundle / name
    data = bytearray(path.read_bytes())
    for offset in {0, 1, len(data) // 3, len(data) // 2, len(data) - 1}:
        changed = data.copy()
        changed[offset] ^= 1
        path.write_bytes(changed)
        refuses(bundle, name, "SHA-256")
    path.write_bytes(data)
    open_bundle(bundle)


def test_one_changed_byte_in_every_file(bundle: Path) -> None:
    for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for offset in {0, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:offset] + bytes([data[offset] ^ 0x20]) + data[offset + 1 :])
            refuses(bundle)
        path.write_bytes(data + b"\n")
        refuses(bundle)
        path.write_bytes(data)
    open_bundle(bundle)


def test_every_byte_of_the_manifest_counts(bundle: Path) -> None:
    path = bundle / "manifest.json"
    data = path.read_bytes()
    for offset in range(len(data)):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
        with pytest.raises(BundleError):
            read_manifest(bundle)
    path.write_bytes(data)
    read_manifest(bundle)


def test_every_missing_file_is_noticed(bundle: Path, tmp_path: Path) -> None:
    aside = tmp_path / "aside"
    for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
        path.rename(aside)
        refuses(bundle, path.name)
        aside.rename(path)
    open_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["extra.json", "modules/cpu/other.so", ".hidden", "weights/experts-00002.bin"]
)
def test_an_added_file(bundle: Path, name: str) -> None:
    (bundle / name).write_text("x")
    refuses(bundle, name, "not in manifest.json")


@pytest.mark.parametrize("level", ["full", "sizes"])
def test_a_link_is_not_followed(bundle: Path, tmp_path: Path, level: Any) -> None:
    secret = tmp_path / "outside"
    shutil.copy(bundle / "LICENSE", secret)
    (bundle / "LICENSE").unlink()
    (bundle / "LICENSE").symlink_to(secret)
    with pytest.raises(BundleError, match="not a plain file"):
        open_bundle(bundle, verify=level)


def test_a_linked_folder_is_not_followed(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "modules", tmp_path / "modules")
    (bundle / "modules").symlink_to(tmp_path / "modules")
    refuses(bundle, "not a plain file")


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "a/../../b", "./a", "a//b", "", "manifest.json", "a\\b", "a\n"]
)
def test_paths_in_the_manifest_stay_inside(bundle: Path, path: str) -> None:
    manifest = read_manifest(bundle)
    changed = dataclasses.replace(manifest, files=manifest.files | {path: FileRecord(0, "0" * 64)})
    (bundle / "manifest.json").write_bytes(render_manifest(changed))
    refuses(bundle)


def test_a_newer_format(bundle: Path) -> None:
    reseal(bundle, format_version=2)
    refuses(bundle, "format 2", "newer moec")


def test_a_newer_format_is_named_even_if_it_has_other_keys(bundle: Path) -> None:
    (bundle / "manifest.json").write_text('{"format_version": 7, "novelty": []}')
    refuses(bundle, "format 7")


@pytest.mark.parametrize("name", ["model.json", "packing.json", "schedule.json", "modules/cpu/program.json"])
def test_an_unknown_key(bundle: Path, name: str) -> None:
    edit_json(bundle / name, lambda value: value.update(surprise=1))
    refuses(bundle, name, "surprise")


def test_an_unknown_key_deep_inside_is_located(bundle: Path) -> None:
    edit_json(bundle / "model.json", lambda value: value["steps"][1].update(surprise=1))
    refuses(bundle, "$.steps[1]", "surprise")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1, "a": 2}', "NaN", "[" * 100000])
def test_records_that_are_not_json_objects(bundle: Path, text: str) -> None:
    (bundle / "model.json").write_text(text)
    reseal(bundle)
    refuses(bundle, "model.json")


def test_a_doubled_key_is_not_json() -> None:
    with pytest.raises(BundleError, match="comes twice"):
        parse_json(b'{"a": {"b": 1, "b": 1}}', "x")


MODEL_EDITS = {
    "value": lambda model: model["steps"][1].update(inputs=["nothing"]),
    "function": lambda model: model["steps"][1].update(function="nothing"),
    "weight": lambda model: model["steps"][1].update(weights=["nothing"]),
    "0 weights": lambda model: model["steps"][1].update(weights=[]),
    "type or shape": lambda model: model["functions"][0]["weights"][0].update(dtype="float16"),
    "attention": lambda model: model["steps"][2].update(attention="nothing"),
    "operands": lambda model: model["steps"][2].update(value=None),
    "MoE layer": lambda model: model["steps"][3].update(layer=9),
    "expert body": lambda model: model["experts"][0].update(body="nothing"),
    "numbered": lambda model: model["experts"][1].update(layer=2),
    "bytes instead of": lambda model: model["experts"][0].update(experts=9),
    "steps": lambda model: model.update(last_step=99),
    "logits": lambda model: model["steps"].pop(),
    "again": lambda model: model["steps"][2].update(output="q0"),
    "two functions": lambda model: model["functions"].append(model["functions"][0]),
    "computed in float32": lambda model: model["values"]["q0"].update(dtype="bfloat16"),
    "chooses": lambda model: model["experts"][0].update(top_k=9),
}


@pytest.mark.parametrize("word", MODEL_EDITS)
def test_an_inconsistent_model(bundle: Path, word: str) -> None:
    edit_json(bundle / "model.json", MODEL_EDITS[word])
    if word == "bytes instead of":
        edit_json(bundle / "schedule.json", lambda record: widen(record["profile"]["layers"][0]))
    refuses(bundle, word)


def widen(profile: dict[str, Any]) -> None:
    profile["order"].append(8)
    profile["use_share"].append(0.0)
    profile["slot_value"].append(0.0)
    profile["transitions"].append([])


SCHEDULE_EDITS = {
    "slots": lambda record: record["schedules"][1]["layers"][0].update(slots=9),
    "seeds": lambda record: record["schedules"][1]["layers"][0].update(slots=1, seeds=2),
    "not for the MoE layers": lambda record: record["schedules"][1]["layers"].pop(),
    "routing profile": lambda record: record["profile"]["layers"].pop(),
    "rank": lambda record: (
        record["profile"]["layers"][0]["order"].reverse() or record["profile"]["layers"][0]["order"].append(0)
    ),
    "transition": lambda record: record["profile"]["layers"][0]["transitions"][0].append(6),
    "CPU share": lambda record: record["schedules"][0]["layers"][0]["cpu_share"].append(0),
    "prefill": lambda record: record["schedules"][0]["prefill"]["order"].append(0),
    "budget": lambda record: record["schedules"][0]["budgets"].update(host_memory_bytes=10),
}


@pytest.mark.parametrize("word", SCHEDULE_EDITS)
def test_an_inconsistent_schedule(bundle: Path, word: str) -> None:
    edit_json(bundle / "schedule.json", SCHEDULE_EDITS[word])
    refuses(bundle, "schedule.json", word)


def test_an_expert_file_of_the_wrong_size(bundle: Path) -> None:
    with (bundle / "weights/experts-00001.bin").open("ab") as file:
        file.write(bytes(4096))
    reseal(bundle)
    refuses(bundle, "experts-00001.bin has")


def test_a_target_that_names_a_file_that_is_not_listed(bundle: Path) -> None:
    targets = read_manifest(bundle).targets
    reseal(bundle, targets=(dataclasses.replace(targets[0], files=("modules/cpu/none.so",)),))
    refuses(bundle, "modules/cpu/none.so")


def test_a_target_without_a_program(bundle: Path) -> None:
    targets = read_manifest(bundle).targets
    reseal(bundle, targets=(dataclasses.replace(targets[0], files=("modules/cpu/segments.so",)),))
    refuses(bundle, "target cpu has no program.json")


def test_a_program_that_does_not_fit_the_model(bundle: Path) -> None:
    edit_json(bundle / "modules/cpu/program.json", lambda record: record["segments"].pop())
    refuses(bundle, "modules/cpu/program.json", "no segment head")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"not json",
        b"[]",
        b'{"embed": {}}',
        b'{"embed": {"dtype": "F32", "shape": [24, 16], "data_offsets": [0, 99999999]}}',
        b'{"embed": {"dtype": "F8", "shape": [24, 16], "data_offsets": [0, 64]}}',
        b'{"embed": {"dtype": "F32", "shape": [24, -16], "data_offsets": [0, 64]}}',
        b'{"embed": {"dtype": "F32", "shape": [24, 16], "data_offsets": [0, 64]}}',
        b'{"embed": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    ],
)
def test_a_damaged_table_of_dense_tensors(bundle: Path, header: bytes) -> None:
    path = bundle / "weights/dense.safetensors"
    data = path.read_bytes()[4096:]
    padded = header if not header else header + b" " * (4088 - len(header))
    path.write_bytes(len(padded).to_bytes(8, "little") + padded + data)
    reseal(bundle)
    refuses(bundle)


def test_sizes_only_does_not_read_weights_but_does_read_records(bundle: Path) -> None:
    weights = bundle / "weights/experts-00000.bin"
    data = bytearray(weights.read_bytes())
    data[5] ^= 1
    weights.write_bytes(data)
    open_bundle(bundle, verify="sizes")
    refuses(bundle)
    for name, old, new in (
        ("modules/cpu/program.json", "loops", "hoops"),
        ("model.json", "TinyFor", "TonyFor"),
    ):
        text = (bundle / name).read_text()
        (bundle / name).write_text(text.replace(old, new))
        with pytest.raises(BundleError, match=f"{name} was changed"):
            open_bundle(bundle, verify="sizes")
        (bundle / name).write_text(text)


def test_modules_are_not_a_bundle_and_the_other_way_round(tmp_path: Path, bundle: Path) -> None:
    with BundleWriter(tmp_path / "modules") as writer:
        fill_bundle(writer.folder)
        shutil.rmtree(writer.folder / "weights")
        (writer.folder / "schedule.json").unlink()
        writer.commit(dataclasses.replace(tiny_manifest(), contents="modules"))
    assert open_modules(tmp_path / "modules").model == tiny_model()
    refuses(tmp_path / "modules", "moec pack")
    with pytest.raises(BundleError, match="whole bundle"):
        open_modules(bundle)


def test_progress_counts_every_byte(bundle: Path) -> None:
    pieces: list[int] = []
    opened = open_bundle(bundle, progress=pieces.append)
    assert sum(pieces) == sum(record.size_bytes for record in opened.manifest.files.values())


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable(bundle: Path) -> None:
    (bundle / "model.json").chmod(0)
    refuses(bundle, "cannot be read")


def test_importing_artifacts_is_light() -> None:
    code = (
        "import sys, moec.artifacts.reader, moec.artifacts.writer, moec.schemas;"
        "print([m for m in ('torch', 'transformers', 'tvm', 'jsonschema') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
