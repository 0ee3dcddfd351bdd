"""Memory that kernels read: aligned buffers, and DLPack views of raw addresses.

Weights and the cache may be bfloat16, which numpy does not have; the values between steps never are. Kernels use
aligned vector loads, so every buffer starts at a multiple of 64 bytes. A view does not own its memory: whoever
makes one keeps the buffer alive.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

ALIGNMENT_BYTES = 64

CPU = (1, 0)
"""DLPack's type of the device, and its number."""

_DLPACK_TYPES = {
    "int64": (0, 64),
    "int32": (0, 32),
    "float32": (2, 32),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "uint8": (1, 8),
    "bool": (6, 8),
}


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An uninitialised C-contiguous array that starts at a multiple of 64 bytes."""
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    raw = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + size].view(kind).reshape(shape)


def aligned_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Like `aligned_empty`, zeroed."""
    array = aligned_empty(shape, dtype)
    array[...] = 0
    return array


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = (ctypes.c_size_t,)
_FREE = ctypes.cast(_libc.free, ctypes.c_void_p).value
"""A descriptor is one block of ``malloc``, so that ``free`` is its deleter: a Python function could be gone by the
time the last tensors are dropped, when the interpreter ends."""

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def tensor_at(address: int, dtype: str, shape: tuple[int, ...], device: tuple[int, int] = CPU) -> Any:
    """A ``tvm_ffi.Tensor`` over contiguous memory at ``address``; no copy, no ownership.

    ``device`` is DLPack's type of the device that has the memory, and its number.
    """
    import tvm_ffi

    assert address % ALIGNMENT_BYTES == 0, f"tensor at {address:#x} is not {ALIGNMENT_BYTES}-byte aligned"
    code, bits = _DLPACK_TYPES[dtype]
    ndim = len(shape)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(ndim)]
    head = ctypes.sizeof(_DLManagedTensor)
    block = _libc.malloc(head + 16 * ndim)
    numbers = (ctypes.c_int64 * (2 * ndim)).from_address(block + head)
    numbers[:] = [*shape, *strides]
    managed = _DLManagedTensor.from_address(block)
    managed.tensor = _DLTensor(
        address, *device, ndim, code, bits, 1, block + head, block + head + 8 * ndim, 0
    )
    managed.context, managed.deleter = None, _FREE
    return tvm_ffi.from_dlpack(_new_capsule(block, b"dltensor", None))


def tensor_of(array: NDArray[Any]) -> Any:
    """A view of a contiguous numpy array."""
    assert array.flags.c_contiguous
    return tensor_at(array.ctypes.data, str(array.dtype), array.shape)


def array_at(address: int, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """A numpy array over contiguous memory at ``address``; no copy, no ownership."""
    kind = np.dtype(dtype)
    memory = (ctypes.c_uint8 * (math.prod(shape) * kind.itemsize)).from_address(address)
    return np.frombuffer(memoryview(memory), kind).reshape(shape)
