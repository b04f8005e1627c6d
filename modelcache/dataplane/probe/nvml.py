"""Finding one CUDA device in NVML, and saying in words what each return code means.

CUDA counts devices after ``CUDA_VISIBLE_DEVICES``, fastest first unless told otherwise; NVML counts all of them by PCI
address and knows nothing of that variable. A slice of a card (MIG) is a device of its own for CUDA and a child of the
card for NVML.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from modelcache.dataplane.probe.facts import Unavailable

NOT_SUPPORTED = 3
_NOT_FOUND = 6
_INVALID_ARGUMENT = 2
_FUNCTION_NOT_FOUND = 13
_MIG_ENABLED = 1

_DRIVER_FIX = "install or load the NVIDIA driver, or give the container its GPUs (--gpus all)"
_ERRORS = {
    1: ("UNINITIALIZED", "NVML is not available (not initialized)", "restart the process"),
    3: ("NOT_SUPPORTED", "the driver does not report the memory of this device", "update the driver"),
    4: (
        "NO_PERMISSION",
        "NVML refused to answer (no permission)",
        "run as a user who may see the device, or give the container the rights to it",
    ),
    6: (
        "NOT_FOUND",
        "NVML does not know the device",
        "check CUDA_VISIBLE_DEVICES and the device's UUID (nvidia-smi -L)",
    ),
    9: ("DRIVER_NOT_LOADED", "NVML is not available (the NVIDIA driver is not loaded)", _DRIVER_FIX),
    12: ("LIBRARY_NOT_FOUND", "NVML is not available (no NVIDIA driver library on this machine)", _DRIVER_FIX),
    13: ("FUNCTION_NOT_FOUND", "NVML is not available (the driver is too old for this call)", "update the driver"),
    15: ("GPU_IS_LOST", "the GPU is lost (it fell off the bus)", "reboot the machine, and look for its Xid in dmesg"),
    16: ("RESET_REQUIRED", "the GPU needs a reset", "stop its users and run 'nvidia-smi --gpu-reset', or reboot"),
    17: (
        "OPERATING_SYSTEM",
        "NVML is not available (the operating system blocked it; a control group took the device away)",
        "restart the container",
    ),
    18: (
        "LIB_RM_VERSION_MISMATCH",
        "NVML is not available (driver/library version mismatch)",
        "fix the driver (reboot after update)",
    ),
    999: (
        "UNKNOWN",
        "NVML is not available (unknown error; a container loses it when the host reloads systemd)",
        "restart the container",
    ),
}


class ProbeRefusedError(Exception):
    """Carries the words up to the probe, which hands them out as a value. Never leaves the package."""

    def __init__(self, unavailable: Unavailable) -> None:
        super().__init__(unavailable)
        self.unavailable = unavailable


@dataclass(frozen=True, slots=True)
class Address:
    """Which device is meant.

    Attributes:
        index: As torch counts: ``cuda:<index>``.
        uuid: As CUDA or NVML spells it, with or without its prefix; wins over `index`.
        visible: The value of ``CUDA_VISIBLE_DEVICES``; `None` when it is not set.
        order: The value of ``CUDA_DEVICE_ORDER``; `None` when it is not set.
    """

    index: int = 0
    uuid: str | None = None
    visible: str | None = None
    order: str | None = None


def load_nvml() -> Any:
    """The module `pynvml`, which the distribution nvidia-ml-py brings.

    Raises:
        ProbeRefusedError: It is not installed.
    """
    try:
        import pynvml
    except ImportError:
        raise ProbeRefusedError(
            Unavailable("NVML is not available (the Python module pynvml is missing)", "pip install nvidia-ml-py")
        ) from None
    return pynvml


@contextmanager
def in_words(nvml: Any) -> Iterator[None]:
    """Turn NVML's errors into words.

    Raises:
        ProbeRefusedError: NVML raised.
    """
    try:
        yield
    except nvml.NVMLError as error:
        raise ProbeRefusedError(explain(error)) from error


def explain(error: Exception) -> Unavailable:
    """The words for an NVML error, by its return code."""
    code = getattr(error, "value", None)
    if code in _ERRORS:
        name, reason, fix = _ERRORS[code]
        return Unavailable(reason, fix, name)
    return Unavailable(f"NVML is not available (return code {code})", "check that nvidia-smi works", f"CODE_{code}")


def find_device(nvml: Any, address: Address) -> Any:
    """The NVML handle of a device: of the slice where CUDA computes on a slice, never of the card around it.

    Raises:
        ProbeRefusedError: There is no such device, or it cannot be told which one CUDA means.
    """
    if address.uuid is not None:
        return _slice_of(nvml, _by_uuid(nvml, address.uuid), address)
    if address.visible is None:
        return _slice_of(nvml, _by_index(nvml, address.index, address), address)
    entry = _entry(nvml, address)
    if entry.isdecimal():
        return _slice_of(nvml, _by_index(nvml, int(entry), address), address)
    return _slice_of(nvml, _by_name(nvml, entry), address)


def uuid_of(nvml: Any, handle: Any) -> str:
    """The device's UUID with its prefix, ``GPU-...`` or ``MIG-...``."""
    return _string(nvml.nvmlDeviceGetUUID(handle))


def name_of(nvml: Any, handle: Any) -> str:
    """The device's name, such as ``"NVIDIA H100 80GB HBM3"``."""
    return _string(nvml.nvmlDeviceGetName(handle))


def cards(nvml: Any) -> Iterator[Any]:
    """The handles of all cards, by PCI address."""
    for index in range(nvml.nvmlDeviceGetCount()):
        yield nvml.nvmlDeviceGetHandleByIndex(index)


