"""A cache that watches the memory under its budgets: by hand over fakes, and with real models on the simulated device."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benches import Bench

from modelcache import BudgetChange, BudgetExhaustedError, LeaseTimeoutError, ModelCache, ModelTooLargeError, MoveKind
from modelcache.core.governor import CALM_S
from modelcache.dataplane.probe.gauge import MachineGauge
from modelcache.runtime.governor import POLL_S
from modelcache.stats import MemoryReading
from modelcache.testing import FakeClock, FakePool, Hold, SimulatedDevice
from modelcache.tier import Tier
from modelcache.wiring import Parts, assemble


class ScriptedGauge:
    """What a test says of the machine: others' memory, stalls, silence. What the cache holds is counted itself."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.others = {Tier.RAM: 0, Tier.VRAM: 0}
        self.stalled: float | None = None
        self.problem = ""
        self.hold: Hold | None = None
        self.raises: Exception | None = None
        self.num_read = 0
        self.clock = FakeClock()
        self.cache: ModelCache | None = None
        self._last: dict[Tier, MemoryReading] = {}

    def read(self, tier: Tier) -> MemoryReading | None:
        self.num_read += 1
        if self.hold is not None:
            self.hold.stand()
        if self.raises is not None:
            raise self.raises
        if self.problem:
            return replace(self._last[tier], problem=self.problem)
        others, held = self.others[tier], self.cache.status().tier(tier).resident_bytes
        free = max(0, self.total - others - held)
        stalled, source = (self.stalled, "/proc/pressure/memory") if tier is Tier.RAM else (None, "")
        reading = MemoryReading(self.total, free, others, "memory.max", self.clock.now_s(), stalled, source)
        self._last[tier] = reading
        return reading


class Watched(Bench):
    """RAM of 200 on a machine of 300, VRAM of 40 on a device of 300."""

    def __init__(self, **options) -> None:
        self.gauge = ScriptedGauge(300)
        super().__init__(gauge=self.gauge, **options)
        self.gauge.clock, self.gauge.cache = self.clock, self.cache
        self.pool.settle()

    def seconds(self, count: float) -> None:
        self.pass_time(count, step=POLL_S)

    def budget(self, tier: Tier = Tier.RAM) -> int:
        return self.cache.status().tier(tier).budget_bytes

    def changes(self) -> tuple[BudgetChange, ...]:
        return self.cache.status().budget_changes


@pytest.fixture
def bench():
    bench = Watched()
    yield bench
    bench.close()


def watched(request, **options) -> Watched:
    bench = Watched(**options)
    request.addfinalizer(bench.close)
    return bench


# --- the budgets follow -----------------------------------------------------------------------------------------------


def test_idle_models_give_room_while_others_need_it_and_the_budget_comes_back(bench):
    bench.add("a", "b", "c", "d", "e", size=20)
    bench.use("a", "b", "c", "d", "e")
    assert bench.cache.status().tier(Tier.RAM).resident_bytes == 100
    bench.gauge.others[Tier.RAM] = 180
    bench.seconds(2)
    ram = bench.cache.status().tier(Tier.RAM)
    assert (ram.budget_bytes, ram.configured_bytes, ram.resident_bytes) == (60, 200, 60)
    # The duplicates of d and e, which VRAM holds, are what went.
    assert bench.states() == {"a": "parked", "b": "parked", "c": "parked", "d": "ready", "e": "ready"}
    bench.gauge.others[Tier.RAM] = 0
    bench.seconds(CALM_S - 1)
    assert bench.budget() == 60
    bench.seconds(3)
    assert bench.budget() == 200
    assert bench.cache.status().tier(Tier.RAM).pressure == ""
    bench.use("a", "b", "c", "d", "e")
    bench.validate()


def test_each_change_is_an_event_with_its_reason_its_source_and_the_age_of_the_figures(bench, caplog):
    caplog.set_level(logging.INFO, "modelcache")
    told = []
    end = bench.cache.on("budget", told.append)
    bench.add("a", "b", size=20)
    bench.use("a", "b")
    bench.gauge.others[Tier.RAM] = 270
    bench.seconds(1)
    (change,) = bench.changes()
    assert (change.seq, change.tier, change.before_bytes, change.configured_bytes) == (1, Tier.RAM, 200, 200)
    assert (change.after_bytes, change.source, change.age_s, change.at_s) == (0, "memory.max", 0.0, 1.0)
    assert change.reason == "100% of the 300 B of RAM are in use, above 90%"
    assert told == [change]
    (line,) = [record.getMessage() for record in caplog.records if "budget tier" in record.getMessage()]
    assert line.startswith("lowered budget tier=ram from=200 to=0 configured=200 reason='100% of the 300 B")
    (words,) = bench.cache.health().pressure
    assert words.startswith("budgets.ram is lowered from 200 B to 0 B for now: 100% of")
    assert "(lowered from 200 B for now)" in repr(bench.cache)
    assert bench.cache.health().is_ready
    end()
    bench.gauge.others[Tier.RAM] = 0
    bench.seconds(CALM_S + 2)
    assert [change.after_bytes for change in bench.changes()] == [0, 200]
    assert len(told) == 1
    assert bench.cache.health().pressure == ()


