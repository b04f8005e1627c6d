"""What an exposure log says: whether units were shared out as planned, and whether an arm does better.

Units are compared in pairs, the n-th new unit of an arm with the n-th of the control. Which unit is in which arm is by
lot, so the differences are symmetric where the arms are the same, and the verdicts hold at every look at a growing log.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from modelcache.ab.assignment import Why
from modelcache.ab.experiment import FORMAT
from modelcache.ab.inputs import InputError, json_lines
from modelcache.ab.metrics import FAILURES, Metric
from modelcache.ab.statistics import share_p
from modelcache.ab.table import new_table, verdict_table
from modelcache.ab.verdicts import Differences, Judgement, judge

#: Below this chance of coming about by itself, a share of units is taken for a fault of the set-up.
ALARM_P = 0.001
#: Measured of every exposure.
_SECONDS, _WAIT = "seconds", "wait_s"
_KEYS = ("experiment", "arm", "weights", "why", "unit", "tier", _WAIT, _SECONDS, "metrics", "error")


@dataclass(frozen=True, slots=True)
class ArmExposures:
    """One arm.

    Attributes:
        arm: Its name.
        num_units: That take part; `num_exposures` times they were served.
        num_failed: Exposures that ended in an error.
        tiers: How often the model was found on each tier: an arm that is found cold more often is slower for that.
        means: Of each metric, by unit.
    """

    arm: str
    num_units: int
    num_exposures: int
    num_failed: int
    tiers: Mapping[str, int]
    means: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Analysis:
    """One experiment.

    Attributes:
        experiment: Its name.
        arms: The first is the control.
        judgements: Of each other arm, by each metric.
        share_p: The chance that the units were shared out by the weights; `alarm` says if it is too small.
        num_crossing: Units that were served by more than one arm: nought, unless weights were changed.
        num_overridden: Exposures of testers, which do not count.
    """

    experiment: str
    arms: tuple[ArmExposures, ...]
    judgements: tuple[Judgement, ...]
    share_p: float
    num_crossing: int
    num_overridden: int

    @property
    def alarm(self) -> str:
        """What makes the figures worthless, in words; empty if nothing does."""
        if self.share_p < ALARM_P:
            counts = ", ".join(f"{arm.arm} {arm.num_units}" for arm in self.arms)
            return (
                f"units are not shared out by the weights ({counts}; p = {self.share_p:.2g}): some arm loses units, or "
                "the log lines of some are missing. Find out before reading on"
            )
        return ""


@dataclass(slots=True)
class _Seen:
    """Everything of one experiment."""

    weights: dict[str, float]
    units: dict[str, dict[str, list[Mapping[str, Any]]]] = field(default_factory=dict)
    arms_of: dict[str, set[str]] = field(default_factory=dict)
    expected: Counter[str] = field(default_factory=Counter)
    num_overridden: int = 0

    def add(self, line: Mapping[str, Any]) -> None:
        if line["why"] == Why.OVERRIDE:
            self.num_overridden += 1
            return
        is_new = line["unit"] not in self.arms_of
        self.units.setdefault(line["arm"], {}).setdefault(line["unit"], []).append(line)
        self.arms_of.setdefault(line["unit"], set()).add(line["arm"])
        if is_new:
            for arm, weight in line["weights"].items():
                self.expected[arm] += weight


def analyse(
    path: str | PathLike[str], *, lower_is_better: Iterable[str] = (), level: float = 0.05
) -> tuple[Analysis, ...]:
    """Read an exposure log, of one experiment or several.

    Args:
        path: JSON lines, as `Experiment` writes them.
        lower_is_better: Metrics of which less is better; times and failures are known.
        level: The chance of a wrong verdict in one experiment, where arms are the same.

    Raises:
        InputError: No such file, no exposures in it, or a line that is not one.
    """
    seen: dict[str, _Seen] = {}
    for line in _lines(Path(path)):
        seen.setdefault(line["experiment"], _Seen(line["weights"])).add(line)
    if not seen:
        raise InputError("no exposures in this file yet; serve some units first", str(path))
    lower = {*lower_is_better, _SECONDS, _WAIT, FAILURES}
    return tuple(_analysis(name, one, lower, level) for name, one in seen.items())


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise InputError("there is no such log; give the file that the experiment writes", str(path))
    for number, text in json_lines(path):
        try:
            line = json.loads(text)
            problem = _problem_of(line)
        except ValueError as error:
            problem = str(error)
        if problem:
            words = f"this is not a line of an exposure log ({problem}); take it out, or give another file"
            raise InputError(words, str(path), number)
        yield line


def _problem_of(line: object) -> str:
    if not isinstance(line, dict):
        return "it is not an object"
    if line.get("format") != FORMAT:
        return f"its format is {line.get('format')!r}, not {FORMAT!r}"
    missing = [key for key in _KEYS if key not in line]
    if missing:
        return f"it has no {missing[0]!r}"
    return "" if line["arm"] in line["weights"] else f"its arm {line['arm']!r} is none of its weights"


def _analysis(name: str, seen: _Seen, lower: set[str], level: float) -> Analysis:
    crossing = {unit for unit, arms in seen.arms_of.items() if len(arms) > 1}
    figures = {
        arm: [_figures(lines) for unit, lines in seen.units.get(arm, {}).items() if unit not in crossing]
        for arm in seen.weights
    }
    names = sorted({metric for units in figures.values() for unit in units for metric in unit})
    metrics = [
        Metric(name, None, "lower" if name in lower else "higher", unit="s" if name in (_SECONDS, _WAIT) else "")
        for name in names
    ]
    control, *others = seen.weights
    found = [
        _differences(metric, arm, control, figures[arm], figures[control])
        for metric in metrics
        if metric.name != FAILURES or any(unit[FAILURES] for units in figures.values() for unit in units)
        for arm in others
    ]
    return Analysis(
        name,
        tuple(_arm(arm, seen.units.get(arm, {}), figures[arm]) for arm in seen.weights),
        judge(found, level=level, peeked=True),
        share_p([len(seen.units.get(arm, {})) for arm in seen.weights], [seen.expected[arm] for arm in seen.weights]),
        len(crossing),
        seen.num_overridden,
    )


def _figures(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of one unit: the mean of each metric over its exposures."""
    values: dict[str, list[float]] = {}
    for line in lines:
        values.setdefault(FAILURES, []).append(float(bool(line["error"])))
        if not line["error"]:
            for name, value in {**line["metrics"], _SECONDS: line["seconds"], _WAIT: line["wait_s"]}.items():
                values.setdefault(name, []).append(value)
    return {name: fmean(each) for name, each in values.items()}


