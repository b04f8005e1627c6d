"""Every error of modelcache.

ModelCacheError
├── ConfigError (ValueError)               path, line, column, key
├── UnknownModelError (KeyError)           name, close_matches
├── CapacityError (MemoryError)
│   ├── ModelTooLargeError                 permanent: exceeds the whole budget
│   ├── BudgetExhaustedError               transient: everything evictable is leased; lease_holders
│   └── QueueFullError                     transient: too many waiters
├── LeaseError (RuntimeError)
│   ├── LeaseTimeoutError (TimeoutError)   waited_s, waiting_for, held_by
│   ├── LeaseCycleError                    the cycle, named
│   └── LeaseClosedError
├── LoaderError (RuntimeError)             the user's loader raised or broke its contract; cause kept
├── MoveError (RuntimeError)               model, source, target; cause kept
│   ├── WeightsError                       missing, corrupt, changed or unsupported file; path, tensor
│   ├── DeviceMemoryError (MemoryError)    the device refused what the ledger allowed
│   ├── DevicePoisonedError                the device cannot be used again by this process
│   └── ModelNotResidentError              a forward outside a lease
├── MaterializeError (RuntimeError)        names of the tensors
│   └── MaterializeMemoryError (MemoryError)
├── CacheClosedError (RuntimeError)
│   └── ForkedCacheError
└── InvalidTransitionError (RuntimeError)  a bug in modelcache; carries the story

Fields go to ``super().__init__`` and the text is made in ``__str__``, so that every error pickles.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelcache.units import format_bytes, format_seconds


class ModelCacheError(Exception):
    """Base of everything modelcache raises about the world."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found in a configuration: where, what, and how to fix it. Lines and columns count from 1."""

    path: str
    line: int | None
    column: int | None
    key: str
    message: str
    severity: str = "error"

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.path, self.line, self.column) if part is not None)
        what = f"{self.key}: {self.message}" if self.key else self.message
        return f"{place}: {what}" if place else what


class ConfigError(ModelCacheError, ValueError):
    """A configuration that cannot be used; every problem of the file at once, in `findings`."""

    def __init__(self, findings: tuple[Finding, ...]) -> None:
        super().__init__(findings)
        self.findings = findings

    @property
    def path(self) -> str:
        """The file of the first problem."""
        return self.findings[0].path

    @property
    def line(self) -> int | None:
        """The line of the first problem, from 1."""
        return self.findings[0].line

    @property
    def column(self) -> int | None:
        """The column of the first problem, from 1."""
        return self.findings[0].column

    @property
    def key(self) -> str:
        """The key of the first problem, such as ``budgets.vram``."""
        return self.findings[0].key

    def __str__(self) -> str:
        return "\n".join(str(finding) for finding in self.findings)


class UnknownModelError(ModelCacheError, KeyError):
    """No model is registered under this name."""

    def __init__(self, name: str, close_matches: tuple[str, ...] = (), num_registered: int = 0) -> None:
        super().__init__(name, close_matches, num_registered)
        self.name, self.close_matches, self.num_registered = name, close_matches, num_registered

    def __str__(self) -> str:
        if self.close_matches:
            hint = "did you mean " + " or ".join(repr(match) for match in self.close_matches) + "?"
        elif self.num_registered:
            hint = "see cache.names() for what is registered, or register it first"
        else:
            hint = "register it first: cache.register(name, loader)"
        return f"no model is registered as {self.name!r}; {hint}"


class CapacityError(ModelCacheError, MemoryError):
    """The bytes asked for are not to be had."""


class ModelTooLargeError(CapacityError):
    """Permanent: what was asked exceeds the whole budget of a tier. Nobody was evicted for it."""

    def __init__(self, name: str, tier: str, needed_bytes: int, budget_bytes: int, detail: str = "") -> None:
        super().__init__(name, tier, needed_bytes, budget_bytes, detail)
        self.name, self.tier, self.detail = name, tier, detail
        self.needed_bytes, self.budget_bytes = needed_bytes, budget_bytes

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return (
            f"{self.name!r} needs {format_bytes(self.needed_bytes)} of {self.tier}{detail}, but budgets.{self.tier} is "
            f"{format_bytes(self.budget_bytes)}; no model was evicted; raise the budget or register a smaller variant"
        )


