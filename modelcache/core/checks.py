"""When to look, in the background, whether a copy was written to: once its last lease has been back for a moment.

Giving up a copy that was found unwritten since its last use then costs nothing. The answer holds until the next lease:
a gate shows another tick from then on. One look at a time, least recently used first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from modelcache.core.messages import ArmTimer, Instruction, StartCheck
from modelcache.core.planner import Giving
from modelcache.core.records import Books, GateReading, Model, Part
from modelcache.move import Residency


class Checks:
    """Which models are due for a look, and the one look under way.

    A model is due from when its last lease came back until all its parts were looked at. Until it is due its gate is
    watched, so that hits need to tell of nothing else.

    Args:
        books: Whose parts; only `looked_tick` and `clean_tick` are written.
        gates: By model name.
        after_s: How long a model must be unused; `None` never looks.
        emit: Takes instructions.
        tick_of: When a part was last used.
    """

    def __init__(
        self,
        books: Books,
        gates: Mapping[str, GateReading],
        after_s: float | None,
        emit: Callable[[Instruction], None],
        tick_of: Callable[[Part], int],
    ) -> None:
        self._books = books
        self._gates = gates
        self._after_s = after_s
        self._emit = emit
        self._tick_of = tick_of
        self.due: dict[str, tuple[int, float]] = {}
        self.running: tuple[str, int, int] | None = None

    def copy_from(self, other: Checks) -> None:
        """Take over what another one knows."""
        self.due, self.running = dict(other.due), other.running

    def must_look(self, giving: Giving) -> bool:
        """Whether writes must be looked for before this is given up; its gates are closed and empty.

        What leaves every tier is always looked at: the last copy of any bytes.
        """
        part = self._books.parts[giving.part]
        return giving.after == Residency(0, part.n) or part.clean_tick != self._tick_of(part)

    def watches(self, model: Model) -> bool:
        """Whether the next return of a lease of this model must be told. Never where there is nothing to look at."""
        if self._after_s is None or not model.gate_is_open or model.spec.name in self.due:
            return False
        return any(self._books.parts[part].vram for part in model.parts)

    def returned(self, model: Model, now_s: float) -> None:
        """A lease came back, or a watched gate had none: the model is due, unless it was looked at since."""
        name = model.spec.name
        if self._after_s is not None and name not in self.due and self._unlooked(model):
            self._wait(name, now_s)

    def look(self, now_s: float) -> list[str]:
        """Start the next look if its time has come; returns the models that are due no more."""
        done = []
        for name, (tick, at_s) in list(self.due.items()):
            model, gate = self._books.models.get(name), self._gates.get(name)
            if model is None or gate is None or not self._unlooked(model):
                del self.due[name]
                done.append(name)
            elif at_s <= now_s and (gate.num_leases or gate.tick != tick or not self._idle(name)):
                self._wait(name, now_s)
        if self.running is None:
            ready = [part for name, (_, at_s) in self.due.items() if at_s <= now_s for part in self._idle(name)]
            if ready:
                part = min(ready, key=self._tick_of)
                self.running = (part.facts.part, part.generation, self._tick_of(part))
                self._emit(StartCheck(part.facts.part))
        return done

    def answered(self, part_id: str, *, is_clean: bool) -> None:
        """The look under way has ended."""
        assert self.running is not None
        name, generation, tick = self.running
        assert name == part_id
        self.running = None
        part = self._books.parts.get(name)
        if part is not None and part.generation == generation and part.flight is None:
            part.looked_tick = tick
            part.clean_tick = tick if is_clean else -1

    def _wait(self, name: str, now_s: float) -> None:
        assert self._after_s is not None
        self.due[name] = (self._gates[name].tick, now_s + self._after_s)
        self._emit(ArmTimer(now_s + self._after_s))

    def _unlooked(self, model: Model) -> list[Part]:
        """Its parts on the device that nobody looked at since their last use."""
        parts = (self._books.parts[part] for part in model.parts)
        return [part for part in parts if part.vram and part.looked_tick != self._tick_of(part)]

    def _idle(self, name: str) -> list[Part]:
        """Those of them that nothing moves and nobody uses."""
        return [
            part
            for part in self._unlooked(self._books.models[name])
            if part.flight is None and not any(self._gates[model].num_leases for model in part.models)
        ]
