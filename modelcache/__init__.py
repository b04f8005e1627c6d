"""modelcache: GPU memory as a cache over RAM over disk, for whole PyTorch models.

This is the whole public surface. Names are imported when first used, so that ``import modelcache`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from modelcache._version import __version__

if TYPE_CHECKING:
    from modelcache.cache import AsyncGet, ModelCache
    from modelcache.config import Effective, config_schema, load_config, missing_files
    from modelcache.core.explain import Forecast
    from modelcache.dataplane.materialize.dispatch import dispatch_model
    from modelcache.dataplane.materialize.entry_points import (
        is_dispatched,
        materialize_meta_tensors,
        materialized,
        plan_materialize,
        restore_dispatch,
    )
    from modelcache.dataplane.materialize.methods import add_materialize_methods
    from modelcache.dataplane.materialize.report import MaterializePlan, PlannedTensor
    from modelcache.dataplane.probe.machine import MachineReport, Reading, Unavailable, machine_report
    from modelcache.errors import (
        BudgetExhaustedError,
        CacheClosedError,
        CapacityError,
        ConfigError,
        DeviceMemoryError,
        DevicePoisonedError,
        Finding,
        ForkedCacheError,
        InvalidTransitionError,
        LeaseClosedError,
        LeaseCycleError,
        LeaseError,
        LeaseTimeoutError,
        LoaderError,
        MaterializeError,
        MaterializeMemoryError,
        ModelCacheError,
        ModelNotResidentError,
        ModelTooLargeError,
        MoveError,
        QueueFullError,
        UnknownModelError,
        WeightsError,
    )
    from modelcache.futures import MoveFuture
    from modelcache.handle import ModelHandle, unwrap
    from modelcache.headers import weights_bytes
    from modelcache.lease import Lease, Leases
    from modelcache.move import MoveKind, Reason
    from modelcache.spec import OnWrite, Priority
    from modelcache.stats import BudgetChange, CacheStats, Counters, Freed, Health, ModelStats, MoveEvent, TierStats
    from modelcache.tier import Tier
    from modelcache.units import format_bytes, format_seconds, parse_bytes, parse_percent, parse_rate
    from modelcache.wiring import PlannedBudgets, planned_budgets

__all__ = [
    "AsyncGet",
    "BudgetChange",
    "BudgetExhaustedError",
    "CacheClosedError",
    "CacheStats",
    "CapacityError",
    "ConfigError",
    "Counters",
    "DeviceMemoryError",
    "DevicePoisonedError",
    "Effective",
    "Finding",
    "Forecast",
    "ForkedCacheError",
    "Freed",
    "Health",
    "InvalidTransitionError",
    "Lease",
    "LeaseClosedError",
    "LeaseCycleError",
    "LeaseError",
    "LeaseTimeoutError",
    "Leases",
    "LoaderError",
    "MachineReport",
    "MaterializeError",
    "MaterializeMemoryError",
    "MaterializePlan",
    "ModelCache",
    "ModelCacheError",
    "ModelHandle",
    "ModelNotResidentError",
    "ModelStats",
    "ModelTooLargeError",
    "MoveError",
    "MoveEvent",
    "MoveFuture",
    "MoveKind",
    "OnWrite",
    "PlannedBudgets",
    "PlannedTensor",
    "Priority",
    "QueueFullError",
    "Reading",
    "Reason",
    "Tier",
    "TierStats",
    "Unavailable",
    "UnknownModelError",
    "WeightsError",
    "__version__",
    "add_materialize_methods",
    "config_schema",
    "dispatch_model",
    "format_bytes",
    "format_seconds",
    "is_dispatched",
    "load_config",
    "machine_report",
    "materialize_meta_tensors",
    "materialized",
    "missing_files",
    "parse_bytes",
    "parse_percent",
    "parse_rate",
    "plan_materialize",
    "planned_budgets",
    "restore_dispatch",
    "unwrap",
    "weights_bytes",
]

_HOMES = {
    "modelcache.cache": ("AsyncGet", "ModelCache"),
    "modelcache.config": ("Effective", "config_schema", "load_config", "missing_files"),
    "modelcache.core.explain": ("Forecast",),
    "modelcache.dataplane.materialize.entry_points": (
        "is_dispatched",
        "materialize_meta_tensors",
        "materialized",
        "plan_materialize",
        "restore_dispatch",
    ),
    "modelcache.dataplane.materialize.dispatch": ("dispatch_model",),
    "modelcache.dataplane.materialize.methods": ("add_materialize_methods",),
    "modelcache.dataplane.materialize.report": ("MaterializePlan", "PlannedTensor"),
    "modelcache.futures": ("MoveFuture",),
    "modelcache.handle": ("ModelHandle", "unwrap"),
    "modelcache.lease": ("Lease", "Leases"),
    "modelcache.move": ("MoveKind", "Reason"),
    "modelcache.spec": ("OnWrite", "Priority"),
    "modelcache.stats": (
        "BudgetChange",
        "CacheStats",
        "Counters",
        "Freed",
        "Health",
        "ModelStats",
        "MoveEvent",
        "TierStats",
    ),
    "modelcache.dataplane.probe.machine": ("MachineReport", "Reading", "Unavailable", "machine_report"),
    "modelcache.errors": ("Finding", *(name for name in __all__ if name.endswith("Error"))),
    "modelcache.headers": ("weights_bytes",),
    "modelcache.tier": ("Tier",),
    "modelcache.wiring": ("PlannedBudgets", "planned_budgets"),
    "modelcache.units": ("format_bytes", "format_seconds", "parse_bytes", "parse_percent", "parse_rate"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'modelcache' has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
