"""Tensors over memory that somebody else owns, on the CPU, on CUDA or on the simulated device.

torch takes foreign memory as a DLPack capsule: a pointer, a shape, and a deleter that runs when the last tensor over
it dies. The result is a plain tensor with a storage of its own that begins at the pointer, which is what re-pointing
needs: offsets count from there, `torch.save` writes that range only, and ties are found by storage as before a move.

The capsule is one that torch made itself, for an empty tensor, with its fields overwritten. So the deleter is torch's
own compiled one. A deleter in Python would lose the caller's exception when a tensor dies while one is on its way up.

Not covered: checking that the pointer is valid. The caller hands over whatever keeps the memory alive.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import lru_cache

import torch

# ``DLTensor`` of the DLPack C header, which a ``DLManagedTensor`` of ABI version 0 begins with: data, device type and
# index, rank, the dtype's code, bits and lanes, shape, strides, byte offset; padded as a C compiler does.
_FIELDS = struct.Struct("@PiiiBBHPPQ")
_Bytes = ctypes.c_uint8 * _FIELDS.size

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)

# DLPack's numbers. "Extension" is what torch reads as its PrivateUse1 device, whatever that was renamed to.
_CPU, _CUDA, _EXTENSION = 1, 2, 12
_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _BOOL = 0, 1, 2, 4, 5, 6
_CODES = {
    torch.float64: _FLOAT,
    torch.float32: _FLOAT,
    torch.float16: _FLOAT,
    torch.bfloat16: _BFLOAT,
    torch.int64: _INT,
    torch.int32: _INT,
    torch.int16: _INT,
    torch.int8: _INT,
    torch.uint8: _UINT,
    torch.complex64: _COMPLEX,
    torch.complex128: _COMPLEX,
    torch.bool: _BOOL,
}
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_HOST = torch.device("cpu")


_KINDS = {"cpu": _CPU, "cuda": _CUDA}


@lru_cache(maxsize=64)
def _place_of(device: torch.device) -> tuple[int, int]:
    return _KINDS.get(device.type, _EXTENSION), device.index or 0


@lru_cache(maxsize=4096)
def _lengths(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    """A shape or a stride as C has it; nobody writes into it. Models repeat the same few hundred."""
    return (ctypes.c_int64 * max(len(values), 1))(*values)


def alias(
    pointer: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, *, device: torch.device, keep: object
) -> torch.Tensor:
    """A tensor on `device` over the memory at `pointer`, which lives as long as `keep` does.

    Args:
        pointer: Address of the first element.
        size: The shape.
        stride: In elements, none negative.
        dtype: Of the elements.
        device: Where the memory is.
        keep: Held until the last tensor over the memory dies.
    """
    if dtype not in _CODES:
        # DLPack has no stable name for the narrow floats; a view of the same width does not touch the bytes.
        return alias(pointer, size, stride, _SAME_WIDTH[dtype.itemsize], device=device, keep=keep).view(dtype)
    carrier = torch.empty(0, dtype=torch.uint8, device=_HOST)
    # torch keeps the Python side of a storage, attributes included, for as long as the storage lives.
    carrier.untyped_storage().keep = keep  # type: ignore[attr-defined]
    capsule = torch._C._to_dlpack(carrier)
    # torch copies both while it takes the capsule.
    shape, strides = _lengths(tuple(size)), _lengths(tuple(stride))
    _FIELDS.pack_into(
        _Bytes.from_address(_capsule_pointer(capsule, b"dltensor")),
        0,
        pointer,
        *_place_of(device),
        len(size),
        *(_CODES[dtype], dtype.itemsize * 8, 1),
        *(ctypes.addressof(shape), ctypes.addressof(strides)),
        0,
    )
    return torch.utils.dlpack.from_dlpack(capsule)


def storage_over(memory: torch.Tensor, offset_bytes: int, size_bytes: int) -> torch.Tensor:
    """A flat uint8 tensor with a storage of its own over a range of `memory`, which it keeps alive.

    Args:
        memory: Flat uint8, on any device.
        offset_bytes: Where the range begins.
        size_bytes: Its length; 0 is allowed.

    Raises:
        ValueError: `memory` is not flat uint8, or the range is not inside it.
    """
    require_flat(memory, "memory")
    _require_inside(memory, offset_bytes, size_bytes)
    return _ordinary_alias(memory, offset_bytes, torch.uint8, (size_bytes,), (1,))


def view_over(
    memory: torch.Tensor, offset_bytes: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]
) -> torch.Tensor:
    """A tensor with a storage of its own, which begins with it and ends with its last element.

    The same as `storage_over` and a view of all of it, for a third of the time. For a tensor that is alone in its
    storage and begins there; of two tensors that share bytes each would get a storage, and they would be tied no more.

    Args:
        memory: Flat uint8, on any device, which the result keeps alive. Its bytes are not touched.
        offset_bytes: Where the tensor begins; a multiple of its item size.
        dtype: Of the elements.
        shape: The shape.
        stride: In elements, none negative.

    Raises:
        ValueError: `memory` is not flat uint8, the tensor is not inside, or it begins in the middle of an item.
    """
    require_flat(memory, "memory")
    item_bytes = dtype.itemsize
    size_bytes = 0
    if 0 not in shape:
        size_bytes = item_bytes
        for length, step in zip(shape, stride, strict=True):
            size_bytes += (length - 1) * step * item_bytes
    _require_inside(memory, offset_bytes, size_bytes)
    if (memory.data_ptr() + offset_bytes) % item_bytes:
        raise ValueError(
            f"byte {offset_bytes} is in the middle of an item of {dtype}, which has {item_bytes}; align the tensor"
        )
    return _ordinary_alias(memory, offset_bytes, dtype, shape, stride)


def _require_inside(memory: torch.Tensor, offset_bytes: int, size_bytes: int) -> None:
    if offset_bytes < 0 or size_bytes < 0 or offset_bytes + size_bytes > memory.numel():
        raise ValueError(
            f"bytes {offset_bytes} to {offset_bytes + size_bytes} are not inside the memory of {memory.numel()} bytes; "
            "ask for a range of the block"
        )


def _ordinary_alias(
    memory: torch.Tensor, offset_bytes: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int]
) -> torch.Tensor:
    # A tensor made in a caller's inference_mode could not be re-pointed at outside of it.
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return _ordinary_alias(memory, offset_bytes, dtype, shape, stride)
    return alias(memory.data_ptr() + offset_bytes, shape, stride, dtype, device=memory.device, keep=memory)


def host_alias(tensor: torch.Tensor) -> torch.Tensor:
    """The CPU tensor over the memory of a tensor whose memory the CPU can read, such as the simulated device's."""
    return alias(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, device=_HOST, keep=tensor)


def require_flat(memory: torch.Tensor, what: str) -> None:
    """Refuse anything but flat, contiguous uint8.

    Raises:
        ValueError: Says what was given.
    """
    if memory.dtype is not torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
        raise ValueError(
            f"{what} must be a flat contiguous uint8 tensor, got {memory.dtype} of shape {tuple(memory.shape)}; "
            "pass the block or one of its storages"
        )
