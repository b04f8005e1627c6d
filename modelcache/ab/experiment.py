"""The online split: gives each unit its arm's model, and logs who was served, from which tier, and how it went."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import Any

from modelcache import Effective, ModelCache, load_config
from modelcache.ab.assignment import Assignment, Layer, Split, Why, mask
from modelcache.ab.inputs import InputError
from modelcache.ab.metrics import FAILURES

FORMAT = "modelcache-ab-exposure"
#: In seconds, of every exposure: of the whole block, and until the model was usable.
SECONDS, WAIT = "seconds", "wait_s"
#: What is known of every exposure without being recorded.
MEASURED = (SECONDS, WAIT, FAILURES)

_LOG = logging.getLogger("modelcache.ab")


@dataclass(slots=True)
class Serving:
    """One unit being served.

    Attributes:
        arm: Its arm; `why` says why.
        why: Only ``assigned`` units count in an analysis.
        model: The raw model, held in place for the block.
        tier: Where the model was found: ``vram``, ``ram`` or ``disk``.
        wait_s: How long it took until it was usable.
        metrics: What was recorded.
    """

    arm: str
    why: Why
    model: Any
    tier: str
    wait_s: float
    metrics: dict[str, float] = field(default_factory=dict)

    def record(self, **metrics: float) -> None:
        """Keep figures of this call for the log.

        Raises:
            InputError: One is not a finite number, or is called like what is measured anyway. None of them is kept.
        """
        found: dict[str, float] = {}
        for name, value in metrics.items():
            if name in MEASURED:
                raise InputError(f"{name!r} is measured of every exposure; give yours another name")
            try:
                found[name] = float(value)
            except (TypeError, ValueError, OverflowError):
                found[name] = math.nan
            if not math.isfinite(found[name]):
                raise InputError(
                    f"{name!r} is {value!r}, but a metric is a finite number; leave it out where there is none"
                )
        self.metrics.update(found)


class Experiment:
    """Splits traffic between models of one cache.

    ``with experiment.serve(cache, user) as serving: serving.model(...)`` gives a user its arm's model and, at the end,
    appends a line to the log. The arms' models are ordinary registered models: pin them where they must stay together.

    Args:
        name: Another name shares out anew.
        arms: Arm -> weight, adding up to 1; the first is the control.
        models: Arm -> the name its model is registered under; arms that are not in it are called like their model.
        share: Of all units, how many take part; raise it to ramp up.
        layer: Experiments of one layer with slices apart never share a unit.
        overrides: Unit -> arm, for testers; they do not count.
        is_on: The kill switch: `False` sends everybody to the control. It may be set later, too.
        log: Where exposures are appended, JSON lines, one write each: several processes may share it, and a log may be
            renamed away under them. Units are masked. `None` logs nothing. What cannot be written is lost with a
            warning: no request fails for it.
        now: Wall time, for the log.
        clock: In seconds.

    Raises:
        InputError: Weights that do not add up, a share out of range, an unknown arm.
    """

    def __init__(
        self,
        name: str,
        arms: Mapping[str, float],
        *,
        models: Mapping[str, str] | None = None,
        share: float = 1.0,
        layer: Layer | None = None,
        overrides: Mapping[str, str] | None = None,
        is_on: bool = True,
        log: str | PathLike[str] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.split = Split(name, dict(arms), share, layer, dict(overrides or {}), is_on)
        strange = sorted(set(models or {}) - set(arms))
        if strange:
            raise InputError(f"experiment {name!r}: models names the arm {strange[0]!r}, but there are {list(arms)!r}")
        self.models = {arm: (models or {}).get(arm, arm) for arm in arms}
        self._log = None if log is None else Path(log)
        self._is_log_lost = False
        self._now = now
        self._clock = clock

    @classmethod
    def from_config(cls, found: Effective | str | PathLike[str], name: str) -> Experiment:
        """An experiment as ``ab.experiments`` of a configuration describes it; its arms are models of the same file.

        Args:
            found: The configuration, or its file.
            name: Of the experiment.

        Raises:
            ConfigError: The file has problems.
            InputError: There is no such experiment, or what it says cannot be.
        """
        found = found if isinstance(found, Effective) else load_config(str(found))
        experiments = found.settings.ab.experiments
        if name not in experiments:
            listed = ", ".join(experiments) or "none"
            raise InputError(f"there is no experiment {name!r}; the configuration has: {listed}", found.path or "")
        asked, folder = experiments[name], Path(found.folder)
        return cls(
            name,
            asked.arms,
            share=asked.share,
            layer=None if asked.layer is None else Layer(asked.layer.name, asked.layer.start, asked.layer.end),
            overrides=asked.overrides,
            is_on=asked.is_on,
            log=None if asked.log is None else folder / asked.log,
        )

    @property
    def name(self) -> str:
        """Of the experiment."""
        return self.split.name

    @property
    def is_on(self) -> bool:
        """The kill switch: `False` sends everybody to the control, testers included, from the next unit on.

        It may be set from any thread, and holds for this object. Whoever is being served keeps the arm.

        Raises:
            InputError: It is set to something else than `True` or `False`.
        """
        return self.split.is_on

    @is_on.setter
    def is_on(self, is_on: bool) -> None:
        self.split = replace(self.split, is_on=is_on)

    def assign(self, unit: str) -> Assignment:
        """The arm of a unit, without serving or logging anything.

        Raises:
            InputError: The unit is not text.
        """
        return self.split.assign(unit)

    @contextmanager
    def serve(
        self, cache: ModelCache, unit: str, *, timeout: float | None = None, request: str = ""
    ) -> Generator[Serving]:
        """Serve one unit with its arm's model, held for the block, and log it at the end, also if the block raises.

        Args:
            cache: Has the models.
            unit: Who is served; sticks to its arm.
            timeout: Seconds to wait for the model.
            request: Goes into the log as it is.

        Raises:
            InputError: The unit is not text.
        """
        serving, start_s = self._begin(cache, unit)
        try:
            with cache.get(self.models[serving.arm], timeout=timeout) as serving.model:
                serving.wait_s = self._clock() - start_s
                yield serving
        except BaseException as error:
            self._write(serving, unit, request, start_s, error)
            raise
        finally:
            serving.model = None
        self._write(serving, unit, request, start_s, None)

    @asynccontextmanager
    async def aserve(
        self,
        cache: ModelCache,
        unit: str,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - it is the cache's own.
        request: str = "",
    ) -> AsyncGenerator[Serving]:
        """The same for tasks: ``async with``."""
        serving, start_s = self._begin(cache, unit)
        try:
            async with cache.aget(self.models[serving.arm], timeout=timeout) as serving.model:
                serving.wait_s = self._clock() - start_s
                yield serving
        except BaseException as error:
            self._write(serving, unit, request, start_s, error)
            raise
        finally:
            serving.model = None
        self._write(serving, unit, request, start_s, None)

    def _begin(self, cache: ModelCache, unit: str) -> tuple[Serving, float]:
        given = self.assign(unit)
        tier = str(cache.info(self.models[given.arm]).tier)
        return Serving(given.arm, given.why, None, tier, 0.0), self._clock()

    def _write(self, serving: Serving, unit: str, request: str, start_s: float, error: BaseException | None) -> None:
        if self._log is None or serving.why not in (Why.ASSIGNED, Why.OVERRIDE):
            return
        line = {
            "format": FORMAT,
            "at": self._now().isoformat(timespec="milliseconds"),
            "experiment": self.name,
            "arm": serving.arm,
            "weights": dict(self.split.weights),
            "share": self.split.share,
            "why": str(serving.why),
            "unit": mask(self.name, unit),
            "request": request,
            "model": self.models[serving.arm],
            "tier": serving.tier,
            WAIT: serving.wait_s,
            SECONDS: self._clock() - start_s,
            "metrics": serving.metrics,
            "error": "" if error is None else type(error).__name__,
        }
        try:
            _append(self._log, json.dumps(line, allow_nan=False) + "\n")
        # Not only what the system refuses: `metrics` is the caller's to fill. The unit was served either way.
        except (OSError, TypeError, ValueError) as failure:
            if not self._is_log_lost:
                _LOG.warning(
                    "exposures of experiment=%s are lost until log=%s can be written: %s", self.name, self._log, failure
                )
            self._is_log_lost = True
        else:
            self._is_log_lost = False


def _append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # One write to a file opened for appending: lines of several threads and processes do not mix.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        left = text.encode()
        while left:  # A disk that is full takes a part, and says so when asked for the rest.
            left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)