class BudgetExhaustedError(CapacityError):
    """Transient: there is no room now and nothing more may be given up.

    `pressure` says why the budget is lower than configured at the moment; empty when it is not.
    """

    def __init__(
        self,
        name: str,
        tier: str,
        needed_bytes: int,
        free_bytes: int,
        lease_holders: tuple[str, ...] = (),
        reason: str = "",
        pressure: str = "",
    ) -> None:
        super().__init__(name, tier, needed_bytes, free_bytes, lease_holders, reason, pressure)
        self.name, self.tier, self.reason, self.pressure = name, tier, reason, pressure
        self.needed_bytes, self.free_bytes, self.lease_holders = needed_bytes, free_bytes, lease_holders

    def __str__(self) -> str:
        held = f"; leased: {', '.join(self.lease_holders)}" if self.lease_holders else ""
        why = "".join(f"; {each}" for each in (self.reason, self.pressure) if each)
        fix = f"return a lease, unpin a model, or raise budgets.{self.tier}"
        if self.pressure:
            fix = "try again when there is memory, or free some"
        return (
            f"{self.name!r} needs {format_bytes(self.needed_bytes)} of {self.tier}, but only "
            f"{format_bytes(self.free_bytes)} can be freed now{held}{why}; {fix}"
        )


class QueueFullError(CapacityError):
    """Transient: too many callers are waiting already."""

    def __init__(self, name: str, num_waiting: int, limit: int) -> None:
        super().__init__(name, num_waiting, limit)
        self.name, self.num_waiting, self.limit = name, num_waiting, limit

    def __str__(self) -> str:
        return (
            f"cannot wait for {self.name!r}: {self.num_waiting} callers are waiting already (max_waiters is "
            f"{self.limit}); retry later or raise max_waiters"
        )


class LeaseError(ModelCacheError, RuntimeError):
    """A lease could not be had or used."""


class LeaseTimeoutError(LeaseError, TimeoutError):
    """The deadline passed before the model was usable."""

    def __init__(self, name: str, waited_s: float, waiting_for: str, held_by: tuple[str, ...] = ()) -> None:
        super().__init__(name, waited_s, waiting_for, held_by)
        self.name, self.waited_s, self.waiting_for, self.held_by = name, waited_s, waiting_for, held_by

    def __str__(self) -> str:
        held = f"; held by: {', '.join(self.held_by)}" if self.held_by else ""
        return (
            f"{self.name!r} was not usable after {format_seconds(self.waited_s)}: waiting for "
            f"{self.waiting_for}{held}; pass a longer timeout or return a lease"
        )


class LeaseCycleError(LeaseError):
    """Callers hold models and wait for each other; the youngest is refused."""

    def __init__(self, name: str, cycle: tuple[str, ...]) -> None:
        super().__init__(name, cycle)
        self.name, self.cycle = name, cycle

    def __str__(self) -> str:
        return (
            f"waiting for {self.name!r} would never end: {'; '.join(self.cycle)}; "
            "take the models together with cache.lease_many(...) or return a lease first"
        )