def _differences(
    metric: Metric, arm: str, control: str, mine: Sequence[Mapping[str, float]], its: Sequence[Mapping[str, float]]
) -> Differences:
    ours = [unit[metric.name] for unit in mine if metric.name in unit]
    theirs = [unit[metric.name] for unit in its if metric.name in unit]
    return Differences(metric, arm, control, "unit pair", tuple(a - b for a, b in zip(ours, theirs, strict=False)))


def _arm(
    arm: str, units: Mapping[str, Sequence[Mapping[str, Any]]], figures: Sequence[Mapping[str, float]]
) -> ArmExposures:
    lines = [line for each in units.values() for line in each]
    names = {name for unit in figures for name in unit}
    return ArmExposures(
        arm,
        len(units),
        len(lines),
        sum(bool(line["error"]) for line in lines),
        dict(Counter(line["tier"] for line in lines)),
        {name: fmean(unit[name] for unit in figures if name in unit) for name in sorted(names)},
    )


def as_tables(found: Analysis) -> Iterator[Table | Text]:
    """What was found, for a terminal."""
    yield Text(f"{found.experiment}: {sum(arm.num_units for arm in found.arms)} units", "bold")
    names = sorted({name for arm in found.arms for name in arm.means})
    arms = new_table("arm", ">units", ">exposures", ">failed", ">vram/ram/disk", *(f">{name}" for name in names))
    for arm in found.arms:
        tiers = "/".join(str(arm.tiers.get(tier, 0)) for tier in ("vram", "ram", "disk"))
        means = [f"{arm.means[name]:.4g}" if name in arm.means else "-" for name in names]
        arms.add_row(Text(arm.arm), str(arm.num_units), str(arm.num_exposures), str(arm.num_failed), tiers, *means)
    yield arms
    yield verdict_table(found.judgements)
    for one in found.judgements:
        yield Text(one.sentence + ".")
    asides = f"{found.num_overridden} exposures of overrides do not count"
    if found.num_crossing:
        asides += (
            f"; {found.num_crossing} units were served by several arms and do not count: were the weights changed?"
        )
    yield Text(f"{asides}. Intervals hold at every look (confidence sequences).", "dim")


def as_json(found: Analysis) -> dict[str, object]:
    """What was found, for programs."""
    return {
        "experiment": found.experiment,
        "arms": [asdict(arm) for arm in found.arms],
        "judgements": [one.as_json() for one in found.judgements],
        "share_p": found.share_p,
        "alarm": found.alarm,
        "num_crossing": found.num_crossing,
        "num_overridden": found.num_overridden,
    }
