"""The books of mapped CUDA memory, over a driver that is made up of books itself."""

import contextlib
import gc
import threading
from types import SimpleNamespace

import pytest
import torch

from modelcache.dataplane.device import cuda_mapped
from modelcache.dataplane.device.cuda_errors import CudaPoison
from modelcache.dataplane.device.cuda_mapped import CudaRanges
from modelcache.errors import DevicePoisonedError

MIB = 1 << 20
ILLEGAL_ADDRESS, OUT_OF_MEMORY, INVALID_VALUE = 700, 2, 1


class Driver:
    """As much of `cuda.bindings.driver` as is called, which refuses what the driver would refuse."""

    def __init__(self, total=64 * MIB, granularity=2 * MIB, supported=1):
        self.total, self.granularity, self.supported = total, granularity, supported
        self.chunks, self.ranges, self.mapped, self.accessible = {}, {}, {}, set()
        self.fail, self.calls, self.contexts = {}, [], threading.local()
        self.contexts.now = 7
        self._next = 1 << 40
        self.CUmemAllocationProp = lambda: SimpleNamespace(location=SimpleNamespace())
        self.CUmemAccessDesc = SimpleNamespace
        self.CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
        self.CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
        self.CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
        self.CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
        self.CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED=102)

    def __getattribute__(self, name):
        found = object.__getattribute__(self, name)
        if not name.startswith("cu"):
            return found

        def call(*arguments):
            self.calls.append(name)
            if self.fail.get(name):
                return (self.fail[name].pop(0),)
            if name.startswith("cuMem"):
                assert self.context() == 7, "no context in this thread"
            answer = found(*arguments)
            return (answer,) if isinstance(answer, int) else answer

        return call

    def context(self):
        return getattr(self.contexts, "now", 0)

    def cuCtxGetCurrent(self):
        return 0, self.context()

    def cuCtxSetCurrent(self, context):
        self.contexts.now = context
        return 0

    def cuDeviceGet(self, ordinal):
        return 0, ordinal

    def cuDeviceGetAttribute(self, _what, _device):
        return 0, self.supported

    def cuMemGetAllocationGranularity(self, properties, _flags):
        assert properties.location.id == 3
        return 0, self.granularity

    def cuMemAddressReserve(self, size, alignment, address, flags):
        assert (alignment, address, flags, size % self.granularity) == (0, 0, 0, 0)
        self._next += size + self.granularity
        self.ranges[self._next] = size
        return 0, self._next

    def cuMemAddressFree(self, address, size):
        assert address not in self.mapped
        assert self.ranges.pop(address) == size
        return 0

    def cuMemCreate(self, size, _properties, flags):
        assert (flags, size % self.granularity) == (0, 0)
        if sum(self.chunks.values()) + size > self.total:
            return (OUT_OF_MEMORY, None)
        handle = object()
        self.chunks[handle] = size
        return 0, handle

    def cuMemRelease(self, handle):
        assert handle not in self.mapped.values(), "released while it is mapped"
        del self.chunks[handle]
        return 0

    def cuMemMap(self, address, size, offset, handle, flags):
        assert (offset, flags) == (0, 0)
        assert self.ranges[address] == self.chunks[handle] == size
        assert address not in self.mapped
        assert handle not in self.mapped.values()
        self.mapped[address] = handle
        return 0

    def cuMemSetAccess(self, address, size, descriptions, count):
        assert (count, len(descriptions), self.ranges[address]) == (1, 1, size)
        assert (descriptions[0].flags, descriptions[0].location.id) == (3, 3)
        self.accessible.add(address)
        return 0

    def cuMemUnmap(self, address, size):
        assert self.ranges[address] == size
        del self.mapped[address]
        self.accessible.discard(address)
        return 0


