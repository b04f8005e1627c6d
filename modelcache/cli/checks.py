"""The checks of ``modelcache doctor``: what is found on this machine, whether it is a problem, and the fix.

Each check takes what it judges as arguments, so that every answer can be tested on any machine.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from modelcache import MachineReport, Reading, Unavailable, format_bytes

_LEAST_PYTHON = (3, 11)
_LITTLE_LOCKABLE_BYTES = 1 << 30
_LEAST_DISK_BYTES = 64 << 20
_MANY_STALLS_PERCENT = 10.0
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+)")
# Run apart: importing torch takes seconds, and a broken CUDA installation may end the process that does it.
_ASK_TORCH = """
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "devices": [], "error": ""}
try:
    found["is_available"] = torch.cuda.is_available()
    if not found["is_available"] and found["cuda"]:
        torch.cuda.init()
    found["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
except Exception as error:
    found["error"] = str(error).splitlines()[0]
print(json.dumps(found))
"""


class State(Enum):
    """How a check ended. Only a `PROBLEM` makes the command fail."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at."""

    name: str
    state: State
    found: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """What torch says about itself in a process of its own."""

    version: str
    cuda: str | None
    hip: str | None
    is_available: bool
    devices: tuple[str, ...]
    error: str = ""


def ask_torch(timeout_s: float = 120.0) -> TorchFacts | Unavailable:
    """Start a Python that imports torch and tells; the reason when it does not."""
    try:
        done = subprocess.run(  # noqa: S603, our own interpreter with our own text
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=timeout_s, check=False
        )
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return Unavailable(f"torch does not answer ({error})", "reinstall torch")
    if found is None:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return Unavailable(f"torch cannot be imported: {last[0]}", "reinstall torch")
    return TorchFacts(
        found["version"],
        found["cuda"],
        found["hip"],
        bool(found.get("is_available")),
        tuple(found["devices"]),
        found["error"],
    )


def check_python(version: tuple[int, ...]) -> Check:
    """The interpreter."""
    text = ".".join(str(number) for number in version[:3])
    if version[:2] < _LEAST_PYTHON:
        return Check("python", State.PROBLEM, text, "install Python 3.11 or newer")
    return Check("python", State.OK, text)


def check_torch(torch: TorchFacts | Unavailable, machine: MachineReport) -> Check:
    """Whether torch is there, and able to use the cards that are."""
    if isinstance(torch, Unavailable):
        return Check("torch", State.PROBLEM, torch.reason, torch.fix)
    build = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "CPU build"
    found = f"{torch.version} ({build})"
    if torch.is_available:
        return Check("torch", State.OK, f"{found}, sees {', '.join(torch.devices)}")
    if not machine.devices:
        return Check("torch", State.OK, found)
    if not torch.cuda:
        fix = "install a CUDA build of torch (https://pytorch.org/get-started/locally)"
        return Check("torch", State.PROBLEM, f"{found}, but this machine has {machine.devices[0].name}", fix)
    why = f": {torch.error}" if torch.error else ""
    if _number(torch.cuda) > _number(machine.cuda_version):
        fix = f"update the driver, or install a torch built for CUDA {machine.cuda_version}"
        return Check("torch", State.PROBLEM, f"{found}, newer than the driver's CUDA {machine.cuda_version}{why}", fix)
    fix = "check CUDA_VISIBLE_DEVICES and that nvidia-smi works"
    return Check("torch", State.PROBLEM, f"{found}, sees no CUDA device{why}", fix)


def check_nvml(machine: MachineReport, has_driver_files: bool) -> Check:
    """Whether the driver tells the memory of the cards."""
    if machine.nvml is None:
        return Check("nvml", State.OK, f"driver {machine.driver_version}, CUDA {machine.cuda_version}")
    if machine.nvml.code in {"LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED"} and not has_driver_files:
        found = "no NVIDIA GPU on this machine; 'device: auto' keeps models in RAM"
        return Check("nvml", State.NOTE, found)
    return Check("nvml", State.PROBLEM, machine.nvml.reason, machine.nvml.fix)


def check_devices(machine: MachineReport, own_pid: int) -> Iterator[Check]:
    """Each card: its memory, its link, and who else uses it."""
    for device in machine.devices:
        name = f"gpu {device.index}"
        memory = device.memory
        if isinstance(memory, Unavailable):
            fix = f'{memory.fix}; until then give budgets.vram an absolute size such as "20GiB"'
            yield Check(name, State.PROBLEM, f"{device.name}: {memory.reason}", fix)
            continue
        shared = ", shared with the machine" if memory.unified else ""
        link = f", {device.link}" if device.link is not None else ""
        sizes = f"{format_bytes(memory.free_bytes)} of {format_bytes(memory.total_bytes)} free"
        yield Check(name, State.OK, f"{memory.name}: {sizes}{shared}{link}")
        users = () if isinstance(device.users, Unavailable) else device.users
        others = [user for user in users if user.pid != own_pid]
        if others:
            held = ", ".join(
                f"pid {user.pid}" + ("" if user.used_bytes is None else f" {format_bytes(user.used_bytes)}")
                for user in others
            )
            yield Check(f"{name} users", State.NOTE, f"also used by {held}; budgets in percent leave that out")


def check_distributions(versions: Mapping[str, str | None], requirements: Iterable[str]) -> Iterator[Check]:
    """The packages modelcache needs: old ones, and the one that gets in the way.

    Args:
        versions: Distribution -> installed version, `None` when it is not installed.
        requirements: As the package's metadata says, such as ``"transformers>=5.3"``.
    """
    if versions.get("pynvml") is not None:
        found = f"the distribution pynvml {versions['pynvml']} overwrites the module of nvidia-ml-py"
        fix = "pip uninstall -y pynvml && pip install --force-reinstall nvidia-ml-py"
        yield Check("pynvml", State.PROBLEM, found, fix)
    for requirement in requirements:
        match = _REQUIREMENT.match(requirement)
        if match is None or "extra ==" in requirement:
            continue
        name, least = match.groups()
        version = versions.get(name)
        fix = f'pip install --upgrade "{name}>={least}"'
        if version is None:
            yield Check(name, State.PROBLEM, "not installed", fix)
        elif _number(version) < _number(least):
            yield Check(name, State.PROBLEM, f"{version} is older than {least}", fix)
        elif name in {"transformers", "accelerate"}:
            yield Check(name, State.OK, version)


def check_ram(ram: Reading) -> Check:
    """How much RAM there really is for this process."""
    found = f"{format_bytes(ram.free_bytes)} of {format_bytes(ram.total_bytes)} free"
    if ram.source == "psutil":
        return Check("ram", State.OK, found)
    host = next(figure.size_bytes for figure in ram.figures if figure.source == "psutil" and figure.what == "total")
    limited = f"{found}; limited by {ram.source} (the host has {format_bytes(host)})"
    return Check("ram", State.NOTE, limited)


def check_stalls(machine: MachineReport) -> Check:
    """How much processes stand still for want of memory."""
    stalls = machine.stalls
    if stalls is None:
        return Check("memory stalls", State.NOTE, "the kernel does not tell (no PSI); 'policy.pressure: watch' works")
    found = f"{stalls.some_percent:.1f} % of the last 10 s ({stalls.source})"
    if stalls.some_percent > _MANY_STALLS_PERCENT:
        return Check(
            "memory stalls", State.WARNING, found, "free memory, lower budgets.ram, or set policy.pressure: watch"
        )
    return Check("memory stalls", State.OK, found)


def check_lockable(limit_bytes: int, has_cards: bool) -> Check:
    """How much memory may be page-locked; a negative limit is none."""
    if limit_bytes < 0:
        return Check("lockable memory", State.OK, "unlimited")
    found = f"{format_bytes(limit_bytes)} (RLIMIT_MEMLOCK)"
    if has_cards and limit_bytes < _LITTLE_LOCKABLE_BYTES:
        fix = "raise it (ulimit -l unlimited, or docker run --ulimit memlock=-1), or copies may run at half speed"
        return Check("lockable memory", State.WARNING, found, fix)
    return Check("lockable memory", State.OK, found)


def check_wsl(kernel: str) -> Iterator[Check]:
    """Whether this is Linux inside Windows, where little memory can be page-locked."""
    if "microsoft" in kernel.lower():
        found = "Linux inside Windows (WSL): the system may refuse to page-lock more than about 1 GiB"
        fix = "set budgets.page_locked to 512MiB; what is refused is copied through ordinary memory"
        yield Check("wsl", State.WARNING, found, fix)


def check_disk(path: Path, measure: Callable[[Path], tuple[int, float]]) -> Check:
    """How fast a file is read."""
    try:
        size_bytes, seconds = measure(path)
    except OSError as error:
        return Check("disk", State.PROBLEM, f"{path}: {error.strerror}", "name a large file that can be read")
    if size_bytes < _LEAST_DISK_BYTES:
        return Check("disk", State.NOTE, f"{path}: too small to measure", "name a file of 64 MiB or more")
    rate = f"{size_bytes / seconds / 1e9:.2f} GB/s over {format_bytes(size_bytes)} of {path}"
    return Check("disk", State.OK, rate)


def _number(version: str) -> tuple[int, ...]:
    """The leading numbers of a version; enough to compare releases."""
    numbers = []
    for part in version.split("."):
        digits = re.match(r"\d+", part)
        if digits is None:
            break
        numbers.append(int(digits.group()))
        if digits.group() != part:
            break
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
