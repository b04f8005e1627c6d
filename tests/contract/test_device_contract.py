"""What every device that holds copies must do, whatever it is made of."""

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from modelcache.dataplane.device import open_device
from modelcache.dataplane.device.alias import view_over
from modelcache.dataplane.device.protocol import Device
from modelcache.errors import DevicePoisonedError

MIB = 1 << 20


def the_simulated_device(memory):
    return open_device(
        "simulated", memory=memory, capacity_bytes=256 * MIB, link_bytes_per_s=None, rounding="512", poison=True
    )


def the_cuda_device(memory):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    if memory == "mapped":
        pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    return open_device("cuda:0", memory=memory)


def opened(*memories):
    return [
        param
        for memory in memories
        for param in (
            pytest.param((the_simulated_device, memory), id=f"simulated-{memory}"),
            pytest.param((the_cuda_device, memory), id=f"cuda-{memory}", marks=pytest.mark.gpu),
        )
    ]


@pytest.fixture(params=opened("allocated", "mapped"))
def device(request):
    make, memory = request.param
    device = make(memory)
    yield device
    device.close()


@pytest.fixture(params=opened("mapped"))
def mapping(request):
    make, memory = request.param
    device = make(memory)
    yield device
    device.close()


@pytest.fixture(params=opened("allocated"))
def allocating(request):
    make, memory = request.param
    device = make(memory)
    yield device
    device.close()


def pattern(size, seed=0):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def too_much(device: Device) -> int:
    return device.total_bytes() + MIB


def test_too_large_an_allocation_raises_out_of_memory_and_takes_nothing(device):
    before = device.allocated_bytes()
    with pytest.raises(torch.OutOfMemoryError):
        device.allocate(too_much(device))
    assert device.allocated_bytes() == before
    assert device.allocate(MIB).numel() == MIB


def test_copies_refuse_tensors_in_the_wrong_place_or_of_other_sizes(device):
    memory, block = device.allocate(1024), pattern(1024)
    for target, source in ((block, memory), (memory, memory), (memory[:512], block), (memory, block.view(torch.int32))):
        with pytest.raises(ValueError):
            device.copy_in(target, source)
    for target, source in ((memory, block), (block[:512], memory), (block.view(32, 32), memory)):
        with pytest.raises(ValueError):
            device.copy_out(target, source)


def test_a_storage_must_lie_inside_its_memory(device):
    memory = device.allocate(1024)
    for offset, size in ((-1, 10), (1000, 25), (0, 1025), (0, -1)):
        with pytest.raises(ValueError, match="not inside"):
            device.storage(memory, offset, size)
    with pytest.raises(ValueError, match="uint8"):
        device.storage(torch.zeros(4), 0, 4)


def test_a_closed_device_refuses_and_closing_twice_is_fine(device):
    memory, block = device.allocate(1024), pattern(1024)
    device.copy_in(memory, block).wait()
    device.close()
    device.close()
    with pytest.raises(RuntimeError, match="closed"):
        device.allocate(1)
    with pytest.raises(RuntimeError, match="closed"):
        device.copy_in(memory, block)
    assert torch.equal(memory.cpu(), block)


def test_without_kept_addresses_ranges_are_refused_in_words(allocating):
    assert not allocating.keeps_addresses
    memory = allocating.allocate(1024)
    for call in (lambda: allocating.reserve(1024), lambda: allocating.map(memory), lambda: allocating.unmap(memory)):
        with pytest.raises(RuntimeError, match="memory='mapped'"):
            call()


