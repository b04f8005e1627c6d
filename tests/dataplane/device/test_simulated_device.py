"""Capacity, streams, faults and life cycle of the simulated device."""

import copy
import gc
import threading

import pytest
import torch

from modelcache.dataplane.device.faults import Faults
from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.device.simulated_memory import round_up
from modelcache.dataplane.device.simulated_streams import OsThreads
from modelcache.errors import DevicePoisonedError

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def open_simulated():
    opened = []

    def make(*args, **options):
        opened.append(SimulatedDevice(*args, **options))
        return opened[-1]

    yield make
    for device in opened:
        device.close()


@pytest.fixture
def device(open_simulated):
    return open_simulated(64 * MIB, link_bytes_per_s=None)


def pattern(size, seed=0):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- what goes wrong ---


@pytest.mark.parametrize("operation", ["allocate", "copy_in", "copy_out"])
def test_the_nth_call_runs_out_of_memory_and_the_others_do_not(device, operation):
    memory, block = device.allocate(KIB), pattern(KIB)
    calls = {
        "allocate": lambda: device.allocate(KIB),
        "copy_in": lambda: device.copy_in(memory, block).wait(),
        "copy_out": lambda: device.copy_out(block, memory).wait(),
    }
    before = device.allocated_bytes()
    device.faults.fail(operation, nth=2, failure="out_of_memory")
    calls[operation]()
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        calls[operation]()
    calls[operation]()
    assert device.allocated_bytes() == before


@pytest.mark.parametrize("operation", ["copy_in", "copy_out"])
def test_a_transient_copy_error_is_told_to_each_who_waits_and_spoils_nothing_else(device, operation):
    memory, block = device.allocate(KIB), pattern(KIB)
    device.copy_in(memory, block).wait()
    target = torch.zeros(KIB, dtype=torch.uint8)
    device.faults.fail(operation)
    event = device.copy_in(memory, pattern(KIB, 1)) if operation == "copy_in" else device.copy_out(target, memory)
    raised = []
    for _ in range(2):
        with pytest.raises(torch.AcceleratorError, match="transient") as caught:
            event.wait()
        raised.append(caught.value)
    assert raised[0] is not raised[1]
    assert raised[0].__cause__ is raised[1].__cause__
    assert event.is_done()
    assert torch.equal(memory.cpu(), block)
    assert int(target.count_nonzero()) == 0
    device.copy_out(target, memory).wait()
    assert torch.equal(target, block)


def test_a_transient_allocation_error_takes_nothing(device):
    device.faults.fail("allocate")
    with pytest.raises(torch.AcceleratorError):
        device.allocate(KIB)
    assert device.allocated_bytes() == 0
    device.allocate(KIB)


def test_compute_behind_a_failed_copy_fails_instead_of_using_garbage(device):
    memory = device.allocate(KIB)
    device.faults.fail("copy_in")
    device.let_compute_wait(device.copy_in(memory, pattern(KIB)))
    with pytest.raises(torch.AcceleratorError, match="transient"):
        memory + 1
    memory + 1


@pytest.mark.parametrize("operation", ["allocate", "copy_in", "copy_out", "compute"])
def test_a_sticky_error_poisons_every_later_call(device, operation):
    poison_and_try_everything(device, operation)
    gc.collect()
    assert device.allocated_bytes() == 0


def poison_and_try_everything(device, operation):
    memory, block = device.allocate(KIB), pattern(KIB)
    earlier = device.copy_in(memory, block)
    earlier.wait()
    device.faults.fail(operation, failure="sticky")
    expected = torch.AcceleratorError if operation == "compute" else DevicePoisonedError
    calls = {
        "allocate": lambda: device.allocate(KIB),
        "copy_in": lambda: device.copy_in(memory, block).wait(),
        "copy_out": lambda: device.copy_out(block, memory).wait(),
        "compute": memory.clone,
    }
    with pytest.raises(expected):
        calls[operation]()
    for call in (
        lambda: device.allocate(KIB),
        lambda: device.copy_in(memory, block),
        lambda: device.copy_out(block, memory),
        lambda: device.let_compute_wait(earlier),
        device.settle,
        device.release_cached,
        lambda: device.page_lock(block),
    ):
        with pytest.raises(DevicePoisonedError, match="restart"):
            call()
    with pytest.raises(torch.AcceleratorError):
        memory + 1
    with pytest.raises(torch.AcceleratorError):
        memory.cpu()


