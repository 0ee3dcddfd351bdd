"""Files of torch.save: tensors are read in place, and nothing that a pickle asks for is run."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moec.compiler.checkpoint import open_checkpoint
from moec.compiler.checkpoint.pickle_header import read_pickled_header
from moec.compiler.packing.tensors.reading import FileSource, TensorReader
from moec.compiler.packing.tensors.stored import stored_tensors
from moec.errors import CheckpointError
from tests.support.tiny_models import save

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool)


def read(path: Path, name: str) -> bytes:
    entry = read_pickled_header(path)[name]
    return path.read_bytes()[entry.begin : entry.end]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_are_where_it_says(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    tensors = {str(dtype): torch.randn(3, 5).mul(9).to(dtype) for dtype in DTYPES}
    shared = torch.randn(10, 4)
    tensors |= {"whole": shared, "rows": shared[3:7], "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}
    torch.save(OrderedDict(tensors) | {"parameter": torch.nn.Parameter(shared[:2])}, path)
    found = read_pickled_header(path)
    for name, tensor in {**tensors, "parameter": shared[:2]}.items():
        assert found[name].shape == tuple(tensor.shape)
        assert read(path, name) == raw(tensor), name
    assert (found["torch.bfloat16"].dtype, found["torch.bool"].dtype) == ("BF16", "BOOL")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_of_pickles_reads_as_one_of_safetensors(sharded: bool, tmp_path: Path) -> None:
    folder = save("grok-1", tmp_path, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if sharded:
        names = sorted(tensors)
        halves = {"pytorch_model-00001.bin": names[::2], "pytorch_model-00002.bin": names[1::2]}
        for file, part in halves.items():
            torch.save({name: tensors[name].clone() for name in part}, folder / file)
        weight_map = {name: file for file, part in halves.items() for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    checkpoint = open_checkpoint(folder)
    stored = stored_tensors(checkpoint.index, checkpoint.config)
    assert set(stored) == set(tensors)
    reader = TensorReader(FileSource())
    for name, tensor in tensors.items():
        assert torch.equal(reader.whole(stored[name], torch.bfloat16), tensor)


class _Runs:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    path, touched = tmp_path / "pytorch_model.bin", tmp_path / "touched"
    torch.save({"a": torch.zeros(2), "b": _Runs(touched)}, path)
    with pytest.raises(CheckpointError, match="has no place in a dict of tensors"):
        read_pickled_header(path)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([torch.zeros(1)], "does not hold a dict"),
        ({"a": 3}, "entry 'a' is no tensor"),
        ({3: torch.zeros(1)}, "entry 3 is no tensor"),
        ({"a": torch.zeros(3, 4).T}, "Tensor a does not lie row by row"),
        ({"a": torch.zeros(4).to_sparse()}, "has no place"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_is_no_dict_of_plain_tensors_is_refused(value: Any, why: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=why):
        read_pickled_header(tmp_path / "pytorch_model.bin")


def test_an_older_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"torch 1\.6 and later") as caught:
        read_pickled_header(path)
    assert "save_pretrained" in caught.value.do


@pytest.mark.parametrize("kept", [0, 10, 400, -1])
def test_truncated(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(200)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        read_pickled_header(path)


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({"x/data.pkl": pickle.dumps({}), "y/data.pkl": b""}, "no data.pkl"),
        ({"x/data.pkl": pickle.dumps({}), "x/byteorder": b"big"}, "big-endian"),
        ({"x/data.pkl": b"\x80\x02garbage"}, "description cannot be read"),
    ],
)
def test_archives_that_are_none_of_torch(members: dict[str, bytes], why: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match=why):
        read_pickled_header(path)


def test_bytes_that_are_missing_or_compressed(tmp_path: Path) -> None:
    whole, other = tmp_path / "whole.bin", tmp_path / "other.bin"
    torch.save({"a": torch.zeros(50)}, whole)
    for compression, leave_out, why in (
        (zipfile.ZIP_DEFLATED, False, "is compressed"),
        (zipfile.ZIP_STORED, True, "bytes of a are missing"),
    ):
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(other, "w", compression) as target:
            for name in source.namelist():
                if not (leave_out and "/data/" in name):
                    target.writestr(name, source.read(name))
        with pytest.raises(CheckpointError, match=why):
            read_pickled_header(other)
