"""Readings one after the other, of control groups laid out as files, and of devices; and sources that vanish."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from nvml_fakes import Card, FakeNvml

from modelcache.dataplane.device.host_only import HostOnlyDevice
from modelcache.dataplane.device.simulated import SimulatedDevice
from modelcache.dataplane.probe.facts import Unavailable
from modelcache.dataplane.probe.gauge import MachineGauge, gauge_of
from modelcache.dataplane.probe.pressure import stalls
from modelcache.dataplane.probe.vram import VramProbe
from modelcache.errors import DevicePoisonedError
from modelcache.testing import FakeClock
from modelcache.tier import Tier

GIB = 1 << 30
V1_MOUNT = "30 23 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V2_MOUNT = "30 23 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
LEAF = "sys/fs/cgroup/shop/app"
HOST = SimpleNamespace(
    virtual_memory=lambda: SimpleNamespace(total=256 * GIB, available=200 * GIB),
    Process=lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=GIB)),
)


class Machine:
    def __init__(self, root: Path) -> None:
        self.root, self.clock = root, FakeClock(100.0)
        self.gauge = MachineGauge(None, now_s=self.clock.now_s, root=root, psutil=HOST)

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def version_2(self) -> Machine:
        self.write("proc/self/cgroup", "0::/shop/app")
        self.write("proc/self/mountinfo", V2_MOUNT.rstrip())
        self.write(f"{LEAF}/memory.max", 64 * GIB)
        self.write(f"{LEAF}/memory.high", "max")
        self.write(f"{LEAF}/memory.current", 16 * GIB)
        self.write(f"{LEAF}/memory.stat", "inactive_file 0")
        self.stall(LEAF + "/memory.pressure", 0.0)
        return self

    def stall(self, path: str, percent: float) -> None:
        self.write(path, f"some avg10={percent:.2f} avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 total=0")

    def read(self):
        self.clock.advance(1.0)
        reading = self.gauge.read(Tier.RAM)
        return reading, round(reading.total_bytes / GIB), round(reading.free_bytes / GIB)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_without_control_groups_the_host_is_read_and_nobody_tells_of_stalls(machine):
    reading, total, free = machine.read()
    assert (total, free, reading.source, reading.stalled_percent, reading.problem) == (256, 200, "psutil", None, "")


def test_every_reading_sees_the_files_as_they_are_now(machine):
    machine.version_2()
    reading, total, free = machine.read()
    assert (total, free, reading.source) == (64, 48, f"/{LEAF}/memory.max")
    assert (reading.at_s, reading.stalled_percent, reading.stalled_source) == (101.0, 0.0, f"/{LEAF}/memory.pressure")
    machine.write(f"{LEAF}/memory.max", 20 * GIB)
    machine.write(f"{LEAF}/memory.current", 18 * GIB)
    machine.stall(f"{LEAF}/memory.pressure", 37.5)
    reading, total, free = machine.read()
    assert (total, free, reading.stalled_percent, reading.at_s) == (20, 2, 37.5, 102.0)


def test_file_cache_is_no_shortage_used_again_or_not(machine):
    machine.version_2()
    machine.write(f"{LEAF}/memory.current", 64 * GIB)
    machine.write(f"{LEAF}/memory.stat", f"anon {14 * GIB}\ninactive_file {20 * GIB}\nactive_file {30 * GIB}")
    _, total, free = machine.read()
    assert (total, free) == (64, 50)


def test_an_ancestor_that_allows_less_binds(machine):
    machine.version_2()
    machine.write("sys/fs/cgroup/shop/memory.high", 32 * GIB)
    machine.write("sys/fs/cgroup/shop/memory.current", 31 * GIB)
    reading, total, free = machine.read()
    assert (total, free, reading.source) == (32, 1, "/sys/fs/cgroup/shop/memory.high")


def test_version_1_is_read_too_and_has_no_stalls_of_its_own(machine):
    machine.write("proc/self/cgroup", "4:memory:/box")
    machine.write("proc/self/mountinfo", V1_MOUNT.rstrip())
    machine.write("sys/fs/cgroup/memory/box/memory.limit_in_bytes", 10 * GIB)
    machine.write("sys/fs/cgroup/memory/box/memory.usage_in_bytes", 4 * GIB)
    machine.stall("proc/pressure/memory", 3.0)
    reading, total, free = machine.read()
    assert (total, free, reading.stalled_source) == (10, 6, "/proc/pressure/memory")
    (machine.root / "sys/fs/cgroup/memory/box/memory.usage_in_bytes").unlink()
    reading, total, free = machine.read()
    assert (total, free) == (10, 6)
    assert "memory.usage_in_bytes cannot be read (No such file or directory)" in reading.problem


@pytest.mark.parametrize("gone", ["memory.max", "memory.current", "memory.pressure"])
def test_a_file_that_cannot_be_read_any_more_leaves_the_last_figures_with_their_age(machine, gone):
    machine.version_2()
    before, _, _ = machine.read()
    kept = (machine.root / LEAF / gone).read_text()
    (machine.root / LEAF / gone).unlink()
    for _ in range(3):
        reading, total, free = machine.read()
        assert (total, free, reading.at_s) == (64, 48, before.at_s)
        assert reading.problem == f"/{LEAF}/{gone} cannot be read (No such file or directory)"
    (machine.root / LEAF / gone).write_text(kept)
    reading, total, free = machine.read()
    assert (total, free, reading.problem, reading.at_s) == (64, 48, "", 105.0)


def test_the_membership_file_that_cannot_be_read_leaves_the_last_figures_too(machine):
    machine.version_2()
    machine.read()
    (machine.root / "proc/self/cgroup").unlink()
    reading, total, _ = machine.read()
    assert total == 64
    assert reading.problem.startswith("/proc/self/cgroup cannot be read")


def test_a_limit_that_was_lifted_is_no_limit_any_more(machine):
    machine.version_2()
    machine.read()
    machine.write(f"{LEAF}/memory.max", "max")
    reading, total, _ = machine.read()
    assert (total, reading.problem) == (256, "")


def test_a_process_that_was_moved_to_another_group_is_measured_there(machine):
    machine.version_2()
    machine.read()
    machine.write("proc/self/cgroup", "0::/other")
    machine.write("sys/fs/cgroup/other/memory.max", 8 * GIB)
    machine.write("sys/fs/cgroup/other/memory.current", 2 * GIB)
    for name in os.listdir(machine.root / LEAF):
        (machine.root / LEAF / name).unlink()
    reading, total, free = machine.read()
    assert (total, free, reading.problem) == (8, 6, "")


def test_stalls_are_those_of_the_nearest_group_that_tells(machine):
    machine.version_2()
    machine.stall("proc/pressure/memory", 50.0)
    machine.stall("sys/fs/cgroup/shop/memory.pressure", 20.0)
    assert stalls(machine.root).some_percent == 0.0
    (machine.root / LEAF / "memory.pressure").write_text("nonsense\n")
    assert stalls(machine.root).some_percent == 20.0
    (machine.root / "sys/fs/cgroup/shop/memory.pressure").unlink()
    assert stalls(machine.root).source == "/proc/pressure/memory"
    (machine.root / "proc/pressure/memory").unlink()
    assert stalls(machine.root) is None


# --- VRAM ---------------------------------------------------------------------------------------------------------


def test_nvml_that_vanishes_leaves_the_last_figures_and_is_asked_again_later(tmp_path):
    clock, card = FakeClock(), Card(free=4 * GIB)
    nvml = FakeNvml(card)
    probe = VramProbe(nvml=nvml, integrated=False, now_s=clock.now_s)
    gauge = MachineGauge(probe.read, now_s=clock.now_s, root=tmp_path, psutil=HOST)
    first = gauge.read(Tier.VRAM)
    assert (first.others_bytes, first.source, first.problem) == (20 * GIB, "nvml", "")
    nvml.init_error = card.memory_error = "GPU_IS_LOST"
    clock.advance(10.0)
    old = gauge.read(Tier.VRAM)
    assert (old.others_bytes, old.at_s) == (20 * GIB, 0.0)
    assert old.problem
    nvml.init_error = card.memory_error = None
    card.free = 20 * GIB
    clock.advance(31.0)
    again = gauge.read(Tier.VRAM)
    assert (again.others_bytes, again.problem, again.at_s) == (4 * GIB, "", 41.0)
    probe.close()


def test_a_device_that_never_answered_or_raises_gives_a_reason_and_no_figures(tmp_path):
    def poisoned():
        raise DevicePoisonedError("cuda:0", "an illegal memory access")

    clock = FakeClock(5.0)
    gauge = MachineGauge(poisoned, now_s=clock.now_s, root=tmp_path, psutil=HOST)
    reading = gauge.read(Tier.VRAM)
    assert (reading.total_bytes, reading.at_s) == (0, 5.0)
    assert "illegal memory access" in reading.problem
    refused = MachineGauge(lambda: Unavailable("no NVML", "install it"), now_s=clock.now_s, root=tmp_path, psutil=HOST)
    assert refused.read(Tier.VRAM).problem == "no NVML"


def test_the_simulated_device_is_measured_by_itself_and_host_only_not_at_all():
    clock = FakeClock(1.0)
    device = SimulatedDevice(1 << 20, link_bytes_per_s=None)
    try:
        memory = device.allocate(1 << 18)
        reading = gauge_of(device, clock.now_s).read(Tier.VRAM)
        assert (reading.total_bytes, reading.free_bytes, reading.others_bytes) == (1 << 20, 3 << 18, 0)
        assert reading.source == device.name
        del memory
    finally:
        device.close()
    host = gauge_of(HostOnlyDevice(), clock.now_s)
    assert host.read(Tier.VRAM) is None
    assert host.read(Tier.RAM).total_bytes > 0
    assert host.read(Tier.DISK) is None


@pytest.mark.gpu
def test_a_cuda_device_is_measured_again_and_again_with_ours_told_from_others():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from modelcache.dataplane.device.cuda import CudaDevice

    clock, device = FakeClock(1.0), CudaDevice(0)
    try:
        gauge = gauge_of(device, clock.now_s)
        before = gauge.read(Tier.VRAM)
        assert (before.problem, before.at_s) == ("", 1.0)
        memory = device.allocate(256 << 20)
        clock.advance(1.0)
        after = gauge.read(Tier.VRAM)
        assert (after.total_bytes, after.at_s) == (before.total_bytes, 2.0)
        assert abs(after.others_bytes - before.others_bytes) < 64 << 20
        del memory
    finally:
        device.close()
