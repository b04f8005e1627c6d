from types import SimpleNamespace

import psutil
import pytest

from modelcache.dataplane.probe.ram import RamProbe

GIB = 1024**3
V2_MOUNT = "30 23 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


class FakePsutil:
    """A host of 256 GiB with 200 GiB available, and a process of 1 GiB."""

    def __init__(self, total=256 * GIB, available=200 * GIB, rss=GIB):
        self.memory = SimpleNamespace(total=total, available=available)
        self.rss = rss

    def virtual_memory(self):
        return self.memory

    def Process(self):
        return SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=self.rss))


class Machine:
    """Lays out /proc/self and control groups below a folder."""

    def __init__(self, root):
        self.root = root

    def proc(self, cgroup, mountinfo):
        folder = self.root / "proc/self"
        folder.mkdir(parents=True)
        (folder / "cgroup").write_text(cgroup)
        (folder / "mountinfo").write_text(mountinfo)
        return self

    def group(self, path, **files):
        folder = self.root / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(f"{text}\n")
        return self

    def read(self, fake=None, **options):
        return RamProbe(self.root, psutil=fake or FakePsutil(), now_s=lambda: 7.0).read(**options)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_without_control_groups_the_host_is_the_answer(machine):
    reading = machine.read()
    assert (reading.total_bytes, reading.free_bytes) == (256 * GIB, 200 * GIB)
    assert (reading.source, reading.free_source) == ("psutil", "psutil")
    assert (reading.at_s, reading.age_s, reading.stale, reading.unified) == (7.0, 0.0, False, False)


def test_what_the_process_holds_itself_is_not_others(machine):
    assert machine.read().others_bytes == 55 * GIB
    assert machine.read(ours_bytes=56 * GIB).others_bytes == 0


def test_a_version_2_limit_binds_below_the_host(machine):
    machine.proc("0::/\n", V2_MOUNT)
    machine.group("/sys/fs/cgroup", memory__max=90 * GIB, memory__current=30 * GIB, memory__stat="anon 1\nfile 2")
    reading = machine.read()
    assert (reading.total_bytes, reading.free_bytes) == (90 * GIB, 60 * GIB)
    assert reading.source == "/sys/fs/cgroup/memory.max"
    assert reading.free_source == "/sys/fs/cgroup/memory.max"


def test_file_cache_that_can_be_dropped_counts_as_free(machine):
    machine.proc("0::/\n", V2_MOUNT)
    machine.group(
        "/sys/fs/cgroup",
        memory__max=90 * GIB,
        memory__current=80 * GIB,
        memory__stat=f"anon {20 * GIB}\ninactive_file {50 * GIB}\nactive_file {10 * GIB}",
    )
    assert machine.read().free_bytes == 60 * GIB


def test_the_throttling_limit_binds_when_it_is_lower(machine):
    machine.proc("0::/\n", V2_MOUNT)
    machine.group("/sys/fs/cgroup", memory__max=90 * GIB, memory__high=64 * GIB, memory__current=0)
    reading = machine.read()
    assert reading.total_bytes == 64 * GIB
    assert reading.source == "/sys/fs/cgroup/memory.high"


def test_max_is_no_limit(machine):
    machine.proc("0::/user.slice\n", V2_MOUNT)
    machine.group("/sys/fs/cgroup/user.slice", memory__max="max", memory__high="max", memory__current=GIB)
    assert machine.read().source == "psutil"


def test_a_parent_slice_binds_over_a_looser_leaf(machine):
    machine.proc("0::/jobs.slice/jobs-gpu.slice/run.scope\n", V2_MOUNT)
    machine.group("/sys/fs/cgroup/jobs.slice/jobs-gpu.slice/run.scope", memory__max=64 * GIB, memory__current=GIB)
    machine.group("/sys/fs/cgroup/jobs.slice/jobs-gpu.slice", memory__max="max", memory__current=GIB)
    machine.group("/sys/fs/cgroup/jobs.slice", memory__max=32 * GIB, memory__current=30 * GIB)
    reading = machine.read()
    assert (reading.total_bytes, reading.free_bytes) == (32 * GIB, 2 * GIB)
    assert reading.source == "/sys/fs/cgroup/jobs.slice/memory.max"


def test_total_and_free_may_be_bound_by_different_levels(machine):
    machine.proc("0::/a/b\n", V2_MOUNT)
    machine.group("/sys/fs/cgroup/a/b", memory__max=16 * GIB, memory__current=GIB)
    machine.group("/sys/fs/cgroup/a", memory__max=40 * GIB, memory__current=37 * GIB)
    reading = machine.read()
    assert (reading.total_bytes, reading.source) == (16 * GIB, "/sys/fs/cgroup/a/b/memory.max")
    assert (reading.free_bytes, reading.free_source) == (3 * GIB, "/sys/fs/cgroup/a/memory.max")


def test_the_hosts_namespace_is_followed_from_the_membership(machine):
    scope = "/system.slice/docker-3f2a.scope"
    machine.proc(f"0::{scope}\n", V2_MOUNT)
    machine.group(f"/sys/fs/cgroup{scope}", memory__max=8 * GIB, memory__current=2 * GIB)
    assert machine.read().source == f"/sys/fs/cgroup{scope}/memory.max"