def test_a_leased_model_stays_and_follows_when_its_lease_is_returned(bench):
    bench.add("a", "b", size=40)
    with bench.cache.get("a"):
        bench.gauge.others[Tier.RAM] = 290
        bench.seconds(30)
        assert bench.state("a") == "ready"
        ram = bench.cache.status().tier(Tier.RAM)
        assert (ram.resident_bytes, ram.budget_bytes, ram.deficit_bytes) == (40, 0, 40)
        assert len(bench.changes()) == 1
    bench.pool.settle()
    assert bench.cache.status().tier(Tier.RAM).resident_bytes == 0
    bench.validate()


def test_a_vram_budget_set_above_the_share_it_began_as_holds_until_others_take_memory(bench):
    bench.cache._governor._vram_share = 0.1
    bench.cache.resize(vram=270)
    bench.seconds(5)
    assert bench.budget(Tier.VRAM) == 270
    bench.gauge.others[Tier.VRAM] = 100
    bench.seconds(2)
    assert bench.budget(Tier.VRAM) == 180


def test_stalls_lower_the_budget_of_ram_and_leave_vram_alone(bench):
    bench.gauge.stalled = 30.0
    bench.seconds(12)
    assert bench.budget(Tier.VRAM) == 40
    # Nothing is held, so the budget alone goes down, an eighth at a time.
    assert [change.after_bytes for change in bench.changes()] == [175, 150]
    assert {change.source for change in bench.changes()} == {"/proc/pressure/memory"}


def test_what_others_take_of_the_device_is_given_up_and_comes_back(bench):
    bench.add("a", "b", size=20)
    bench.use("a", "b")
    bench.gauge.others[Tier.VRAM] = 280
    bench.seconds(1)
    assert (bench.budget(Tier.VRAM), bench.budget()) == (20, 200)
    assert bench.states() == {"a": "parked", "b": "ready"}
    assert bench.mover.num_released == 0
    bench.seconds(3)
    # What the allocator kept of it is of use to the others only once it is the driver's again.
    assert bench.mover.num_released == 1
    assert bench.changes()[0].reason == "others hold 280 B of the device's 300 B"
    bench.gauge.others[Tier.VRAM] = 100
    bench.seconds(CALM_S + 2)
    assert bench.budget(Tier.VRAM) == 40


def test_on_a_machine_without_a_device_the_models_themselves_go_to_disk(request):
    bench = watched(request, ram=200, top=Tier.RAM)
    bench.add("a", "b", "c", size=60)
    bench.use("a", "b", "c")
    bench.gauge.others[Tier.RAM] = 100
    bench.seconds(1)
    assert bench.states() == {"a": "cold", "b": "ready", "c": "ready"}
    assert Tier.VRAM not in {change.tier for change in bench.changes()}


def test_changes_are_few_when_the_readings_swing(bench):
    bench.add("a", "b", "c", size=40)
    bench.use("a", "b", "c")
    for round_ in range(40):
        bench.gauge.others[Tier.RAM] = 180 if round_ % 2 else 60
        bench.seconds(20)
    # Lowered at the first swing; no quiet while of 30 s came.
    assert len(bench.changes()) == 1


# --- who is refused, and who waits ----------------------------------------------------------------------------------------


def test_what_no_longer_fits_is_refused_with_the_pressure_named_and_served_once_it_is_over(bench):
    bench.add("a", size=40)
    bench.gauge.others[Tier.RAM] = 290
    bench.seconds(1)
    with pytest.raises(BudgetExhaustedError) as raised:
        bench.cache.get("a")
    assert not isinstance(raised.value, ModelTooLargeError)
    assert str(raised.value) == (
        "'a' needs 40 B of ram, but only 0 B can be freed now; budgets.ram is lowered from 200 B to 0 "
        "B for now: 97% of the 300 B of RAM are in use, above 90% (memory.max); try again when there is "
        "memory, or free some"
    )
    assert "97%" in raised.value.pressure
    with pytest.raises(BudgetExhaustedError, match="lowered"):
        bench.cache.free(ram=10)
    bench.add("huge", size=201)
    with pytest.raises(ModelTooLargeError):
        bench.cache.get("huge")
    bench.gauge.others[Tier.RAM] = 0
    bench.seconds(CALM_S + 2)
    bench.use("a")


