import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from modelcache import MachineReport, Reading, Unavailable
from modelcache.cli import doctor as doctor_module
from modelcache.cli.app import app
from modelcache.cli.checks import (
    Check,
    State,
    TorchFacts,
    ask_torch,
    check_devices,
    check_disk,
    check_distributions,
    check_lockable,
    check_nvml,
    check_python,
    check_ram,
    check_stalls,
    check_torch,
    check_wsl,
)
from modelcache.dataplane.probe.machine import Stalls

GIB = 1024**3


def reading(total=24, free=20, source="nvml", **more):
    used = (total - free) * GIB
    return Reading(total * GIB, free * GIB, used, used, source, source, at_s=0.0, name="NVIDIA L4", **more)


def machine(*devices, nvml=None, cuda="13.0"):
    return MachineReport(nvml, "580.126.09", cuda, devices, reading(64, 32, "psutil"))


def card(memory=None, users=(), link="PCIe 4.0 x16"):
    return SimpleNamespace(index=0, name="NVIDIA L4", memory=memory or reading(), users=users, link=link)


def torch(cuda="13.0", is_available=True, devices=("NVIDIA L4",), error="", hip=None):
    version = f"2.13.0+cu{cuda.replace('.', '')}" if cuda else "2.13.0+cpu"
    return TorchFacts(version, cuda, hip, is_available, devices if is_available else (), error)


# --- torch and the driver -------------------------------------------------------------------------------------------


def test_torch_that_cannot_be_imported_is_a_problem():
    check = check_torch(Unavailable("torch cannot be imported: no libfoo", "reinstall torch"), machine())
    assert check == Check("torch", State.PROBLEM, "torch cannot be imported: no libfoo", "reinstall torch")


def test_a_cpu_build_beside_a_card_is_a_problem():
    check = check_torch(torch(cuda=None, is_available=False), machine(card()))
    assert check.state is State.PROBLEM
    assert check.found == "2.13.0+cpu (CPU build), but this machine has NVIDIA L4"
    assert check.fix.startswith("install a CUDA build of torch")


def test_a_cpu_build_without_a_card_is_fine():
    assert check_torch(torch(cuda=None, is_available=False), machine()).state is State.OK


def test_a_torch_newer_than_the_driver_names_both_versions():
    check = check_torch(torch(is_available=False, error="driver too old"), machine(card(), cuda="12.8"))
    assert check.found == "2.13.0+cu130 (CUDA 13.0), newer than the driver's CUDA 12.8: driver too old"
    assert check.fix == "update the driver, or install a torch built for CUDA 12.8"


def test_a_torch_that_sees_no_card_points_at_the_visible_devices():
    check = check_torch(torch(is_available=False), machine(card()))
    assert check.state is State.PROBLEM
    assert "CUDA_VISIBLE_DEVICES" in check.fix


def test_a_torch_that_sees_its_cards_names_them():
    assert check_torch(torch(), machine(card())).found == "2.13.0+cu130 (CUDA 13.0), sees NVIDIA L4"


def test_a_rocm_build_is_named():
    assert "ROCm 6.4" in check_torch(torch(cuda=None, hip="6.4"), machine()).found


def test_torch_is_asked_in_a_process_of_its_own():
    found = ask_torch()
    assert isinstance(found, TorchFacts)
    assert found.version.startswith("2.")


def test_a_torch_that_does_not_answer_in_time_is_reported():
    assert ask_torch(timeout_s=0.001).reason.startswith("torch does not answer")


@pytest.mark.parametrize("code", ["LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED"])
def test_a_machine_without_a_gpu_is_no_problem_but_one_without_its_driver_is(code):
    without = machine(nvml=Unavailable("NVML is not available (x)", "load the driver", code))
    assert check_nvml(without, has_driver_files=False).state is State.NOTE
    assert check_nvml(without, has_driver_files=True) == Check(
        "nvml", State.PROBLEM, "NVML is not available (x)", "load the driver"
    )


def test_a_version_mismatch_is_a_problem_even_without_driver_files():
    broken = machine(nvml=Unavailable("NVML is not available (mismatch)", "reboot", "LIB_RM_VERSION_MISMATCH"))
    assert check_nvml(broken, has_driver_files=False).state is State.PROBLEM


def test_a_working_driver_shows_its_versions():
    assert check_nvml(machine(card()), has_driver_files=True).found == "driver 580.126.09, CUDA 13.0"


# --- cards ----------------------------------------------------------------------------------------------------------


def test_a_card_that_does_not_tell_its_memory_is_a_problem_with_a_way_around_it():
    refused = card(memory=Unavailable("NVML refused to answer (no permission)", "run as another user"))
    [check] = check_devices(machine(refused), own_pid=1)
    assert check.state is State.PROBLEM
    assert check.fix == 'run as another user; until then give budgets.vram an absolute size such as "20GiB"'


def test_a_card_shows_its_memory_and_link():
    [check] = check_devices(machine(card()), own_pid=1)
    assert check.found == "NVIDIA L4: 20.0 GiB of 24.0 GiB free, PCIe 4.0 x16"


def test_a_unified_card_says_whose_memory_it_is():
    [check] = check_devices(machine(card(memory=reading(128, 100, unified=True), link=None)), own_pid=1)
    assert check.found == "NVIDIA L4: 100.0 GiB of 128.0 GiB free, shared with the machine"


def test_other_users_of_a_card_are_listed_without_this_process():
    users = [SimpleNamespace(pid=pid, used_bytes=used) for pid, used in ((7, None), (8, GIB), (9, GIB))]
    [_, check] = check_devices(machine(card(users=users)), own_pid=9)
    assert check.found == "also used by pid 7, pid 8 1.0 GiB; budgets in percent leave that out"


