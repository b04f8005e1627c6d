"""Mapped memory of the simulated device: pages that move, accounts, and what traps."""

import contextlib
import ctypes
import errno
import gc
import random
import subprocess
import sys

import psutil
import pytest
import torch

from modelcache.dataplane.device import simulated_pages
from modelcache.dataplane.device.faults import Faults
from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.device.simulated_access import UNMAPPED
from modelcache.dataplane.device.simulated_pages import PAGE_BYTES, Extents
from modelcache.errors import DevicePoisonedError

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages move on Linux only")


@pytest.fixture
def open_mapped():
    opened = []

    def make(*args, **options):
        opened.append(SimulatedDevice(*args, link_bytes_per_s=None, memory="mapped", **options))
        return opened[-1]

    yield make
    for device in opened:
        device.close()


def pattern(size, seed=0):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- what goes wrong ---


@pytest.mark.parametrize("granularity", [0, -1, 1, PAGE_BYTES - 1, PAGE_BYTES + 512])
def test_a_granularity_must_be_of_pages(open_mapped, granularity):
    with pytest.raises(ValueError, match="granularity_bytes"):
        open_mapped(MIB, granularity_bytes=granularity)


def test_the_nth_mapping_fails_like_an_allocation(open_mapped):
    faults = Faults()
    device = open_mapped(16 * MIB, faults=faults)
    memory = device.reserve(MIB)
    faults.fail("allocate", failure="out_of_memory")
    with pytest.raises(torch.OutOfMemoryError, match="injected into mapping"):
        device.map(memory)
    assert device.allocated_bytes() == 0
    device.map(memory)
    faults.fail("allocate", failure="sticky")
    with pytest.raises(DevicePoisonedError):
        device.map(device.reserve(MIB))
    device.unmap(memory)
    assert device.memory.allocated_bytes() == 0


def test_mapped_and_allocated_memory_share_the_capacity_to_the_byte(open_mapped):
    device = open_mapped(10 * PAGE_BYTES, granularity_bytes=PAGE_BYTES)
    assert [device.charge_bytes(size) for size in (0, 1, PAGE_BYTES, PAGE_BYTES + 1)] == [
        *(0, PAGE_BYTES, PAGE_BYTES, 2 * PAGE_BYTES)
    ]
    allocated = device.allocate(3 * PAGE_BYTES + 1)
    ranges = [device.reserve(2 * PAGE_BYTES) for _ in range(4)]
    for memory in ranges[:3]:
        device.map(memory)
    assert device.free_bytes() == PAGE_BYTES - 1
    with pytest.raises(torch.OutOfMemoryError):
        device.map(ranges[3])
    with pytest.raises(torch.OutOfMemoryError):
        device.allocate(PAGE_BYTES)
    device.unmap(ranges[1])
    device.map(ranges[3])
    del allocated
    device.map(ranges[1])
    assert device.allocated_bytes() == 8 * PAGE_BYTES


def test_operators_on_a_view_that_outlives_its_device_are_refused_and_the_next_device_is_not_lost(open_mapped):
    device = open_mapped(16 * MIB)
    memory = device.reserve(MIB)
    device.close()
    other = open_mapped(16 * MIB)
    assert other.name == device.name
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        memory.sum()
    assert other.allocate(16).fill_(1).sum().item() == 16


def test_what_never_touches_the_bytes_is_no_access(open_mapped):
    device = open_mapped(16 * MIB)
    memory = device.reserve(MIB)
    assert memory[4:8].view(torch.int32).shape == (1,)
    assert torch.empty_like(memory).numel() == memory.view(64, -1).t().numel() == MIB
    torch.nn.Parameter(torch.zeros(1), requires_grad=False).data = memory.view(torch.float32)
    device.settle()