def test_a_group_mounted_as_the_root_is_found_at_the_mount_point(machine):
    mount = "40 30 0:30 /docker/3f2a /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    machine.proc("5:memory:/docker/3f2a\n", mount)
    machine.group("/sys/fs/cgroup/memory", memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=2 * GIB)
    reading = machine.read()
    assert (reading.total_bytes, reading.free_bytes) == (8 * GIB, 6 * GIB)
    assert reading.source == "/sys/fs/cgroup/memory/memory.limit_in_bytes"


@pytest.mark.parametrize("path", ["/../other.scope", "/elsewhere"])
def test_a_membership_outside_the_mount_reads_the_mount_point(machine, path):
    machine.proc(f"0::{path}\n", V2_MOUNT.replace("0:27 / /sys", "0:27 /box /sys"))
    machine.group("/sys/fs/cgroup", memory__max=4 * GIB, memory__current=0)
    assert machine.read().total_bytes == 4 * GIB


@pytest.mark.parametrize("unlimited", [9223372036854771712, 9223372036854710272])
def test_version_1_writes_unlimited_as_a_huge_number(machine, unlimited):
    machine.proc(
        "4:memory:/job\n0::/\n",
        "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
    )
    machine.group(
        "/sys/fs/cgroup/memory/job",
        memory__limit_in_bytes=unlimited,
        memory__usage_in_bytes=GIB,
        memory__stat=f"hierarchical_memory_limit {unlimited}",
    )
    machine.group("/sys/fs/cgroup/unified", cgroup__procs=1)
    assert [figure.source for figure in machine.read().figures] == ["psutil", "psutil"]


def test_a_version_1_parent_that_cannot_be_seen_still_binds(machine):
    machine.proc("4:memory:/docker/a\n", "35 31 0:32 /docker/a /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n")
    machine.group(
        "/sys/fs/cgroup/memory",
        memory__limit_in_bytes=32 * GIB,
        memory__usage_in_bytes=2 * GIB,
        memory__stat=f"total_inactive_file {GIB}\nhierarchical_memory_limit {12 * GIB}",
    )
    reading = machine.read()
    assert reading.total_bytes == 12 * GIB
    assert reading.source == "/sys/fs/cgroup/memory/memory.stat hierarchical_memory_limit"
    assert {figure.size_bytes for figure in reading.figures if figure.what == "free"} == {200 * GIB, 31 * GIB}


@pytest.mark.parametrize(("hierarchical", "expected"), [(1, 4 * GIB), (0, 16 * GIB)])
def test_a_version_1_parent_binds_only_a_hierarchy(machine, hierarchical, expected):
    machine.proc("4:memory:/a/b\n", "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n")
    machine.group("/sys/fs/cgroup/memory/a/b", memory__limit_in_bytes=16 * GIB, memory__usage_in_bytes=0)
    machine.group("/sys/fs/cgroup/memory/a", memory__limit_in_bytes=4 * GIB, memory__use_hierarchy=hierarchical)
    assert machine.read().total_bytes == expected


def test_both_versions_at_once_take_the_lower(machine):
    machine.proc(
        "4:cpu,memory:/job\n0::/job\n",
        "35 31 0:32 / /sys/fs/cgroup/mem rw - cgroup cgroup rw,cpu,memory\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
    )
    machine.group("/sys/fs/cgroup/mem/job", memory__limit_in_bytes=20 * GIB)
    machine.group("/sys/fs/cgroup/unified/job", memory__max=10 * GIB)
    assert machine.read().source == "/sys/fs/cgroup/unified/job/memory.max"


def test_blanks_in_paths_are_written_as_octal(machine):
    machine.proc("0::/my job\n", V2_MOUNT.replace("/sys/fs/cgroup", "/mnt/c\\040groups"))
    machine.group("/mnt/c groups/my job", memory__max=3 * GIB, memory__current=0)
    assert machine.read().source == "/mnt/c groups/my job/memory.max"


def test_a_limit_lowered_at_run_time_is_seen_by_the_next_reading(machine):
    machine.proc("0::/\n", V2_MOUNT).group("/sys/fs/cgroup", memory__max=90 * GIB, memory__current=0)
    probe = RamProbe(machine.root, psutil=FakePsutil())
    assert probe.read().total_bytes == 90 * GIB
    machine.group("/sys/fs/cgroup", memory__max=10 * GIB, memory__current=12 * GIB)
    reading = probe.read()
    assert (reading.total_bytes, reading.free_bytes) == (10 * GIB, 0)


def test_files_that_make_no_sense_set_no_limit(machine):
    machine.proc("nonsense\n0\n:::\n0::/\n", f"\ngarbage - cgroup2\n{V2_MOUNT}")
    machine.group("/sys/fs/cgroup", memory__max="12 GiB", memory__high="", memory__stat="inactive_file many\n\nx")
    (machine.root / "sys/fs/cgroup/memory.current").mkdir()
    assert machine.read().source == "psutil"


def test_a_group_whose_use_cannot_be_read_limits_the_total_and_the_free(machine):
    machine.proc("0::/\n", V2_MOUNT).group("/sys/fs/cgroup", memory__max=90 * GIB)
    reading = machine.read()
    assert (reading.total_bytes, reading.free_bytes) == (90 * GIB, 90 * GIB)
    assert reading.free_source == "/sys/fs/cgroup/memory.max"


def test_this_machine_can_be_read():
    reading = RamProbe().read()
    assert 0 < reading.free_bytes <= reading.total_bytes <= psutil.virtual_memory().total
    assert reading.used_bytes == reading.total_bytes - reading.free_bytes