def test_users_that_may_not_be_listed_are_left_out():
    assert len(list(check_devices(machine(card(users=Unavailable("no", "no"))), own_pid=1))) == 1


# --- packages -------------------------------------------------------------------------------------------------------


def test_the_inactive_pynvml_distribution_is_a_problem():
    [check] = check_distributions({"pynvml": "13.0.1"}, ())
    assert check.state is State.PROBLEM
    assert check.fix == "pip uninstall -y pynvml && pip install --force-reinstall nvidia-ml-py"


@pytest.mark.parametrize(
    ("version", "found"),
    [("5.2.9", "5.2.9 is older than 5.3"), ("4.57", "4.57 is older than 5.3"), (None, "not installed")],
)
def test_a_package_that_is_too_old_or_missing_is_a_problem(version, found):
    [check] = check_distributions({"transformers": version}, ["transformers>=5.3"])
    assert (check.state, check.found) == (State.PROBLEM, found)
    assert check.fix == 'pip install --upgrade "transformers>=5.3"'


@pytest.mark.parametrize("version", ["5.3", "5.3.0", "5.10.0.dev0", "5.3rc1", "6"])
def test_a_package_that_is_new_enough_is_fine(version):
    [check] = check_distributions({"transformers": version}, ["transformers>=5.3", "scipy>=9; extra == 'ab'"])
    assert check == Check("transformers", State.OK, version)


def test_an_old_python_is_a_problem():
    assert check_python((3, 10, 4)) == Check("python", State.PROBLEM, "3.10.4", "install Python 3.11 or newer")
    assert check_python((3, 12, 1)).state is State.OK


# --- limits ---------------------------------------------------------------------------------------------------------


def test_ram_limited_by_a_control_group_says_which_and_what_the_host_has():
    host = SimpleNamespace(what="total", source="psutil", size_bytes=754 * GIB)
    check = check_ram(reading(90, 60, "/sys/fs/cgroup/memory.max", figures=(host,)))
    assert check.state is State.NOTE
    assert check.found == ("60.0 GiB of 90.0 GiB free; limited by /sys/fs/cgroup/memory.max (the host has 754.0 GiB)")


def test_ram_that_only_the_host_limits_is_fine():
    assert check_ram(reading(64, 32, "psutil")).state is State.OK


def test_stalls_are_shown_with_their_source_and_many_of_them_are_a_warning():
    found = Stalls(0.5, "/proc/pressure/memory")
    assert check_stalls(replace(machine(), stalls=found)).found == "0.5 % of the last 10 s (/proc/pressure/memory)"
    assert check_stalls(replace(machine(), stalls=found)).state is State.OK
    many = check_stalls(replace(machine(), stalls=Stalls(42.0, "/sys/fs/cgroup/memory.pressure")))
    assert many.state is State.WARNING
    assert "policy.pressure: watch" in many.fix
    assert check_stalls(machine()).state is State.NOTE


def test_little_lockable_memory_is_a_warning_only_beside_a_card():
    assert check_lockable(8 << 20, has_cards=True).state is State.WARNING
    assert check_lockable(8 << 20, has_cards=False).state is State.OK
    assert check_lockable(-1, has_cards=True).found == "unlimited"


def test_windows_around_linux_is_a_warning():
    [check] = check_wsl("Linux version 6.6.87.2-microsoft-standard-WSL2")
    assert check.state is State.WARNING
    assert list(check_wsl("Linux version 6.18.5")) == []


def test_a_disk_is_measured_on_a_file_that_can_be_read(tmp_path):
    missing = check_disk(tmp_path / "none", doctor_module._measure_disk)
    assert (missing.state, missing.found) == (State.PROBLEM, f"{tmp_path}/none: No such file or directory")
    small = tmp_path / "small"
    small.write_bytes(b"x" * 1000)
    assert check_disk(small, doctor_module._measure_disk).state is State.NOTE
    measured = check_disk(Path("/models/a"), lambda path: (2 * GIB, 2.0))
    assert measured.found == "1.07 GB/s over 2.0 GiB of /models/a"


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_machine(monkeypatch):
    broken = machine(nvml=Unavailable("NVML is not available ([x])", "reboot", "LIB_RM_VERSION_MISMATCH"))
    monkeypatch.setattr(doctor_module, "machine_report", lambda: broken)
    monkeypatch.setattr(doctor_module, "ask_torch", lambda: torch(cuda=None, is_available=False))


def test_the_command_fails_with_3_and_shows_each_fix(broken_machine):
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 3
    assert "nvml" in result.stdout
    assert "NVML is not available ([x])" in result.stdout
    assert "fix: reboot" in result.stdout
    assert result.stderr == "problems found: 1\n"


def test_the_command_writes_json(broken_machine):
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert found["problems"] == 1
    assert {"name": "nvml", "state": "problem", "found": "NVML is not available ([x])", "fix": "reboot"} in found[
        "checks"
    ]


def test_the_command_runs_on_this_machine(monkeypatch, tmp_path):
    # Asking torch takes seconds and has its own test.
    monkeypatch.setattr(doctor_module, "ask_torch", lambda: torch(cuda=None, is_available=False))
    result = CliRunner().invoke(app, ["doctor", "--json", "--disk", str(tmp_path)])
    found = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert found["disk"]["found"] == f"{tmp_path}: Is a directory"
    assert found["transformers"]["state"] == "ok"
    assert result.exit_code == 3