class Opened:
    """Ranges over such a driver; tensors are the CPU's and never read."""

    def __init__(self, driver):
        self.driver, self.poison, self.is_closed = driver, CudaPoison("cuda:3"), False
        self.settled = self.made_room = 0
        self.ranges = CudaRanges(driver, torch.device("cpu"), 3, self.entered, self.settle, self.make_room)

    @contextlib.contextmanager
    def entered(self):
        with self.poison.watch():
            yield

    def settle(self):
        self.settled += 1

    def make_room(self):
        self.made_room += 1


@pytest.fixture
def opened():
    return Opened(Driver())


# --- what goes wrong ---


def test_without_the_bindings_the_fix_is_named(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(cuda_mapped.importlib, "import_module", missing)
    with pytest.raises(RuntimeError, match=r"pip install cuda-bindings, or set memory: allocated"):
        cuda_mapped.bindings()


def test_a_device_that_cannot_map_is_refused_in_words():
    with pytest.raises(RuntimeError, match="set memory: allocated"):
        Opened(Driver(supported=0))


def test_without_room_kept_chunks_and_the_caches_of_others_are_given_up_and_it_is_tried_once_more(opened):
    ranges = [opened.ranges.reserve(size * MIB) for size in (40, 8, 20)]
    for memory in ranges[:2]:
        opened.ranges.map(memory)
    with pytest.raises(torch.OutOfMemoryError, match="cuMemCreate"):
        opened.ranges.map(ranges[2])
    assert opened.made_room == 1
    assert opened.driver.calls.count("cuMemCreate") == 4
    assert (opened.ranges.mapped_bytes, opened.ranges.kept_bytes) == (48 * MIB, 0)
    opened.ranges.unmap(ranges[0])
    opened.ranges.map(ranges[2])
    assert (opened.ranges.mapped_bytes, opened.made_room) == (28 * MIB, 1)


@pytest.mark.parametrize("name", ["cuMemMap", "cuMemSetAccess"])
def test_a_mapping_that_fails_half_way_leaves_nothing_behind(opened, name):
    memory = opened.ranges.reserve(MIB)
    opened.driver.fail[name] = [INVALID_VALUE]
    with pytest.raises(torch.AcceleratorError, match=f"{name} failed with 1"):
        opened.ranges.map(memory)
    assert (opened.driver.mapped, opened.ranges.mapped_bytes) == ({}, 0)
    opened.ranges.map(memory)
    assert opened.driver.accessible == {memory.data_ptr()}
    assert len(opened.driver.chunks) == 1


def test_running_out_while_mapping_is_tried_once_more_too(opened):
    memory = opened.ranges.reserve(MIB)
    opened.driver.fail["cuMemSetAccess"] = [OUT_OF_MEMORY]
    opened.ranges.map(memory)
    assert (opened.made_room, len(opened.driver.chunks), opened.ranges.mapped_bytes) == (1, 1, 2 * MIB)


def test_a_lost_device_maps_nothing_and_lets_everything_go(opened):
    memory, other = opened.ranges.reserve(MIB), opened.ranges.reserve(MIB)
    opened.ranges.map(memory)
    opened.driver.fail["cuMemCreate"] = [ILLEGAL_ADDRESS]
    with pytest.raises(DevicePoisonedError):
        opened.ranges.map(other)
    with pytest.raises(DevicePoisonedError):
        opened.ranges.reserve(MIB)
    calls = len(opened.driver.calls)
    opened.ranges.unmap(memory)
    opened.ranges.unmap(memory)
    del memory, other
    gc.collect()
    assert opened.ranges.mapped_bytes == 0
    opened.ranges.close()
    assert len(opened.driver.calls) == calls


def test_what_is_no_whole_range_is_refused(opened):
    memory = opened.ranges.reserve(MIB)
    opened.ranges.map(memory)
    with pytest.raises(ValueError, match="mapped already"):
        opened.ranges.map(memory)
    for other in (memory[:5], memory[5:], torch.zeros(8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="not a whole range"):
            opened.ranges.unmap(other)


# --- books ---


def test_a_size_is_charged_what_the_driver_maps(opened):
    assert [opened.ranges.charge_bytes(size) for size in (0, 1, 2 * MIB, 2 * MIB + 1)] == [
        *(0, 2 * MIB, 2 * MIB, 4 * MIB)
    ]


def test_an_address_stays_and_its_chunk_is_used_again(opened):
    memory = opened.ranges.reserve(3 * MIB)
    address = memory.data_ptr()
    for _ in range(5):
        opened.ranges.map(memory)
        assert opened.driver.accessible == {address}
        opened.ranges.unmap(memory)
        opened.ranges.unmap(memory)
        assert (opened.ranges.mapped_bytes, opened.ranges.kept_bytes) == (0, 4 * MIB)
    assert memory.data_ptr() == address
    assert opened.driver.calls.count("cuMemCreate") == 1


def test_chunks_go_from_range_to_range_of_one_size(opened):
    first, second = opened.ranges.reserve(6 * MIB), opened.ranges.reserve(5 * MIB)
    opened.ranges.map(first)
    opened.ranges.unmap(first)
    opened.ranges.map(second)
    assert opened.driver.calls.count("cuMemCreate") == 1


def test_mapped_and_kept_chunks_never_exceed_the_most_that_was_mapped():
    opened = Opened(Driver(total=256 * MIB))
    ranges = [opened.ranges.reserve(size * MIB) for size in (20, 8, 2, 14, 30, 6)]
    most = 0
    for turn in range(60):
        memory = ranges[turn * 7 % 6]
        opened.ranges.unmap(ranges[turn * 5 % 6])
        opened.ranges.unmap(memory)
        opened.ranges.map(memory)
        most = max(most, opened.ranges.mapped_bytes)
        held = sum(opened.driver.chunks.values())
        assert held == opened.ranges.mapped_bytes + opened.ranges.kept_bytes <= most
        if most > 50 * MIB:
            for each in ranges:
                opened.ranges.unmap(each)


def test_a_range_that_died_is_given_back_by_the_next_call_after_the_device_has_settled(opened):
    mapped, idle = opened.ranges.reserve(MIB), opened.ranges.reserve(MIB)
    opened.ranges.map(mapped)
    view = mapped[5:]
    del mapped
    gc.collect()
    assert opened.ranges.mapped_bytes == 2 * MIB
    del view
    gc.collect()
    assert "cuMemUnmap" not in opened.driver.calls
    assert opened.ranges.mapped_bytes == 0
    assert (opened.settled, opened.driver.mapped) == (1, {})
    assert list(opened.driver.ranges) == [idle.data_ptr()]


def test_released_and_closed_ranges_keep_no_chunks(opened):
    first, second = opened.ranges.reserve(MIB), opened.ranges.reserve(MIB)
    opened.ranges.map(first)
    opened.ranges.map(second)
    opened.ranges.unmap(first)
    opened.ranges.release_cached()
    assert (opened.ranges.kept_bytes, len(opened.driver.chunks)) == (0, 1)
    opened.ranges.close()
    assert opened.driver.mapped
    opened.ranges.unmap(second)
    assert opened.driver.chunks == {}
    del first, second
    gc.collect()
    assert opened.driver.ranges == {}


def test_a_thread_that_never_used_the_device_gets_its_context(opened):
    failures = []

    def work():
        try:
            memory = opened.ranges.reserve(MIB)
            opened.ranges.map(memory)
            opened.ranges.unmap(memory)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_an_empty_range_needs_no_driver(opened):
    calls = len(opened.driver.calls)
    memory = opened.ranges.reserve(0)
    opened.ranges.map(memory)
    opened.ranges.unmap(memory)
    assert (memory.numel(), len(opened.driver.calls)) == (0, calls)


@pytest.mark.gpu
def test_the_names_are_those_of_the_real_bindings():
    real = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    made_up = Driver()
    for name in [name for name in (*vars(made_up), *dir(Driver)) if name.lower().startswith("cu")]:
        assert hasattr(real, name), name