def _entry(nvml: Any, address: Address) -> str:
    """The device's entry in ``CUDA_VISIBLE_DEVICES``; the list ends where CUDA stops reading it."""
    num_cards = nvml.nvmlDeviceGetCount()
    entries: list[str] = []
    for text in str(address.visible).split(","):
        entry = text.strip()
        known = int(entry) < num_cards if entry.isdecimal() else entry.startswith(("GPU-", "MIG-"))
        if not known or entry in entries:
            break
        entries.append(entry)
    if address.index >= len(entries):
        raise ProbeRefusedError(
            Unavailable(
                f"cuda:{address.index} does not exist: CUDA_VISIBLE_DEVICES is {address.visible!r} and leaves "
                f"{len(entries)} of {num_cards} devices",
                "choose a visible device or change CUDA_VISIBLE_DEVICES",
                "NOT_FOUND",
            )
        )
    return entries[address.index]


def _by_index(nvml: Any, index: int, address: Address) -> Any:
    """A card by its number, when CUDA and NVML count alike."""
    handles = list(cards(nvml))
    if index >= len(handles):
        raise ProbeRefusedError(
            Unavailable(
                f"cuda:{index} does not exist: this machine has {len(handles)} NVIDIA devices",
                f"choose one of cuda:0 to cuda:{len(handles) - 1}" if handles else _DRIVER_FIX,
                "NOT_FOUND",
            )
        )
    if address.order != "PCI_BUS_ID" and len({name_of(nvml, handle) for handle in handles}) > 1:
        # CUDA puts the fastest first and NVML goes by PCI address: among unlike cards the number alone is a guess.
        raise ProbeRefusedError(
            Unavailable(
                f"it cannot be told which card cuda:{address.index} is: they differ, and CUDA counts the fastest first",
                "set CUDA_DEVICE_ORDER=PCI_BUS_ID",
            )
        )
    return handles[index]


def _by_uuid(nvml: Any, uuid: str) -> Any:
    """A card or a slice by its whole UUID; torch leaves the prefix out."""
    spellings = (uuid,) if uuid.startswith(("GPU-", "MIG-")) else (f"GPU-{uuid}", f"MIG-{uuid}")
    for spelling in spellings:
        try:
            return nvml.nvmlDeviceGetHandleByUUID(spelling)
        except nvml.NVMLError as error:
            if error.value not in {_NOT_FOUND, _INVALID_ARGUMENT}:
                raise
    raise _unknown(uuid)


def _by_name(nvml: Any, entry: str) -> Any:
    """A card or a slice by an entry of ``CUDA_VISIBLE_DEVICES``: a UUID, its beginning, or ``MIG-GPU-<uuid>/gi/ci``."""
    if entry.startswith("MIG-GPU-"):
        return _by_instance(nvml, entry)
    found = [handle for handle in cards(nvml) if uuid_of(nvml, handle).startswith(entry)]
    if entry.startswith("MIG-"):
        found = [
            piece for card in cards(nvml) for piece in slices(nvml, card) if uuid_of(nvml, piece).startswith(entry)
        ]
    if len(found) != 1:
        raise _unknown(entry)
    return found[0]


def _by_instance(nvml: Any, entry: str) -> Any:
    """A slice in the older spelling: the card's UUID, the GPU instance and the compute instance."""
    card_uuid, _, instances = entry.removeprefix("MIG-").partition("/")
    for piece in slices(nvml, _by_uuid(nvml, card_uuid)):
        numbers = f"{nvml.nvmlDeviceGetGpuInstanceId(piece)}/{nvml.nvmlDeviceGetComputeInstanceId(piece)}"
        if numbers == instances:
            return piece
    raise _unknown(entry)


def _slice_of(nvml: Any, handle: Any, address: Address) -> Any:
    """The slice CUDA computes on when the card is cut in slices: the first one; else the card itself."""
    try:
        mode, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError as error:
        # A slice and a card that cannot be cut answer so; any other refusal must not pass for "not cut".
        if error.value not in {NOT_SUPPORTED, _FUNCTION_NOT_FOUND, _INVALID_ARGUMENT}:
            raise
        return handle
    if mode != _MIG_ENABLED:
        return handle
    entries = [] if address.visible is None else address.visible.split(",")
    if address.index < len(entries) and entries[address.index].strip().startswith("MIG-"):
        # Some drivers report the card's UUID for a slice; the slice is then known by what was made visible.
        return _by_name(nvml, entries[address.index].strip())
    for piece in slices(nvml, handle):
        return piece
    raise ProbeRefusedError(
        Unavailable(
            f"cuda:{address.index} is cut in slices (MIG), but none of them can be seen",
            "create a slice, or name one you may use in CUDA_VISIBLE_DEVICES (nvidia-smi -L)",
            "NOT_FOUND",
        )
    )


def slices(nvml: Any, card: Any) -> Iterator[Any]:
    """The handles of the slices (MIG) of a card; none when it is not cut."""
    try:
        num_slots = nvml.nvmlDeviceGetMaxMigDeviceCount(card)
    except nvml.NVMLError as error:
        if error.value not in {NOT_SUPPORTED, _FUNCTION_NOT_FOUND}:
            raise
        return
    for slot in range(num_slots):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, slot)
        except nvml.NVMLError as error:
            if error.value != _NOT_FOUND:
                raise


def _unknown(entry: str) -> ProbeRefusedError:
    return ProbeRefusedError(
        Unavailable(f"no NVIDIA device matches {entry!r}", "see 'nvidia-smi -L' for the UUIDs", "NOT_FOUND")
    )


def _string(text: str | bytes) -> str:
    # Older releases of the bindings return bytes.
    return text.decode() if isinstance(text, bytes) else text
