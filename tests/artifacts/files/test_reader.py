from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from moec.artifacts.files.manifest import FileRecord, render_manifest
from moec.artifacts.files.reader import open_bundle, open_modules, read_manifest
from moec.artifacts.files.writer import BundleWriter
from moec.artifacts.ids import LayerId, TensorName
from moec.artifacts.layout.experts import layout
from moec.errors import BundleError
from tests.support.edited_bundles import refuses, reseal
from tests.support.tiny_bundle import H, fill_bundle, make_bundle, tiny_manifest, tiny_model


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
        "import sys, moec.artifacts.files.reader, moec.artifacts.files.writer, moec.schemas;"
        "print([m for m in ('torch', 'transformers', 'tvm', 'jsonschema') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