def test_copies_queued_behind_a_sticky_error_fail_too(device):
    memory, block = device.allocate(KIB), pattern(KIB)
    hold = device.faults.hold("copy_in")
    device.faults.fail("copy_in", nth=2, failure="sticky")
    events = [device.copy_in(memory, block) for _ in range(3)]
    hold.release()
    events[0].wait()
    for event in events[1:]:
        with pytest.raises(DevicePoisonedError):
            event.wait()


def test_one_byte_of_a_copy_arrives_damaged(device):
    memory, block = device.allocate(KIB), pattern(KIB)
    device.faults.corrupt("copy_in", byte=77)
    device.copy_in(memory, block).wait()
    assert (memory.cpu() != block).nonzero().flatten().tolist() == [77]
    device.copy_in(memory, block).wait()
    assert torch.equal(memory.cpu(), block)


def test_a_missing_wait_shows_as_wrong_numbers(device):
    block = torch.ones(KIB)
    memory = device.allocate(block.nbytes)
    values = memory.view(torch.float32)
    with device.faults.hold("copy_in") as hold:
        event = device.copy_in(memory, block.view(torch.uint8))
        assert hold.wait_reached(5)
        assert not event.is_done()
        assert bool((values * 2).isnan().all())
    device.let_compute_wait(event)
    assert torch.equal((values * 2).cpu(), block * 2)


def test_only_the_thread_that_was_told_waits(device):
    memory = device.allocate(KIB)
    with device.faults.hold("copy_in") as hold:
        device.let_compute_wait(device.copy_in(memory, pattern(KIB)))
        seen = []
        other = threading.Thread(target=lambda: seen.append(memory.cpu()))
        other.start()
        other.join()
        assert seen[0].eq(0xFF).all()
        hold.release()
    assert torch.equal(memory.cpu(), pattern(KIB))


def test_a_held_copy_holds_its_direction_and_no_other(device):
    inward, outward, block = device.allocate(KIB), device.allocate(KIB), torch.zeros(KIB, dtype=torch.uint8)
    with device.faults.hold("copy_in") as hold:
        first, second = device.copy_in(inward, pattern(KIB, 1)), device.copy_in(inward, pattern(KIB, 2))
        assert hold.wait_reached(5)
        device.copy_out(block, outward).wait()
        assert block.eq(0xFF).all()
        assert not first.is_done()
        assert not second.is_done()
        # An ordinary copy of the program's own is not behind the stream either.
        assert torch.ones(3).to(device.torch_device).sum().item() == 3
    second.wait()
    assert first.is_done()
    assert torch.equal(inward.cpu(), pattern(KIB, 2))


def test_copy_out_waits_for_operators_of_other_threads(device):
    memory, gate_memory = device.allocate(KIB), device.allocate(KIB)
    memory.fill_(1)
    block = torch.zeros(KIB, dtype=torch.uint8)
    with device.faults.hold("copy_in") as hold:
        landing = device.copy_in(gate_memory, pattern(KIB))
        begun = threading.Event()

        def compute():
            device.let_compute_wait(landing)
            begun.set()
            memory.add_(1)

        thread = threading.Thread(target=compute)
        thread.start()
        assert begun.wait(5)
        while not device._running:
            pass
        event = device.copy_out(block, memory)
        assert not event.is_done()
        hold.release()
        event.wait()
        thread.join()
    assert block.eq(2).all()


def test_faults_are_refused_when_they_make_no_sense():
    faults = Faults()
    with pytest.raises(ValueError, match="allocate, copy_in"):
        faults.fail("read")
    with pytest.raises(ValueError, match="sticky"):
        faults.fail("allocate", failure="rude")
    with pytest.raises(ValueError, match="counts from 1"):
        faults.fail("allocate", nth=0)
    with pytest.raises(ValueError, match="only a copy"):
        faults.hold("allocate")
    with pytest.raises(ValueError, match="only a copy"):
        faults.corrupt("compute")


def test_page_locking_can_be_refused(device):
    block = pattern(KIB)
    device.faults.refuse_page_lock(1)
    assert not device.page_lock(block)
    assert device.page_lock(block)
    assert device.page_locked_bytes == KIB
    device.page_unlock(block)
    assert device.page_locked_bytes == 0
    device.faults.refuse_page_lock()
    assert not device.page_lock(block)


# --- memory ---


