"""Fakes for testing what uses a cache, and the cache itself, without a GPU and without waiting.

`FakeClock` and `FakePool` move time by hand, `FakeMover` and `FakeModel` stand for the data plane, and `cache_of` makes
a real `ModelCache` over them. `SimulatedDevice` is an accelerator in plain memory for real torch models, and `Faults`
what is to go wrong with it; only these two import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from modelcache.testing.assembling import cache_of
from modelcache.testing.models import FakeModel
from modelcache.testing.mover import FakeMover
from modelcache.testing.time_and_threads import FakeClock, FakePool, Hold

if TYPE_CHECKING:
    from modelcache.dataplane.device.faults import Faults
    from modelcache.dataplane.device.simulated import SimulatedDevice

__all__ = [
    "FakeClock",
    "FakeModel",
    "FakeMover",
    "FakePool",
    "Faults",
    "Hold",
    "SimulatedDevice",
    "cache_of",
]

_HOMES = {
    "Faults": "modelcache.dataplane.device.faults",
    "SimulatedDevice": "modelcache.dataplane.device.simulated",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'modelcache.testing' has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