def test_mapping_is_refused_for_what_is_mapped_and_for_what_is_no_whole_range(mapping):
    memory = mapping.reserve(2 * MIB)
    mapping.map(memory)
    before = mapping.allocated_bytes()
    with pytest.raises(ValueError, match="mapped already"):
        mapping.map(memory)
    others = (memory[:MIB], memory[MIB:], mapping.allocate(2 * MIB), torch.zeros(2 * MIB, dtype=torch.uint8))
    for other in others:
        with pytest.raises(ValueError, match="not a whole range"):
            mapping.map(other)
        with pytest.raises(ValueError, match="not a whole range"):
            mapping.unmap(other)
    with pytest.raises(ValueError, match="uint8"):
        mapping.map(memory.view(torch.float32))
    del others, other
    assert mapping.allocated_bytes() == before
    mapping.copy_in(memory, pattern(2 * MIB)).wait()
    assert torch.equal(memory.cpu(), pattern(2 * MIB))


def test_mapping_more_than_there_is_takes_nothing(mapping):
    before = mapping.allocated_bytes()
    memory = mapping.reserve(too_much(mapping))
    with pytest.raises(torch.OutOfMemoryError):
        mapping.map(memory)
    assert mapping.allocated_bytes() == before
    mapping.unmap(memory)
    small = mapping.reserve(MIB)
    mapping.map(small)
    assert mapping.allocated_bytes() - before == mapping.charge_bytes(MIB)


def test_a_closed_device_maps_nothing_and_leaves_what_is_mapped(mapping):
    memory, idle = mapping.reserve(MIB), mapping.reserve(MIB)
    mapping.map(memory)
    mapping.copy_in(memory, pattern(MIB)).wait()
    mapping.close()
    for call in (lambda: mapping.map(idle), lambda: mapping.reserve(MIB)):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    assert torch.equal(memory.cpu(), pattern(MIB))
    mapping.unmap(memory)
    mapping.unmap(idle)


def test_it_says_where_resident_tensors_are(device):
    assert device.holds_copies
    assert str(device.torch_device) == device.name
    assert device.allocate(16).device == device.torch_device


def test_allocated_memory_is_flat_bytes_and_is_charged_until_its_last_tensor_dies(device):
    before, free = device.allocated_bytes(), device.free_bytes()
    memory = device.allocate(3 * MIB + 7)
    assert (memory.dtype, tuple(memory.shape)) == (torch.uint8, (3 * MIB + 7,))
    taken = device.allocated_bytes() - before
    assert 3 * MIB + 7 <= taken <= device.charge_bytes(3 * MIB + 7)
    assert device.free_bytes() <= free
    kept = device.storage(memory, 512, 1024)[3:7]
    del memory
    assert device.allocated_bytes() - before == taken
    del kept
    assert device.allocated_bytes() == before


def test_nothing_is_charged_for_nothing(device):
    before = device.allocated_bytes()
    assert device.charge_bytes(0) == 0
    memory = device.allocate(0)
    assert memory.numel() == 0
    assert device.allocated_bytes() == before
    device.copy_in(memory, torch.empty(0, dtype=torch.uint8)).wait()


def test_bytes_survive_the_way_in_and_out(device):
    block, back = pattern(5 * MIB + 3), torch.zeros(5 * MIB + 3, dtype=torch.uint8)
    memory = device.allocate(block.numel())
    device.copy_in(memory, block).wait()
    assert torch.equal(memory.cpu(), block)
    device.copy_out(back, memory).wait()
    assert torch.equal(back, block)


def test_copies_of_one_direction_land_in_order(device):
    memory = device.allocate(MIB)
    events = [device.copy_in(memory, pattern(MIB, seed)) for seed in range(20)]
    events[-1].wait()
    assert all(event.is_done() for event in events)
    assert torch.equal(memory.cpu(), pattern(MIB, 19))


