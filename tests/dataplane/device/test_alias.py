"""Tensors over memory that somebody else owns."""

import gc
import weakref

import pytest
import torch

from modelcache.dataplane.device.alias import storage_over, view_over
from modelcache.dataplane.device.simulated import SimulatedDevice

DTYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.uint8, torch.bool),
    *(torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
]


@pytest.fixture(params=["cpu", "sim", "sim mapped", pytest.param("cuda", marks=pytest.mark.gpu)])
def memory(request):
    """4 KiB that hold 0, 1, 2, ... 250, 0, ..."""
    content = (torch.arange(4096) % 251).to(torch.uint8)
    if request.param == "cpu":
        yield content
        return
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device on this machine")
        yield content.to("cuda:0")
        return
    kind = "mapped" if "mapped" in request.param else "allocated"
    device = SimulatedDevice(4 << 20, link_bytes_per_s=None, memory=kind)
    if kind == "mapped":
        memory = device.reserve(4096)
        device.map(memory)
    else:
        memory = device.allocate(4096)
    memory.copy_(content)
    yield memory
    del memory
    device.close()


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "match"),
    [
        (-4, (1,), (1,), "not inside"),
        (4096, (1,), (1,), "not inside"),
        (0, (1025,), (1,), "not inside"),
        (0, (2, 2), (1024, 1), "not inside"),
        (2, (4,), (1,), "middle of an item"),
    ],
)
def test_a_view_that_does_not_fit_is_refused(memory, offset, shape, stride, match):
    with pytest.raises(ValueError, match=match):
        view_over(memory, offset, torch.float32, shape, stride)


def test_a_view_of_memory_that_is_not_flat_bytes_is_refused(memory):
    for wrong in (memory.view(64, 64), memory.view(torch.int32), memory[::2]):
        with pytest.raises(ValueError, match="flat contiguous uint8"):
            view_over(wrong, 0, torch.uint8, (4,), (1,))
    with pytest.raises(ValueError, match="shorter|argument 2"):
        view_over(memory, 0, torch.uint8, (2, 2), (1,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "stride"),
    [((3, 5), (5, 1)), ((3, 5), (1, 3)), ((2, 3, 2), (6, 1, 3)), ((), ()), ((7,), (1,)), ((1, 4), (99, 1))],
)
def test_a_view_is_the_view_of_its_whole_storage_with_one_of_its_own(memory, dtype, shape, stride):
    if dtype is torch.bool:
        memory.bitwise_and_(1)
    view = view_over(memory, 512, dtype, shape, stride)
    size = torch.Size(shape).numel() * dtype.itemsize
    long = storage_over(memory, 512, size).view(dtype).as_strided(shape, stride)
    assert (view.dtype, view.shape, view.stride(), view.device) == (dtype, long.shape, long.stride(), memory.device)
    assert view.storage_offset() == 0
    assert view.data_ptr() == view.untyped_storage().data_ptr() == memory.data_ptr() + 512
    assert view.untyped_storage().nbytes() == size
    raw = memory.cpu()[512 : 512 + size]
    expected = raw.clone().view(dtype).as_strided(shape, stride)
    assert torch.equal(view.cpu().flatten().view(torch.uint8), expected.flatten().view(torch.uint8))


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_an_empty_view_may_lie_at_the_end(memory, shape):
    view = view_over(memory, 4096, torch.float32, shape, (1,) * len(shape))
    assert (view.numel(), view.untyped_storage().nbytes(), tuple(view.shape)) == (0, 0, shape)


def test_a_view_keeps_the_memory_and_nothing_longer():
    class Kept(torch.Tensor):
        pass

    memory = torch.zeros(64, dtype=torch.uint8).as_subclass(Kept)
    alive = weakref.ref(memory)
    view = view_over(memory, 8, torch.float32, (2,), (1,))
    del memory
    gc.collect()
    assert alive() is not None
    part = view[1:]
    del view
    gc.collect()
    assert alive() is not None
    assert part.tolist() == [0.0]
    del part
    gc.collect()
    assert alive() is None


def test_a_parameter_points_at_a_view_made_in_inference_mode(memory):
    with torch.inference_mode():
        view = view_over(memory, 0, torch.float32, (2, 2), (2, 1))
    weight = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    weight.data = view
    weight.fill_(2.0)
    assert torch.equal(memory[:16].cpu().view(torch.float32), torch.full((4,), 2.0))