def test_a_first_load_that_proves_too_large_for_now_is_no_failure_of_its_loader(bench):
    bench.add("a", size=40)
    bench.cache.register(
        "b", bench.cache.model("c", reload=True)(lambda: __import__("modelcache").testing.FakeModel(40))
    )
    bench.gauge.others[Tier.RAM] = 290
    bench.seconds(1)
    for _ in range(6):
        with pytest.raises(BudgetExhaustedError, match="lowered"):
            bench.cache.get("b")
    bench.gauge.others[Tier.RAM] = 0
    bench.seconds(CALM_S + 2)
    bench.use("b")
    bench.validate()


def test_a_request_that_waits_for_a_lease_learns_that_the_budget_is_lowered(bench):
    bench.add("a", "b", size=20)
    with bench.cache.get("a"):
        bench.gauge.others[Tier.VRAM] = 280
        bench.seconds(1)
        late = bench.call(lambda: bench.cache.get("b", timeout=5))
        bench.pool.settle(num_callers=1)
        bench.seconds(6)
        error = late.failure()
        assert isinstance(error, LeaseTimeoutError)
        assert "a lease on 'a' to be returned; budgets.vram is lowered from 40 B to 20 B" in str(error)


def test_resize_sets_what_a_budget_is_lowered_from_and_returns_to(bench):
    bench.gauge.others[Tier.RAM] = 290
    bench.seconds(1)
    assert bench.budget() == 0
    bench.cache.resize(ram=100)
    ram = bench.cache.status().tier(Tier.RAM)
    assert (ram.budget_bytes, ram.pressure) == (100, "")
    bench.seconds(3)
    assert bench.budget() == 0
    bench.gauge.others[Tier.RAM] = 0
    bench.seconds(CALM_S + 2)
    assert bench.budget() == 100


# --- sources that vanish ---------------------------------------------------------------------------------------------------


def test_figures_that_are_no_longer_to_be_had_change_nothing_and_are_told_of_once(bench, caplog):
    caplog.set_level(logging.INFO, "modelcache")
    bench.gauge.others[Tier.RAM] = 250
    bench.seconds(1)
    lowered = bench.budget()
    assert lowered < 200
    bench.gauge.problem = "NVML is not available (GPU_IS_LOST)"
    bench.seconds(2 * CALM_S)
    assert bench.budget() == lowered
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2  # One for each tier.
    assert "budgets.ram cannot be read: NVML is not available (GPU_IS_LOST); last figures age_s=1.0" in warnings[1]
    assert bench.cache.health().pressure[1:] == (
        "vram: NVML is not available (GPU_IS_LOST)",
        "ram: NVML is not available (GPU_IS_LOST)",
    )
    bench.gauge.problem, bench.gauge.others[Tier.RAM] = "", 0
    bench.seconds(CALM_S - 1)
    assert bench.budget() == lowered
    bench.seconds(3)
    assert bench.budget() == 200
    assert sum("can be read again after: NVML" in record.getMessage() for record in caplog.records) == 2


def test_a_gauge_that_raises_ends_nothing(bench, caplog):
    bench.gauge.raises = OSError("broken")
    bench.seconds(3)
    assert [record.levelname for record in caplog.records].count("WARNING") == 2
    bench.gauge.raises, bench.gauge.others[Tier.RAM] = None, 290
    bench.seconds(1)
    assert bench.budget() == 0


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_subscriber_that_raises_is_reported_and_the_next_is_told(bench, caplog, error):
    def leave(_):
        raise error

    told = []
    bench.cache.on("budget", leave)
    bench.cache.on("budget", told.append)
    bench.gauge.others[Tier.RAM] = 290
    bench.seconds(1)
    assert len(told) == 1
    assert "subscriber failed event=budget" in caplog.text