@pytest.mark.parametrize(
    ("rounding", "size", "charge"),
    [
        ("exact", 0, 0), ("exact", 777, 777),
        ("512", 0, 0), ("512", 1, 512), ("512", 512, 512), ("512", 513, 1024),
        ("2MiB", 1, 2 * MIB), ("2MiB", 2 * MIB + 1, 4 * MIB),
        ("power_of_two", 1, 512), ("power_of_two", 512, 512), ("power_of_two", 3 * MIB, 4 * MIB), ("power_of_two", 4 * MIB, 4 * MIB),
    ],
)  # fmt: skip
def test_sizes_are_rounded_as_asked(rounding, size, charge):
    assert round_up(size, rounding) == charge


def test_rounding_is_charged_for_everything_on_the_device(open_simulated):
    device = open_simulated(8 * MIB, rounding="2MiB", link_bytes_per_s=None)
    first, second = device.allocate(5), torch.ones(5).to(device.torch_device)
    assert (
        device.allocated_bytes() == 4 * MIB == device.charge_bytes(first.numel()) + device.charge_bytes(second.nbytes)
    )
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
        device.allocate(4 * MIB + 1)
    assert device.free_bytes() == 4 * MIB


def test_the_last_byte_can_be_had_and_not_one_more(device):
    most = device.allocate(64 * MIB - 10)
    rest = device.allocate(10)
    assert device.free_bytes() == 0
    for one_more in (lambda: device.allocate(1), lambda: torch.ones(1).to("sim:0"), lambda: rest + 1, rest.clone):
        with pytest.raises(torch.OutOfMemoryError):
            one_more()
    assert device.free_bytes() == 0
    del most
    assert device.free_bytes() == 64 * MIB - 10


def test_a_size_that_no_machine_has_is_out_of_memory_too(open_simulated):
    device = open_simulated(1 << 60)
    for ask in (lambda: device.allocate(1 << 50), lambda: torch.empty(1 << 50, device=device.torch_device)):
        with pytest.raises(torch.OutOfMemoryError):
            ask()
    assert device.allocated_bytes() == 0


def test_activations_and_copies_by_torch_are_counted(device):
    x = torch.zeros(1000).to("sim:0")
    y = x + 1
    views = [y.view(10, 100), y[5:], y.unsqueeze(0).expand(7, 1000), y.reshape(20, 50).transpose(0, 1)]
    assert device.allocated_bytes() == 8000
    del y
    assert device.allocated_bytes() == 8000
    del views
    assert device.allocated_bytes() == 4000
    z = copy.deepcopy(x)
    assert device.allocated_bytes() == 8000
    del x, z
    assert device.allocated_bytes() == 0


def test_freed_blocks_are_used_again_and_come_back_poisoned(device):
    memory = device.allocate(2 * MIB)
    address = memory.data_ptr()
    memory.zero_()
    del memory
    assert device.free_bytes() == 64 * MIB
    again = device.allocate(2 * MIB)
    assert again.data_ptr() == address
    assert again.eq(0xFF).all()


def test_spare_blocks_never_stand_in_the_way(device):
    kept = [device.allocate(16 * MIB) for _ in range(4)]
    del kept
    assert device.allocate(64 * MIB).numel() == 64 * MIB
    device.release_cached()
    assert device.free_bytes() == 64 * MIB