def test_compute_waits_for_the_copies_it_was_told_to(device):
    block = torch.arange(MIB // 4, dtype=torch.float32)
    memory = device.allocate(MIB)
    values = memory.view(torch.float32)
    device.let_compute_wait(device.copy_in(memory, block.view(torch.uint8)))
    assert torch.equal((values * 2).cpu(), block * 2)


def test_copy_out_comes_behind_compute(device):
    memory = device.allocate(4 * MIB)
    values, back = memory.view(torch.float32), torch.empty(4 * MIB, dtype=torch.uint8)
    values.fill_(1.0)
    for _ in range(10):
        values.mul_(2.0)
    device.copy_out(back, memory).wait()
    assert torch.equal(back.view(torch.float32), torch.full((MIB,), 1024.0))


def test_settling_leaves_nothing_undone(device):
    memory = device.allocate(MIB)
    events = [device.copy_in(memory, pattern(MIB)) for _ in range(5)]
    device.settle()
    assert all(event.is_done() for event in events)


def test_a_copy_keeps_both_ends_alive(device):
    back = torch.zeros(MIB, dtype=torch.uint8)
    memory = device.allocate(MIB)
    device.copy_in(memory, pattern(MIB))
    event = device.copy_out(back, memory.clone())
    del memory
    gc.collect()
    event.wait()
    device.settle()


def test_a_landed_copy_keeps_nothing(device):
    before = device.allocated_bytes()
    event = device.copy_in(device.allocate(MIB), pattern(MIB))
    event.wait()
    assert device.allocated_bytes() == before


@pytest.mark.parametrize("on_device", [True, False])
def test_a_storage_begins_at_its_range_and_keeps_the_memory(device, on_device):
    block = pattern(4096)
    memory = device.allocate(4096) if on_device else block.clone()
    if on_device:
        device.copy_in(memory, block).wait()
    piece = device.storage(memory, 512, 1024)
    address = memory.data_ptr()
    del memory
    assert piece.device.type == (device.torch_device.type if on_device else "cpu")
    assert piece.data_ptr() == piece.untyped_storage().data_ptr() == address + 512
    assert piece.untyped_storage().nbytes() == 1024
    assert piece.storage_offset() == 0
    view = piece.view(torch.int16).as_strided((4, 5), (1, 8), 2)
    assert view.untyped_storage()._cdata == piece.untyped_storage()._cdata
    assert torch.equal(view.cpu(), block[512:1536].clone().view(torch.int16).as_strided((4, 5), (1, 8), 2))


def test_writes_through_a_storage_are_seen_in_the_memory(device):
    memory = device.allocate(2048)
    memory.zero_()
    device.storage(memory, 1024, 16).view(torch.float32).fill_(1.0)
    assert torch.equal(memory.cpu()[1024:1040].view(torch.float32), torch.ones(4))
    assert int(memory.cpu().count_nonzero()) == 8


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn],
)
def test_parameters_point_at_device_and_ram_in_turn(device, dtype):
    block = torch.ones(8).to(dtype)
    memory = device.allocate(64)
    weight = torch.nn.Parameter(block.clone(), requires_grad=False)
    identity = id(weight)
    for _ in range(3):
        weight.data = device.storage(memory, 0, block.nbytes).view(dtype)
        assert weight.device == device.torch_device
        weight.data.copy_(block)
        weight.data = device.storage(block.view(torch.uint8), 0, block.nbytes).view(dtype)
        assert weight.device.type == "cpu"
    assert (type(weight), id(weight)) == (torch.nn.Parameter, identity)
    assert torch.equal(memory.cpu()[: block.nbytes], block.view(torch.uint8))


def test_memory_made_inside_inference_mode_is_ordinary(device):
    with torch.inference_mode():
        memory = device.allocate(64)
        piece = device.storage(memory, 0, 64)
        device.copy_in(memory, pattern(64)).wait()
    assert not memory.is_inference()
    assert not piece.is_inference()
    weight = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    weight.data = piece.view(torch.float32)[:4]
    weight.add_(1.0)


def test_page_locked_memory_copies_and_is_let_go(device):
    block, memory = pattern(MIB), device.allocate(MIB)
    assert device.page_lock(block)
    device.copy_in(memory, block).wait()
    assert torch.equal(memory.cpu(), block)
    device.page_unlock(block)
    device.page_unlock(block)


