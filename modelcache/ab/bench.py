"""The bench that arms run on: brings models into place, calls them, measures, and writes down what happened."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from modelcache import ModelCache, ModelCacheError, MoveFuture
from modelcache.ab.arms import Arm
from modelcache.ab.inputs import InputError, Items
from modelcache.ab.journal import Arrival, Entry, Run
from modelcache.ab.metrics import Metric
from modelcache.ab.schedule import Block, Call

#: How much of an output, or of an item, the report shows.
SHOWN_CHARACTERS: Final = 400
_BEFORE = -1
# What a clock that has not moved on is taken to have shown: times are compared by ratio, and nought has none.
_SHORTEST_S = 1e-9

Stage = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Work:
    """What is done with each item.

    Attributes:
        stages: In order, by name.
        metrics: Those with a callable are scored.
        warm_up: Calls after each arrival that are not counted.
        show: An output in words.
        clock: In seconds.
    """

    stages: Mapping[str, Stage]
    metrics: Sequence[Metric]
    warm_up: int
    show: Callable[[Any], str]
    clock: Callable[[], float]


@dataclass(slots=True)
class Bench:
    """Calls arms and keeps their models in place.

    Attributes:
        cache: Where the models are.
        arms: By index.
        items: By index.
        work: What is done with them.
        record: Is given everything that happens.
        in_place: Models that were usable when the last block began.
    """

    cache: ModelCache
    arms: Sequence[Arm]
    items: Items
    work: Work
    record: Callable[[Entry], None]
    in_place: frozenset[str] = frozenset()
    _origin_s: float = field(init=False)
    _called: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._origin_s = self.work.clock()

    def go_on_from(self, elapsed_s: float) -> None:
        """Count time from where an interrupted run left off."""
        self._origin_s = self.work.clock() - elapsed_s

    @property
    def now_s(self) -> float:
        """Since the run began."""
        return self.work.clock() - self._origin_s

    # --- models ---------------------------------------------------------------------------------------------------

    def bring_up_all(self, models: Sequence[str]) -> dict[str, str]:
        """Bring each model up once, one after the other, and say what went wrong with which.

        From then on no switch is a first load.
        """
        failed: dict[str, str] = {}
        for model in models:
            try:
                with self._arrival(model, _BEFORE):
                    pass
            except ModelCacheError as error:
                failed[model] = _words(error)
        self.in_place = frozenset(model for model in models if self._is_in_place(model))
        return failed

    def run_block(self, block: Block, calls: Sequence[Call], following: Block | None) -> Generator[Call]:
        """Run the calls of one block, with its models held in place; yields after each.

        Args:
            block: Whose models are brought up.
            calls: Those that are left of it.
            following: Whose models are brought up next, as far as there is room.
        """
        if not calls:
            return
        with ExitStack() as held:
            raw: dict[str, Any] = {}
            failed: dict[str, str] = {}
            # What is in place first: then nothing of this block is given up for another model of it.
            for model in sorted(block.models, key=lambda name: not self._is_in_place(name)):
                if model not in self.in_place:
                    self._called.discard(model)
                try:
                    raw[model] = held.enter_context(self._arrival(model, block.number))
                except ModelCacheError as error:
                    failed[model] = _words(error)
            self.in_place = frozenset(model for model in self.models if self._is_in_place(model))
            for call in self._warm_ups(calls, set(raw) - self._called):
                self.record(self._call(call, block, raw, failed, is_warm_up=True))
            self._called.update(raw)
            coming: list[MoveFuture] = []
            for call in calls:
                if following is not None and not coming and call.item == calls[-1].item:
                    coming = self._prefetch(following.models)
                self.record(self._call(call, block, raw, failed, is_warm_up=False))
                yield call
            raw.clear()

    @property
    def models(self) -> tuple[str, ...]:
        """Of all arms, each once."""
        return tuple(dict.fromkeys(arm.model for arm in self.arms))

    def _is_in_place(self, model: str) -> bool:
        return self.cache.info(model).state == "ready"

    @contextmanager
    def _arrival(self, model: str, block: int) -> Iterator[Any]:
        found = self.cache.info(model)
        start_s = self.now_s
        with self.cache.get(model) as raw:
            seconds = self.now_s - start_s
            moved = model not in self.in_place
            there = self.cache.info(model)
            if moved or found.state != "ready":
                held_bytes = there.vram_bytes or there.ram_bytes
                self.record(Arrival(model, block, str(found.tier), start_s, seconds, moved, held_bytes))
            yield raw

    def _prefetch(self, models: Sequence[str]) -> list[MoveFuture]:
        """Ask for what comes next; where leases leave no room it is given up, and asked for again when it is needed."""
        return [self.cache.prefetch(model) for model in models if not self._is_in_place(model)]

    # --- calls ----------------------------------------------------------------------------------------------------

    def _warm_ups(self, calls: Sequence[Call], models: set[str]) -> Iterator[Call]:
        first = calls[0].item
        for _ in range(self.work.warm_up):
            yield from (Call(i, first, 0) for i, arm in enumerate(self.arms) if arm.model in models)

    def _call(
        self, call: Call, block: Block, raw: Mapping[str, Any], failed: Mapping[str, str], *, is_warm_up: bool
    ) -> Run:
        arm = self.arms[call.arm]
        start_s = self.now_s
        facts: dict[str, Any] = {"start_s": start_s, "is_warm_up": is_warm_up}
        seconds: dict[str, float] = {}
        if arm.model in failed:
            facts["error"] = f"did not come up: {failed[arm.model]}"
        else:
            try:
                item = self.items.values[call.item]
                output = self._answer(arm, raw[arm.model], item, seconds)
                scored = () if is_warm_up else self.work.metrics
                measured = [(metric, metric.measure(output, item)) for metric in scored if metric.measure is not None]
            except Exception as error:  # noqa: BLE001  # A failing item is a finding about the arm, not about the run.
                facts["error"] = _words(error)
            else:
                facts["output"] = in_words(output, self.work.show)
                facts["scores"] = {metric.name: self._score(metric, found, call) for metric, found in measured}
        return Run(arm.name, call.item, call.repeat, block.number, block.pair, seconds=seconds, **facts)

    def _answer(self, arm: Arm, model: Any, item: Any, seconds: dict[str, float]) -> Any:
        output, settings = item, arm.settings
        for name, stage in self.work.stages.items():
            before = self.work.clock()
            output = stage(model, output, **settings)
            _wait_for_device()
            seconds[name] = max(self.work.clock() - before, _SHORTEST_S)
            settings = {}
        return output

    def _score(self, metric: Metric, found: object, call: Call) -> float:
        """What a scorer gave, as a number; anything else is a mistake in the scorer and ends the run."""
        where = f"{self.items.place(call.item)}: {metric.name!r} of arm {self.arms[call.arm].name!r} is"
        try:
            score = float(found)  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001  # Whatever the type says to it: it is no number.
            score = math.nan
        if isinstance(found, str) or not math.isfinite(score):
            raise InputError(
                f"{where} {in_words(found, repr)}, but a score is a finite number; raise an error for an output that "
                "cannot be scored, and it counts as a failure"
            )
        if metric.scale == "ratio" and score <= 0:
            raise InputError(
                f"{where} {score:g}, but what is compared by ratio is above nought; give the metric scale='difference'"
            )
        if metric.bounds is not None and not metric.bounds[0] <= score <= metric.bounds[1]:
            raise InputError(
                f"{where} {score:g}, outside of its bounds {metric.bounds}; state those that hold for every output"
            )
        return score


def _wait_for_device() -> None:
    """A call ends when what it has put on the device is done."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _words(error: BaseException) -> str:
    said, kind = in_words(error, str), type(error).__name__
    return _cut(f"{kind}: {said}") if said else kind


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def in_words(value: object, show: Callable[[Any], str]) -> str:
    """An item or an output for the report, cut; by its `repr` where `show` fails, which may be made for the other."""
    for words in (show, repr):
        # What a report shows of a value is no reason to lose the run.
        with suppress(Exception):
            return _cut(str(words(value)))
    return f"<{type(value).__qualname__}>"