class LeaseClosedError(LeaseError):
    """A lease was used after it was returned."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f"the lease on {self.name!r} was already returned; take a new one: with cache.get({self.name!r}) as model"
        )


class LoaderError(ModelCacheError, RuntimeError):
    """The loader raised or broke its contract; the model stays registered and the next get retries."""

    def __init__(self, name: str, loader: str, problem: str) -> None:
        super().__init__(name, loader, problem)
        self.name, self.loader, self.problem = name, loader, problem

    def __str__(self) -> str:
        return f"the loader {self.loader} of {self.name!r} {self.problem}; fix the loader, then get {self.name!r} again"


class MoveError(ModelCacheError, RuntimeError):
    """A move failed; the model is whole where it was."""

    def __init__(self, name: str, source: str, target: str, problem: str) -> None:
        super().__init__(name, source, target, problem)
        self.name, self.source, self.target, self.problem = name, source, target, problem

    def __str__(self) -> str:
        return f"could not move {self.name!r} from {self.source} to {self.target}: {self.problem}"


class WeightsError(MoveError):
    """A weight file is missing, corrupt, changed or of an unsupported kind."""

    def __init__(self, name: str, path: str, problem: str, tensor: str | None = None) -> None:
        Exception.__init__(self, name, path, problem, tensor)
        self.name, self.source, self.target = name, "disk", "ram"
        self.path, self.problem, self.tensor = path, problem, tensor

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        tensor = f"tensor {self.tensor!r}: " if self.tensor is not None else ""
        return f"{where}{tensor}{self.problem}"


class DeviceMemoryError(MoveError, MemoryError):
    """The device refused bytes that the budget allowed."""

    def __init__(self, name: str, device: str, needed_bytes: int, free_bytes: int | None) -> None:
        Exception.__init__(self, name, device, needed_bytes, free_bytes)
        self.name, self.source, self.target = name, "ram", "vram"
        self.device, self.needed_bytes, self.free_bytes = device, needed_bytes, free_bytes
        self.problem = "the device is out of memory"

    def __str__(self) -> str:
        free = "" if self.free_bytes is None else f", {format_bytes(self.free_bytes)} free"
        return (
            f"{self.device} refused {format_bytes(self.needed_bytes)} for {self.name!r}{free}, although the budget "
            "allowed it; another program may hold the memory: lower budgets.vram or free it"
        )


class DevicePoisonedError(MoveError):
    """The device reported an error it cannot recover from inside this process."""

    def __init__(self, device: str, problem: str, name: str = "") -> None:
        Exception.__init__(self, device, problem, name)
        self.name, self.source, self.target, self.device, self.problem = name, "ram", "vram", device, problem

    def __str__(self) -> str:
        while_running = f" while moving {self.name!r}" if self.name else ""
        return (
            f"{self.device} failed with {self.problem!r}{while_running}; it cannot recover inside this process: "
            "restart it; copies in RAM are intact"
        )


class ModelNotResidentError(MoveError):
    """A forward outside a lease on a model that is not on its device, or one without weights is saved or copied.

    `gone` says why no cache can bring the weights back; empty where a lease does.
    """

    def __init__(self, name: str, gone: str = "") -> None:
        Exception.__init__(self, name, gone)
        self.name, self.gone, self.source, self.target = name, gone, "ram", "vram"
        self.problem = gone or "the model is parked"

    def __str__(self) -> str:
        if self.gone:
            return f"{self.name!r} has no weights any more: {self.gone}; load it again, or save or copy it before that"
        return (
            f"{self.name!r} is not on its device and no lease is held; call it through its handle, or use "
            f"'with cache.get({self.name!r}) as model:'"
        )


class MaterializeError(ModelCacheError, RuntimeError):
    """Some tensors of a dispatched model could not be made real; the model is as it was."""

    def __init__(self, names: tuple[str, ...], problem: str) -> None:
        super().__init__(names, problem)
        self.names, self.problem = names, problem

    def __str__(self) -> str:
        shown = ", ".join(repr(name) for name in self.names[:8])
        more = f" and {len(self.names) - 8} more" if len(self.names) > 8 else ""
        return f"{self.problem}: {shown}{more}" if self.names else self.problem


class MaterializeMemoryError(MaterializeError, MemoryError):
    """There is no room for the real tensors; raised before anything was read."""

    def __init__(self, names: tuple[str, ...], needed_bytes: int, available_bytes: int, device: str) -> None:
        Exception.__init__(self, names, needed_bytes, available_bytes, device)
        self.names, self.device = names, device
        self.needed_bytes, self.available_bytes = needed_bytes, available_bytes
        self.problem = "not enough memory"

    def __str__(self) -> str:
        return (
            f"materializing {len(self.names)} tensors needs {format_bytes(self.needed_bytes)} on {self.device}, but "
            f"{format_bytes(self.available_bytes)} are available; free memory, or pass check_memory=False to try anyway"
        )


class CacheClosedError(ModelCacheError, RuntimeError):
    """The cache was closed."""

    def __init__(self, what: str = "the cache is closed") -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"{self.what}; create a new ModelCache"


class ForkedCacheError(CacheClosedError):
    """The cache belongs to the parent process."""

    def __init__(self) -> None:
        super().__init__("this process was forked and the cache belongs to its parent")

    def __reduce__(self) -> tuple[type[ForkedCacheError], tuple[()]]:
        return (ForkedCacheError, ())


class InvalidTransitionError(ModelCacheError, RuntimeError):
    """A bug in modelcache: an event that the state does not allow."""

    def __init__(self, what: str, state: str, event: str, story: tuple[str, ...] = ()) -> None:
        super().__init__(what, state, event, story)
        self.what, self.state, self.event, self.story = what, state, event, story

    def __str__(self) -> str:
        story = "".join(f"\n  {line}" for line in self.story)
        return f"bug in modelcache: {self.what} cannot take {self.event} in {self.state}; please report this{story}"
