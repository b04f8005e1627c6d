"""What of the CUDA device can be checked without one."""

import pickle

import pytest
import torch

from modelcache.dataplane.device.cuda import segment_bytes
from modelcache.dataplane.device.cuda_errors import CudaPoison, is_sticky
from modelcache.errors import DevicePoisonedError

MIB = 1 << 20


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: device-side assert triggered",
        "CUDA error: unspecified launch failure",
        "CUDA error: misaligned address",
        "CUDA error: an illegal instruction was encountered",
        "CUDA error: uncorrectable ECC error encountered",
    ],
)
def test_errors_that_cost_the_context_are_known_by_their_words(words):
    assert is_sticky(torch.AcceleratorError(words))
    assert is_sticky(RuntimeError(words))


def test_errors_that_cost_the_context_are_known_by_their_code():
    error = torch.AcceleratorError("CUDA error")
    error.error_code = 700
    assert is_sticky(error)
    error.error_code = 2
    assert not is_sticky(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory after an illegal memory access"),
        RuntimeError("CUDA error: invalid argument"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("an illegal memory access was encountered"),
    ],
)
def test_other_errors_leave_the_device_usable(error):
    assert not is_sticky(error)
    poison = CudaPoison("cuda:0")
    with pytest.raises(type(error)), poison.watch():
        raise error
    with poison.watch():
        pass


def test_a_sticky_error_is_reported_then_and_ever_after():
    poison = CudaPoison("cuda:0")
    with pytest.raises(DevicePoisonedError, match="device-side assert") as first, poison.watch():
        raise RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")
    assert isinstance(first.value.__cause__, RuntimeError)
    with pytest.raises(DevicePoisonedError, match="device-side assert"), poison.watch():
        raise AssertionError("never reached")
    assert str(pickle.loads(pickle.dumps(first.value))) == str(first.value)


@pytest.mark.parametrize(
    ("size", "charge"),
    [
        (0, 0),
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 1, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (64 * MIB, 64 * MIB),
        (64 * MIB + 1, 66 * MIB),
    ],
)
def test_an_allocation_is_charged_the_segment_it_may_cost(size, charge):
    assert segment_bytes(size) == charge