def test_page_locking_is_refused_without_a_trace(device):
    block = pattern(MIB)
    assert not device.page_lock(block[:0])
    assert device.page_lock(block)
    assert not device.page_lock(block)
    assert torch.equal((device.allocate(4).fill_(1) + 1).cpu(), torch.full((4,), 2, dtype=torch.uint8))
    device.page_unlock(block)


def test_cached_memory_can_be_given_back(device):
    before = device.allocated_bytes()
    device.allocate(32 * MIB)
    device.release_cached()
    assert device.allocated_bytes() == before


def test_many_threads_allocate_copy_and_compute_at_once(device):
    before, failures = device.allocated_bytes(), []

    def work(seed):
        try:
            for turn in range(10):
                block, back = pattern(64 * 1024, seed + turn), torch.empty(64 * 1024, dtype=torch.uint8)
                memory = device.allocate(block.numel())
                device.let_compute_wait(device.copy_in(memory, block))
                memory.add_(1)
                device.copy_out(back, memory).wait()
                assert torch.equal(back, block + 1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed * 100,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    device.settle()
    assert failures == []
    assert device.allocated_bytes() == before


# --- kept addresses ---


def test_a_range_charges_nothing_until_memory_is_mapped_and_nothing_again_after(mapping):
    assert mapping.keeps_addresses
    before = mapping.allocated_bytes()
    memory = mapping.reserve(3 * MIB + 7)
    assert (memory.dtype, tuple(memory.shape), memory.device) == (torch.uint8, (3 * MIB + 7,), mapping.torch_device)
    assert mapping.allocated_bytes() == before
    for _ in range(3):
        mapping.map(memory)
        assert mapping.allocated_bytes() - before == mapping.charge_bytes(3 * MIB + 7) >= 3 * MIB + 7
        mapping.unmap(memory)
        assert mapping.allocated_bytes() == before


def test_views_made_before_mapping_stay_where_they_are_and_read_what_was_copied_in(mapping):
    memory = mapping.reserve(4 * MIB)
    piece = mapping.storage(memory, 512, 4096)
    view = view_over(memory, 512, torch.int16, (16, 128), (128, 1))
    weight = torch.nn.Parameter(torch.zeros(0), requires_grad=False)
    weight.data = piece.view(torch.float32)
    addresses = [tensor.data_ptr() for tensor in (memory, piece, view, weight)]
    for seed in range(4):
        block = pattern(4 * MIB, seed)
        mapping.map(memory)
        mapping.copy_in(memory, block).wait()
        assert torch.equal(piece.cpu(), block[512:4608])
        assert torch.equal(view.cpu(), block[512:4608].view(torch.int16).view(16, 128))
        view.add_(1)
        weight.data.view(torch.uint8)[-1:] = 77
        mapping.settle()
        assert int(memory[4607].item()) == 77
        mapping.settle()
        mapping.unmap(memory)
    assert [tensor.data_ptr() for tensor in (memory, piece, view, weight)] == addresses


def test_ranges_take_turns_with_the_same_memory(mapping):
    before = mapping.allocated_bytes()
    sizes = [40 * MIB, 64 * MIB, 24 * MIB + 512, 128 * MIB, 6 * MIB]
    ranges = [mapping.reserve(size) for size in sizes]
    for turn in range(6):
        chosen = [ranges[turn % 5], ranges[(turn + 1) % 5]]
        for seed, memory in enumerate(chosen):
            mapping.map(memory)
            mapping.copy_in(memory[: 2 * MIB], pattern(2 * MIB, turn + seed)).wait()
            mapping.copy_in(memory[-MIB:], pattern(MIB, turn + seed + 50)).wait()
        for seed, memory in enumerate(chosen):
            assert torch.equal(memory[: 2 * MIB].cpu(), pattern(2 * MIB, turn + seed))
            assert torch.equal(memory[-MIB:].cpu(), pattern(MIB, turn + seed + 50))
        mapping.settle()
        for memory in chosen:
            mapping.unmap(memory)
    assert mapping.allocated_bytes() == before


def test_unmapping_is_idempotent(mapping):
    memory = mapping.reserve(MIB)
    before = mapping.allocated_bytes()
    mapping.unmap(memory)
    mapping.map(memory)
    for _ in range(3):
        mapping.unmap(memory)
    assert mapping.allocated_bytes() == before


def test_a_range_lives_as_long_as_a_view_of_it_and_takes_its_memory_along(mapping):
    before = mapping.allocated_bytes()
    memory = mapping.reserve(2 * MIB)
    mapping.map(memory)
    mapping.copy_in(memory, pattern(2 * MIB)).wait()
    view = view_over(memory, MIB, torch.float32, (4,), (1,))
    address = memory.data_ptr()
    del memory
    gc.collect()
    assert view.data_ptr() == address + MIB
    assert torch.equal(view.view(torch.uint8).cpu(), pattern(2 * MIB)[MIB : MIB + 16])
    assert mapping.allocated_bytes() - before == mapping.charge_bytes(2 * MIB)
    del view
    gc.collect()
    assert mapping.allocated_bytes() == before


def test_an_empty_range_maps_to_nothing(mapping):
    before = mapping.allocated_bytes()
    memory = mapping.reserve(0)
    mapping.map(memory)
    assert (memory.numel(), mapping.allocated_bytes()) == (0, before)
    mapping.copy_in(memory, torch.empty(0, dtype=torch.uint8)).wait()
    mapping.unmap(memory)


def test_ranges_made_inside_inference_mode_are_ordinary(mapping):
    with torch.inference_mode():
        memory = mapping.reserve(64)
        mapping.map(memory)
        view = view_over(memory, 0, torch.float32, (4,), (1,))
    assert not memory.is_inference()
    assert not view.is_inference()


def test_many_threads_map_copy_and_unmap_at_once(mapping):
    before, failures = mapping.allocated_bytes(), []

    def work(seed):
        try:
            memory = mapping.reserve(64 * 1024)
            for turn in range(10):
                block, back = pattern(64 * 1024, seed + turn), torch.empty(64 * 1024, dtype=torch.uint8)
                mapping.map(memory)
                mapping.let_compute_wait(mapping.copy_in(memory, block))
                memory.add_(1)
                mapping.copy_out(back, memory).wait()
                assert torch.equal(back, block + 1)
                mapping.unmap(memory)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed * 100,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mapping.settle()
    gc.collect()
    assert failures == []
    assert mapping.allocated_bytes() == before


@pytest.mark.parametrize("state", ["never mapped", "unmapped again"])
@pytest.mark.parametrize("access", ["read", "write", "view", "copy"])
def test_access_without_memory_costs_the_device(state, access):
    device = the_simulated_device("mapped")
    refuse_access(device, state, access)


@pytest.mark.gpu
def test_access_without_memory_costs_the_cuda_device():
    the_cuda_device("mapped").close()  # or skipped
    # In a process of its own: the context is lost to it.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_device_contract as suite\n"
        "suite.refuse_access(suite.the_cuda_device('mapped'), 'unmapped again', 'write')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def refuse_access(device, state, access):
    memory, block = device.reserve(2 * MIB), pattern(2 * MIB)
    if state == "unmapped again":
        device.map(memory)
        device.copy_in(memory, block).wait()
        device.settle()
        device.unmap(memory)
    view = view_over(memory, MIB, torch.float32, (4,), (1,))
    with pytest.raises((torch.AcceleratorError, DevicePoisonedError), match="illegal memory access"):
        if access == "read":
            memory[5].item()
        elif access == "write":
            memory.fill_(1)
            device.settle()
        elif access == "view":
            (view + 1).cpu()
        else:
            device.copy_in(memory, block).wait()
    for call in (device.settle, lambda: device.map(memory), lambda: device.allocate(1)):
        with pytest.raises(DevicePoisonedError, match="illegal memory access"):
            call()
    device.unmap(memory)
    device.close()
