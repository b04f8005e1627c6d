"""What happens to the machine (events), what people want of it (wants), and what it orders (instructions).

All are frozen values: together they are the trace of a run, the vocabulary of its tests, and what is logged.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelcache.move import LoadedFacts, Move, Moved, Reason
from modelcache.spec import ModelSpec
from modelcache.tier import Tier

# --- wants: what a ticket stands for ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WantLease:
    """Leases on all of `names` at once.

    `holder` says who asks, so that nobody waits for itself; `inside` names the model whose loader asks, if one does.
    `early`: the caller can start while the last segments arrive, because the data plane makes it wait where it reads.
    """

    names: tuple[str, ...]
    holder: object
    inside: str | None = None
    early: bool = False


@dataclass(frozen=True, slots=True)
class WantCopy:
    """A copy of `name` on `tier`, without a lease; it yields to every lease that is wanted.

    Attributes:
        name: The model.
        tier: Where to.
        inside: The model whose loader asks for it, if one does: it may wait for the copy.
    """

    name: str
    tier: Tier
    inside: str | None = None


@dataclass(frozen=True, slots=True)
class WantDown:
    """Give `name` up to `tier` (RAM: park; DISK: evict) once its leases are returned."""

    name: str
    tier: Tier
    holder: object
    reason: Reason = Reason.EXPLICIT


@dataclass(frozen=True, slots=True)
class WantRoom:
    """Make `size_bytes` free on `tier` now; `hold` keeps them reserved until `RoomReturned`. `holder` says who asks."""

    tier: Tier
    size_bytes: int
    hold: bool
    holder: object = None


@dataclass(frozen=True, slots=True)
class WantBudget:
    """Change the budget of a tier; lowered as far as leases allow, the rest when they are returned.

    `why` is set for a change that is not meant to last: it never exceeds the budget last set without one, and whoever
    is refused for want of what it took away is told why.
    """

    tier: Tier
    budget_bytes: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class WantGone:
    """Forget `name` and everything it holds, once its leases are returned."""

    name: str
    holder: object


Want = WantLease | WantCopy | WantDown | WantRoom | WantBudget | WantGone

# --- events -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Registered:
    """A model was registered; nothing is loaded."""

    spec: ModelSpec


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody wants something and waits under `ticket`."""

    ticket: int
    want: Want


@dataclass(frozen=True, slots=True)
class Left:
    """Whoever waited under `ticket` does so no longer: a deadline, a cancellation."""

    ticket: int


@dataclass(frozen=True, slots=True)
class LeaseReturned:
    """A lease on `name` was returned while its gate was closed or watched."""

    name: str


@dataclass(frozen=True, slots=True)
class RoomReturned:
    """The room held under `ticket` is no longer needed."""

    ticket: int


@dataclass(frozen=True, slots=True)
class GateClosed:
    """The gate of `name` is closed and nobody is inside."""

    name: str


@dataclass(frozen=True, slots=True)
class GateBusy:
    """The gate of `name` is closed, but leases are open."""

    name: str


@dataclass(frozen=True, slots=True)
class Pinned:
    """An operator's hold on `name` at `tier`; `None` lifts it."""

    name: str
    tier: Tier | None


@dataclass(frozen=True, slots=True)
class LoadDone:
    """A first load ended well."""

    name: str
    generation: int
    facts: LoadedFacts


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A first load ended with `error`; nothing is held for it."""

    name: str
    generation: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Arriving:
    """All copies of a promotion are under way, and a forward that starts now waits for each where it needs it."""

    part: str
    generation: int


@dataclass(frozen=True, slots=True)
class MoveDone:
    """A move was carried out."""

    part: str
    generation: int
    moved: Moved


@dataclass(frozen=True, slots=True)
class Checked:
    """A look for writes has ended. `is_clean`: every byte is as it was last known; false also when nobody can say."""

    part: str
    is_clean: bool


@dataclass(frozen=True, slots=True)
class MoveKept:
    """A move would have lost writes, so the part is as before."""

    part: str
    generation: int


@dataclass(frozen=True, slots=True)
class MoveFailed:
    """A move ended with `error`; the part is as before."""

    part: str
    generation: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The data plane has let go of `name`: it may be registered again."""

    name: str


@dataclass(frozen=True, slots=True)
class Tick:
    """The armed timer went off."""


@dataclass(frozen=True, slots=True)
class Closing:
    """The cache closes: whoever waits is refused, nothing new is started."""


Event = (
    Registered
    | Asked
    | Left
    | LeaseReturned
    | RoomReturned
    | GateClosed
    | GateBusy
    | Pinned
    | LoadDone
    | LoadFailed
    | Arriving
    | MoveDone
    | MoveKept
    | MoveFailed
    | Checked
    | Forgotten
    | Tick
    | Closing
)

# --- instructions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CloseGate:
    """Close the gate, re-read its leases, and answer `GateClosed` or `GateBusy` before any other event."""

    name: str


@dataclass(frozen=True, slots=True)
class OpenGate:
    """From now on a hit needs nobody's permission. `limit` is leases at a time, 0 for any number."""

    name: str
    limit: int


@dataclass(frozen=True, slots=True)
class WatchGate:
    """Tell of every lease returned at this gate, open or closed; if none is open by now, tell at once."""

    name: str


@dataclass(frozen=True, slots=True)
class UnwatchGate:
    """Nobody waits for the leases of this gate any more."""

    name: str


@dataclass(frozen=True, slots=True)
class StartLoad:
    """Run the loader of `name`."""

    name: str
    generation: int


@dataclass(frozen=True, slots=True)
class StartMove:
    """Carry out one move."""

    move: Move


@dataclass(frozen=True, slots=True)
class StartCheck:
    """Look whether the bytes of a part on the device were written to; `Checked` answers."""

    part: str


@dataclass(frozen=True, slots=True)
class DropImage:
    """Delete an image file that no longer describes its part."""

    part: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Let go of a model; its leases are returned and nothing of it is in flight. Answer `Forgotten`."""

    name: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Let go of what a first load brought, and end that load with `error`: answer `LoadFailed`."""

    name: str
    generation: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Grant:
    """The leases of `names` belong to the caller of `ticket`, as of now."""

    ticket: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """What `ticket` wanted is so. `freed_bytes`: what was given up for it, per tier (VRAM, RAM)."""

    ticket: int
    freed_vram_bytes: int = 0
    freed_ram_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Refuse:
    """What `ticket` wanted will not be."""

    ticket: int
    error: Exception


@dataclass(frozen=True, slots=True)
class ArmTimer:
    """Send a `Tick` at `at_s` on the clock that `now_s` comes from; an earlier armed one stays armed."""

    at_s: float


Instruction = (
    CloseGate
    | OpenGate
    | WatchGate
    | UnwatchGate
    | StartLoad
    | StartMove
    | StartCheck
    | DropImage
    | Forget
    | Unload
    | Grant
    | Done
    | Refuse
    | ArmTimer
)
