"""What torch needs to know of the simulated device: the name ``sim`` and an operator for every operator.

torch lets Python fill its spare device key, ``PrivateUse1``. The key belongs to the process: it is claimed once, by the
first device, and never given back. From then on ``torch.accelerator`` names ``sim``, as for any backend in that key.

Not simulated: streams of torch's own (every operator is done when it returns), random generators on the device (the
CPU's is used), page-locked tensors made by torch, autograd on any index but 0,
``safetensors.safe_open(device="sim:0")``. Loading or unpickling a tensor of the device gives a CPU tensor. An operator
costs a tenth of a millisecond or more of Python: use it to be right, not to measure compute.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from modelcache.dataplane.device.simulated_operators import OPERATORS, run_on_host
from modelcache.dataplane.device.simulated_slots import NAME, SLOTS, index_of


class _Chosen:
    """``with torch.sim.device(1):`` - what ``sim`` without an index means in this thread."""

    def __init__(self, device: torch.device | str | int | None) -> None:
        self._index = index_of(torch.device(device) if isinstance(device, str) else device)
        self._before: int | None = None

    def __enter__(self) -> None:
        self._before = getattr(SLOTS.chosen, "index", None)
        SLOTS.chosen.index = self._index

    def __exit__(self, *exc: object) -> None:
        SLOTS.chosen.index = self._before


class _TorchSim:
    """What torch asks of ``torch.sim``. Random numbers come from the CPU's generator, so its state is the device's."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return SLOTS.current()

    def device_count(self) -> int:
        return SLOTS.count()

    device = _Chosen

    def set_device(self, device: torch.device | str | int) -> None:
        _Chosen(device).__enter__()

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def synchronize(self, device: object = None) -> None: ...

    def empty_cache(self) -> None: ...

    def mem_get_info(self, device: torch.device | str | int | None = None) -> tuple[int, int]:
        memory = SLOTS.at(index_of(torch.device(device) if isinstance(device, str) else device)).memory
        return memory.capacity_bytes - memory.allocated_bytes(), memory.capacity_bytes

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class _Claim:
    """The process's one registration; what it holds must live as long as the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._libraries: list[torch.library.Library] = []

    def make(self) -> None:
        """Register ``sim`` with torch unless that was done.

        Raises:
            RuntimeError: Another backend holds the key, or torch refuses; nothing was registered.
        """
        with self._lock:
            if not self._libraries:
                self._register()

    def _register(self) -> None:
        holder = torch._C._get_privateuse1_backend_name()
        if holder != "privateuseone":
            raise RuntimeError(
                f"the simulated device needs torch's PrivateUse1 key, but the backend {holder!r} holds it in this "
                "process; use device='host_only', or a process that does not load that backend"
            )
        _let_torch_make_storages()
        # A daemon thread that is inside torch while the interpreter ends takes the process down with an abort.
        atexit.register(SLOTS.close_all)
        try:
            _setup_privateuseone_for_python_backend(NAME, backend_module=_TorchSim())
        except RuntimeError as error:
            raise RuntimeError(f"torch refused the simulated device as a backend: {error}") from error
        # torch's own functions here have no annotations.
        library = cast("Callable[..., Any]", torch.library.Library)
        everything, some = library("_", "IMPL"), library("aten", "IMPL")
        everything.fallback(run_on_host, "PrivateUse1")
        for name, function in OPERATORS.items():
            some.impl(name, function, "PrivateUse1")
        self._libraries = [everything, some]


CLAIM = _Claim()


def _let_torch_make_storages() -> None:
    """Give the key the CPU's allocator.

    `copy.deepcopy` of a buffer makes a bare storage on the tensor's device, and torch calls the key's allocator without
    looking whether there is one. A storage made this way is in fact the CPU's; the operator ``set_`` adopts it.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    try:
        get = library._ZN3c1015GetCPUAllocatorEv
        put = library._ZN3c1012SetAllocatorENS_10DeviceTypeEPNS_9AllocatorEh
    except AttributeError as error:
        raise RuntimeError(
            f"the simulated device does not know the allocator registry of torch {torch.__version__}; use torch 2.11 "
            "to 2.13"
        ) from error
    get.restype, put.restype = ctypes.c_void_p, None
    put.argtypes = (ctypes.c_int8, ctypes.c_void_p, ctypes.c_uint8)
    put(torch._C._autograd.DeviceType.PrivateUse1.value, get(), 0)
