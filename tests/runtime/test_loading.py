from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.artifacts.files.manifest import TargetRecord
from moec.artifacts.words.interface import interface
from moec.errors import BundleError, DeviceError, RequestError
from moec.runtime import load
from moec.runtime.machine.libraries import (
    choose_cpu_target,
    host_cpu_features,
    load_libraries,
    load_runtime,
)
from moec.runtime.tensors import aligned_empty, tensor_at, tensor_of


def in_new_process(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


HEAVY = "('torch', 'transformers', 'tvm', 'onnx')"


def test_importing_the_runtime_loads_little() -> None:
    code = f"""
import sys, moec.runtime
print([name for name in {HEAVY} + ('tvm_ffi', 'tokenizers', 'jinja2', 'jsonschema') if name in sys.modules])
print(sum(name.split('.')[0] not in sys.stdlib_module_names for name in sys.modules))
"""
    names, count = in_new_process(code).splitlines()
    assert names == "[]"
    assert int(count) < 250


def test_loading_tvms_runtime_imports_neither_tvm_nor_torch() -> None:
    code = f"""
import sys
from moec.runtime.machine.libraries import load_runtime
load_runtime(1)
print([name for name in {HEAVY} if name in sys.modules])
import torch
print(torch.ones(2).sum().item())
"""
    assert in_new_process(code).splitlines() == ["[]", "2.0"]


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"device": "cuda:x"}, DeviceError, "no device 'cuda:x'"),
        ({"device": "abacus"}, DeviceError, "no device 'abacus'"),
        ({"device": None}, DeviceError, "no device None"),
        ({"device_memory": "8GiB"}, DeviceError, "device_memory"),
        ({"copy_thread": True}, DeviceError, "copy_thread"),
        ({"verify": "none"}, RequestError, "full, once, sizes"),
        ({"prefetch": "yes"}, RequestError, "prefetch='yes'"),
        ({"trace_capacity": 0}, RequestError, "trace_capacity=0"),
        ({"host_memory": "150%"}, RequestError, "host_memory='150%'"),
        ({"host_memory": "much"}, RequestError, "host_memory='much'"),
        ({"max_batch": 0}, RequestError, "max_batch=0"),
        ({"max_batch": 8, "max_step_tokens": 8}, RequestError, "at least 9"),
        ({"cpu_threads": 0}, RequestError, "cpu_threads=0"),
        ({"cpu_threads": 10**20}, RequestError, "1 to 4096"),
        ({"cache_tokens": 0}, RequestError, "cache_tokens=0"),
        ({}, BundleError, "no bundle"),
    ],
)
def test_options_are_checked_before_anything_is_read(options: dict[str, Any], error: Any, why: str) -> None:
    with pytest.raises(error, match=why):
        load("/nowhere", **options)


def target(name: str, *features: str, kind: Any = "cpu") -> TargetRecord:
    return TargetRecord(name, kind, (), features, (), interface())


def test_a_target_of_another_moec_is_refused() -> None:
    older = dataclasses.replace(target("cpu", "sse"), interface="0123456789abcdef")
    with pytest.raises(BundleError, match=r"cpu was compiled by another moec (.|\n)*0123456789abcdef"):
        choose_cpu_target((older,), frozenset({"sse"}))


def test_the_target_that_uses_most_of_this_cpu_is_chosen() -> None:
    targets = (target("old", "sse"), target("new", "sse", "avx512f"), target("mid", "sse", "avx2"))
    assert choose_cpu_target(targets, frozenset({"sse", "avx2"})).name == "mid"
    assert choose_cpu_target(targets, frozenset({"sse", "avx2", "avx512f"})).name == "new"


def test_a_cpu_that_lacks_instructions_is_told_which() -> None:
    with pytest.raises(DeviceError, match="new needs avx512f"):
        choose_cpu_target((target("new", "sse", "avx512f"),), frozenset({"sse"}))
    with pytest.raises(DeviceError, match="no module for a CPU"):
        choose_cpu_target((target("gpu", kind="cuda"),), frozenset())


def test_the_features_of_this_machine_are_known() -> None:
    assert len(host_cpu_features()) > 5


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "int32", "bool"])
def test_views_reach_the_same_memory(dtype: str) -> None:
    load_runtime(1)
    array = aligned_empty((3, 5), dtype)
    array[...] = np.arange(15).reshape(3, 5)
    tensor = tensor_of(array)
    assert (tensor.shape, str(tensor.dtype)) == ((3, 5), dtype)
    view: Any = np.from_dlpack(tensor)
    np.testing.assert_array_equal(view, array)
    array[1, 2] = 1
    assert view[1, 2] == 1


def test_views_of_bfloat16_say_so() -> None:
    array = aligned_empty((3, 5), np.uint16)
    tensor = tensor_at(array.ctypes.data, "bfloat16", (3, 5))
    assert (tensor.shape, str(tensor.dtype)) == ((3, 5), "bfloat16")
    assert tensor.data_ptr() == array.ctypes.data


ANSWERS = """
#include <cstdint>
struct Value { int32_t kind, nothing; int64_t number; };
extern "C" int __tvm_ffi_answer(void*, const Value*, int32_t, Value* result) {
  result->kind = 1;
  result->number = NUMBER;
  return 0;
}
"""


def test_a_library_that_was_replaced_is_not_met_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was compiled again where another one is, or was, loaded from.

    The system's linker goes by names: it would answer with the one that it has. Nor may copies need a folder for
    temporary files from which code may run.
    """
    load_runtime(1)
    if Path("/dev/shm").is_dir():
        monkeypatch.setattr("tempfile.tempdir", "/dev/shm")
    kept = []
    for number in range(3):
        made = tmp_path / f"{number}.so"
        command = ["g++", "-x", "c++", "-", f"-DNUMBER={number}", "-shared", "-fPIC", "-o", str(made)]
        subprocess.run(command, check=True, input=ANSWERS.encode())
        made.rename(tmp_path / "model.so")
        kept.append(load_libraries(tmp_path, ["model.so", "program.json"]).get("answer"))
    assert [answer() for answer in kept] == [0, 1, 2]
    kept.append(load_libraries(tmp_path, ["model.so"]).get("answer"))
    assert kept.pop()() == 2
    kept.clear()
    assert "model.so" not in Path("/proc/self/maps").read_text(), "it leaves with its last function"