class Group:
    """A control group in files, over a host with memory to spare."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "sys/fs/cgroup/box"
        self.write("proc/self/cgroup", "0::/box")
        self.write("proc/self/mountinfo", "30 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw")
        self.set(max=300, current=0, pressure="some avg10=0.00 avg60=0.00 avg300=0.00 total=0")

    def write(self, path: str, text: object) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(f"{text}\n")

    def set(self, **files: object) -> None:
        for name, text in files.items():
            self.write(f"sys/fs/cgroup/box/memory.{name}", text)

    def virtual_memory(self) -> SimpleNamespace:
        return SimpleNamespace(total=1 << 40, available=1 << 39)

    def Process(self) -> SimpleNamespace:
        return SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))


def test_a_control_groups_limit_lowered_while_the_cache_runs_is_kept_to_and_its_files_may_vanish(tmp_path, caplog):
    group, clock = Group(tmp_path), FakeClock()
    bench = Bench(gauge=MachineGauge(None, now_s=lambda: clock.now_s(), root=tmp_path, psutil=group))
    clock = bench.clock
    bench.add("a", "b", "c", "d", size=40)
    bench.use("a", "b", "c", "d")
    group.set(current=160)
    bench.pass_time(3, step=POLL_S)
    assert bench.cache.status().budget_changes == ()
    group.set(max=170)
    bench.pass_time(2, step=POLL_S)
    (change,) = bench.cache.status().budget_changes
    assert (change.after_bytes, change.source) == (136, "/sys/fs/cgroup/box/memory.max")
    # Duplicates first: d, in VRAM, needs none in RAM.
    assert bench.states() == {"a": "parked", "b": "parked", "c": "parked", "d": "ready"}
    group.set(current=120)
    (group.folder / "memory.current").unlink()
    bench.pass_time(2 * CALM_S, step=POLL_S)
    assert bench.cache.status().tier(Tier.RAM).budget_bytes == 136
    (words,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "/sys/fs/cgroup/box/memory.current cannot be read (No such file or directory)" in words
    group.set(max=300, current=120)
    bench.pass_time(CALM_S + 2, step=POLL_S)
    assert bench.cache.status().tier(Tier.RAM).budget_bytes == 200
    group.set(pressure="some avg10=66.00 avg60=0.00 avg300=0.00 total=0")
    bench.pass_time(1, step=POLL_S)
    last = bench.cache.status().budget_changes[-1]
    assert (last.after_bytes, last.source) == (120 - 25, "/sys/fs/cgroup/box/memory.pressure")
    bench.close()


# --- the thread ------------------------------------------------------------------------------------------------------------


def test_it_reads_once_a_second_and_not_before(bench):
    assert bench.gauge.num_read == 0
    bench.pass_time(POLL_S / 2)
    assert bench.gauge.num_read == 0
    bench.seconds(10)
    assert bench.gauge.num_read == 2 * 10


def test_closing_ends_the_thread_at_once_also_in_the_middle_of_a_reading(bench):
    bench.gauge.hold = bench.pool.hold()
    bench.clock.advance(POLL_S)
    assert bench.gauge.hold.wait_reached()
    threading.Timer(0.05, bench.gauge.hold.release).start()
    bench.cache.close()
    assert bench.pool.thread_names == ()


def test_closing_from_a_subscriber_ends_everything(request):
    bench = watched(request)
    closed = threading.Event()

    def close(_change):
        bench.cache.close()
        closed.set()

    bench.cache.on("budget", close)
    bench.gauge.others[Tier.RAM] = 290
    bench.clock.advance(POLL_S)
    assert closed.wait(10.0)


def test_without_being_asked_for_there_is_no_thread_and_there_are_no_changes():
    plain = Bench()
    assert not any("governor" in name for name in plain.pool.thread_names)
    assert plain.cache.status().budget_changes == ()
    plain.cache.on("budget", print)()
    plain.close()


def test_a_cache_of_its_own_watches_the_real_machine_when_asked_to(monkeypatch):
    device = SimulatedDevice(1 << 20, link_bytes_per_s=None)
    with ModelCache(device=device, vram="512KiB", ram="8MiB", pressure="watch", progress=False) as cache:
        assert any(thread.name == "modelcache-governor" for thread in threading.enumerate())
        assert cache._parts.vram_share == 1.0
        reading = cache._parts.gauge.read(Tier.RAM)
        assert 0 < reading.free_bytes <= reading.total_bytes
        assert cache._parts.gauge.read(Tier.VRAM).total_bytes == 1 << 20
    monkeypatch.setenv("MODELCACHE_POLICY__PRESSURE", "watch")
    device = SimulatedDevice(1 << 20, link_bytes_per_s=None)
    with ModelCache(device=device, vram="50%", ram="8MiB", progress=False) as cache:
        assert cache._parts.gauge is not None
        assert cache._parts.vram_share == 0.5


# --- real models -----------------------------------------------------------------------------------------------------------

LAYER_BYTES = 4 * 64 * 64
MODEL_BYTES = 8 * LAYER_BYTES


def net(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(64, 64, bias=False) for _ in range(8))
    return torch.nn.Sequential(*layers).requires_grad_(requires_grad=False)


class Real:
    """Real models, the simulated device and the shipped mover; time and readings by hand."""

    def __init__(self, tmp_path) -> None:
        given = dict.fromkeys(("page_locked", "policy", "when_full", "idle", "pressure", "max_waiters", "lease_sites"))
        given |= {"device": SimulatedDevice(8 << 20, link_bytes_per_s=None), "image_dir": tmp_path, "progress": False}
        given |= {"vram": 2 * MODEL_BYTES, "ram": 6 * MODEL_BYTES, "disk": 8 * MODEL_BYTES, "segment": 2 * LAYER_BYTES}
        self.clock, self.pool, self.gauge = FakeClock(), FakePool(), ScriptedGauge(10 * MODEL_BYTES)
        parts: Parts = replace(assemble(given), clock=self.clock, pool=self.pool, gauge=self.gauge)
        self.cache = ModelCache._of(parts)
        self.gauge.clock, self.gauge.cache = self.clock, self.cache
        for name in "abcd":
            self.cache.register(name, lambda name=name: net(ord(name)), reload=name in "ac")
            with self.cache.get(name):
                pass
        self.pool.settle()

    def seconds(self, count: float) -> None:
        for _ in range(int(count)):
            self.clock.advance(POLL_S)
            self.pool.settle()

    def ram(self) -> tuple[int, int, int]:
        """Budget, held, and not yet given up, in models."""
        stats = self.cache.status().tier(Tier.RAM)
        return tuple(size // MODEL_BYTES for size in (stats.budget_bytes, stats.resident_bytes, stats.deficit_bytes))

    def is_intact(self, name: str) -> bool:
        with self.cache.get(name) as model:
            pairs = zip(model.parameters(), net(ord(name)).parameters(), strict=True)
            return all(torch.equal(ours.cpu(), theirs) for ours, theirs in pairs)


@pytest.fixture
def real(tmp_path):
    real = Real(tmp_path)
    yield real
    real.cache.close()


def test_real_models_leave_ram_for_others_and_are_bit_identical_when_they_come_back(real):
    assert real.ram() == (6, 4, 0)
    seen = len(real.cache.events())
    real.gauge.others[Tier.RAM] = 6 * MODEL_BYTES
    real.seconds(2)
    assert real.ram() == (2, 2, 0)
    moves = real.cache.events()[seen:]
    # c's duplicate goes for nothing; then a, which can be read again; b and d, which cannot, would come last.
    assert {(move.kind, move.model, move.copied_bytes) for move in moves} == {
        (MoveKind.SHED, "c", 0),
        (MoveKind.EVICT, "a", 0),
    }
    real.gauge.others[Tier.RAM] = 10 * MODEL_BYTES
    real.seconds(20)
    assert real.ram() == (0, 0, 0)
    assert [real.cache.info(name).disk_bytes > 0 for name in "abcd"] == [False, True, False, True]
    assert real.cache.info("c").vram_bytes == MODEL_BYTES
    real.gauge.others[Tier.RAM] = 0
    real.seconds(CALM_S + 2)
    assert real.ram()[0] == 6
    assert all(real.is_intact(name) for name in "abcd")


def test_a_leased_real_model_is_not_touched_while_all_others_go(real):
    with real.cache.get("d") as model:
        at = [parameter.data_ptr() for parameter in model.parameters()]
        real.gauge.others[Tier.RAM] = 10 * MODEL_BYTES
        real.seconds(30)
        assert real.ram() == (0, 1, 1)
        assert [parameter.data_ptr() for parameter in model.parameters()] == at
        assert model(torch.ones(1, 64, device="sim:0")).shape == (1, 64)
        info = real.cache.info("d")
        assert (info.vram_bytes, info.ram_bytes) == (MODEL_BYTES, MODEL_BYTES)
    real.pool.settle()
    assert real.ram() == (0, 0, 0)
    real.gauge.others[Tier.RAM] = 0
    real.seconds(CALM_S + 2)
    assert real.ram()[0] == 6
    assert real.is_intact("d")