def test_a_refused_block_is_not_lost(device):
    device.allocate(40 * MIB)
    held = device.allocate(30 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        device.allocate(40 * MIB)
    del held
    assert device.allocate(40 * MIB).numel() == 40 * MIB


def test_unpoisoned_memory_is_left_as_it_is(open_simulated):
    device = open_simulated(MIB, poison=False)
    assert device.allocate(100).numel() == 100


@pytest.mark.parametrize(
    "bad", [{"capacity_bytes": -1}, {"link_bytes_per_s": 0}, {"link_bytes_per_s": -1.0}, {"rounding": "3MiB"}]
)
def test_impossible_settings_are_refused_and_take_no_index(bad, open_simulated):
    with pytest.raises(ValueError):
        open_simulated(**bad)
    device = open_simulated(MIB)
    assert device.name == "sim:0"


# --- the link ---


class SteppedFlag:
    """A flag whose timed wait moves a clock instead of waiting."""

    def __init__(self, clock):
        self.clock, self.event = clock, threading.Event()

    def set(self):
        self.event.set()

    def clear(self):
        self.event.clear()

    def is_set(self):
        return self.event.is_set()

    def wait(self, timeout=None):
        if timeout is None:
            return self.event.wait()
        self.clock.now_s += timeout
        return self.event.is_set()


class SteppedThreads(OsThreads):
    """Real threads under a clock that only moves when one of them waits for the link."""

    def __init__(self):
        self.now_s = 0.0

    def event(self):
        return SteppedFlag(self)

    def clock(self):
        return self.now_s


def test_a_copy_takes_its_bytes_over_the_speed_of_the_link(open_simulated):
    threads = SteppedThreads()
    device = open_simulated(64 * MIB, link_bytes_per_s=MIB, threads=threads, clock=threads.clock)
    memory = device.allocate(4 * MIB)
    device.copy_in(memory, pattern(4 * MIB)).wait()
    device.settle()
    assert threads.now_s == pytest.approx(4.0)
    device.copy_out(pattern(2 * MIB), memory[: 2 * MIB]).wait()
    device.settle()
    assert threads.now_s == pytest.approx(6.0)
    assert (device.copied_in_bytes, device.copied_out_bytes) == (4 * MIB, 2 * MIB)


def test_ordinary_copies_pay_for_the_link_too(open_simulated):
    threads = SteppedThreads()
    device = open_simulated(64 * MIB, link_bytes_per_s=MIB, threads=threads, clock=threads.clock)
    there = torch.zeros(3 * MIB, dtype=torch.uint8).to(device.torch_device)
    assert threads.now_s == pytest.approx(3.0)
    there.clone()
    assert threads.now_s == pytest.approx(3.0)
    there[:MIB].cpu()
    assert threads.now_s == pytest.approx(4.0)


# --- life ---


def test_devices_follow_each_other_and_stand_side_by_side(open_simulated):
    for _ in range(3):
        device = open_simulated(MIB)
        assert device.name == "sim:0"
        device.close()
    several = [open_simulated(MIB * (n + 1)) for n in range(8)]
    assert [device.name for device in several] == [f"sim:{n}" for n in range(8)]
    with pytest.raises(RuntimeError, match="close one of them"):
        open_simulated(MIB)
    tensors = [torch.full((n + 1,), float(n)).to(device.torch_device) for n, device in enumerate(several)]
    assert [device.allocated_bytes() for device in several] == [4 * (n + 1) for n in range(8)]
    moved = tensors[3].to("sim:5")
    assert (str(moved.device), moved.tolist()) == ("sim:5", [3.0] * 4)
    with pytest.raises(RuntimeError, match="same device"):
        tensors[0] + tensors[1][:1]
    for device in several:
        device.close()


def test_tensors_outlive_their_device(device, open_simulated):
    tensor, memory = torch.arange(5.0).to("sim:0"), device.allocate(100)
    device.close()
    assert tensor.cpu().tolist() == [0, 1, 2, 3, 4]
    after = open_simulated(MIB)
    assert tensor.cpu().tolist() == [0, 1, 2, 3, 4]
    del tensor, memory
    assert (after.allocated_bytes(), device.allocated_bytes()) == (0, 0)
    after.close()


def test_closing_fails_held_and_queued_copies_and_leaves_no_thread(device):
    memory = device.allocate(KIB)
    hold = device.faults.hold("copy_in")
    events = [device.copy_in(memory, pattern(KIB)) for _ in range(3)]
    outward = device.copy_out(pattern(KIB), memory)
    outward.wait()
    assert hold.wait_reached(5)
    names = {thread.name for thread in threading.enumerate()}
    assert {"modelcache-sim:0-in", "modelcache-sim:0-out"} <= names
    device.close()
    assert not {thread.name for thread in threading.enumerate()} & {"modelcache-sim:0-in", "modelcache-sim:0-out"}
    for event in events:
        with pytest.raises(RuntimeError, match="closed"):
            event.wait()
    assert memory.eq(0xFF).all()
    device.settle()


def test_a_device_that_copies_nothing_has_no_threads(open_simulated):
    before = set(threading.enumerate())
    open_simulated(MIB)
    torch.ones(3).to("sim:0") + 1
    assert set(threading.enumerate()) == before


def test_an_index_that_nobody_opened_is_refused_in_words(device):
    with pytest.raises(RuntimeError, match="open one with SimulatedDevice"):
        torch.ones(2).to("sim:11")