def test_an_access_around_torch_ends_the_process():
    code = (
        "import ctypes\n"
        "from modelcache.dataplane.device import open_device\n"
        "device = open_device('simulated', memory='mapped')\n"
        "memory = device.reserve(1 << 20)\n"
        "device.map(memory)\n"
        "ctypes.memset(memory.data_ptr(), 1, 1 << 20)\n"
        "device.unmap(memory)\n"
        "print('mapped was fine', flush=True)\n"
        "ctypes.memset(memory.data_ptr(), 1, 1)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-11, "mapped was fine\n", "")


@pytest.mark.parametrize("state", ["reserved", "mapped", "unmapped", "closed"])
def test_leaving_with_ranges_alive_is_quiet(state):
    code = (
        "from modelcache.dataplane.device import open_device\n"
        "device = open_device('simulated', memory='mapped')\n"
        "memory = device.reserve(1 << 20)\n"
        "kept = [memory[5:]]\n"
        f"if {state != 'reserved'}: device.map(memory)\n"
        f"if {state == 'unmapped'}: device.unmap(memory)\n"
        f"if {state == 'closed'}: device.close()\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class OddSystem:
    """The C library, with `mremap` refusing what `refuses` says: pieces that long, or a call of that number."""

    def __init__(self, real, refuses):
        self.real, self.refuses, self.calls = real, refuses, 0

    def __getattr__(self, name):
        return getattr(self.real, name)

    def mremap(self, source, size, *others):
        self.calls += 1
        code = self.refuses(size, self.calls)
        if code:
            ctypes.set_errno(code)
            return None
        return self.real.mremap(source, size, *others)


def test_a_system_that_moves_small_pieces_only_is_served(open_mapped, monkeypatch):
    device = open_mapped(64 * PAGE_BYTES, granularity_bytes=PAGE_BYTES)
    real = simulated_pages._libc()
    odd = OddSystem(real, lambda size, _call: errno.EFAULT if size > 3 * PAGE_BYTES else 0)
    monkeypatch.setattr(simulated_pages, "_libc", lambda: odd)
    memory = device.reserve(50 * PAGE_BYTES)
    for seed in range(2):
        device.map(memory)
        device.copy_in(memory, pattern(memory.numel(), seed)).wait()
        assert torch.equal(memory.cpu(), pattern(memory.numel(), seed))
        device.unmap(memory)
    assert device.allocated_bytes() == 0


@pytest.mark.parametrize("call", range(1, 8))
def test_pages_that_cannot_be_moved_are_an_out_of_memory_error_and_lost_to_nobody(open_mapped, monkeypatch, call):
    device = open_mapped(16 * PAGE_BYTES, granularity_bytes=PAGE_BYTES)
    small = [device.reserve(2 * PAGE_BYTES) for _ in range(8)]
    for memory in small:
        device.map(memory)
    for memory in small[::2]:
        device.unmap(memory)
    large = device.reserve(8 * PAGE_BYTES)
    odd = OddSystem(simulated_pages._libc(), lambda _size, calls: errno.ENOMEM if calls == call else 0)
    with monkeypatch.context() as patched:
        patched.setattr(simulated_pages, "_libc", lambda: odd)
        # Four pieces; the calls beyond bring them home again, or other pieces.
        with pytest.raises(torch.OutOfMemoryError) if call <= 4 else contextlib.nullcontext():
            device.map(large)
        device.unmap(large)
        assert device.allocated_bytes() == 8 * PAGE_BYTES
    for seed in range(3):
        device.map(large)
        device.copy_in(large, pattern(large.numel(), seed)).wait()
        assert torch.equal(large.cpu(), pattern(large.numel(), seed))
        device.unmap(large)
    for memory in small[1::2]:
        assert memory.min().item() == 0xFF


def test_a_system_that_cannot_move_pages_is_named(monkeypatch):
    monkeypatch.setattr(simulated_pages.sys, "platform", "darwin")
    simulated_pages._libc.cache_clear()
    with pytest.raises(RuntimeError, match="Linux only; use memory='allocated'"):
        SimulatedDevice(memory="mapped")


def test_more_addresses_than_there_are_is_refused_in_words():
    with pytest.raises(RuntimeError, match="lower its capacity"):
        SimulatedDevice(1 << 50, memory="mapped")


# --- pages ---


def test_mapped_memory_is_poisoned_each_time(open_mapped):
    device = open_mapped(16 * MIB)
    memory = device.reserve(MIB)
    for _ in range(2):
        device.map(memory)
        assert torch.equal(memory.cpu(), torch.full((MIB,), 0xFF, dtype=torch.uint8))
        memory.fill_(3)
        device.unmap(memory)


def test_random_turns_keep_every_byte_and_every_account(open_mapped):
    rng = random.Random(7)
    unit = PAGE_BYTES
    device = open_mapped(256 * unit, granularity_bytes=unit, poison=False)
    ranges = [device.reserve(rng.randrange(1, 40 * unit)) for _ in range(24)]
    content = {}
    for turn in range(400):
        at = rng.randrange(len(ranges))
        memory = ranges[at]
        if at in content:
            assert torch.equal(device.host_view(memory), content.pop(at))
            device.unmap(memory)
            if rng.random() < 0.1:
                device.release_cached()
            if rng.random() < 0.1:
                ranges[at] = device.reserve(rng.randrange(1, 40 * unit))
            continue
        try:
            device.map(memory)
        except torch.OutOfMemoryError:
            assert device.charge_bytes(memory.numel()) > device.free_bytes()
            continue
        content[at] = pattern(memory.numel(), turn)
        device.copy_in(memory, content[at]).wait()
        expected = sum(device.charge_bytes(ranges[each].numel()) for each in content)
        assert device.allocated_bytes() == expected
    for at, block in content.items():
        assert torch.equal(device.host_view(ranges[at]), block)


def test_ranges_that_died_mapped_give_everything_back(open_mapped):
    device = open_mapped(16 * MIB)
    for _ in range(40):
        memory = device.reserve(8 * MIB)
        device.map(memory)
        address = memory.data_ptr()
        del memory
    gc.collect()
    assert device.allocated_bytes() == 0
    assert UNMAPPED.find(address) is None


def test_pages_are_kept_for_the_next_range_and_given_back_on_request(open_mapped):
    device = open_mapped(128 * MIB)
    memory, other = device.reserve(64 * MIB), device.reserve(48 * MIB)
    device.map(memory)
    resident = psutil.Process().memory_info().rss
    device.unmap(memory)
    device.map(other)
    device.unmap(other)
    assert psutil.Process().memory_info().rss > resident - 16 * MIB
    device.release_cached()
    assert psutil.Process().memory_info().rss < resident - 48 * MIB
    device.map(memory)
    assert int(memory[-1].item()) == 0xFF


def test_kept_pages_and_what_is_allocated_never_exceed_the_capacity(open_mapped):
    device = open_mapped(128 * MIB)
    memory = device.reserve(96 * MIB)
    device.map(memory)
    device.unmap(memory)
    resident = psutil.Process().memory_info().rss
    block = device.allocate(96 * MIB)
    assert psutil.Process().memory_info().rss < resident + 48 * MIB
    assert block[0].item() == 0xFF


# --- pieces of an area ---


def test_extents_join_their_neighbours_and_prefer_one_piece():
    extents = Extents()
    for start in (0, 40, 20, 10, 30):
        extents.add(start, 10)
    assert extents.take(50) == [(0, 50)]
    assert (extents.take(1), extents.size_bytes) == ([], 0)
    for start, size in ((0, 10), (20, 30), (60, 5)):
        extents.add(start, size)
    assert extents.take(25) == [(20, 25)]
    assert extents.size_bytes == 20
    assert sum(size for _, size in extents.take(20)) == 20
    assert extents.size_bytes == 0
