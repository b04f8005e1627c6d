"""From differences to a verdict: better, worse, no worse than a stated margin, or cannot tell. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from modelcache.ab.metrics import Metric
from modelcache.ab.statistics import (
    Interval,
    can_bound_mean,
    holm,
    leaning,
    mean_interval,
    mean_margin_p,
    sequence_interval,
    sequence_margin_p,
    sequence_p,
    sign_flip_p,
    smallest_detectable,
)


class Verdict(StrEnum):
    """What may be said of an arm next to the baseline, for one metric."""

    BETTER = "better"
    WORSE = "worse"
    NO_WORSE = "no worse than the margin"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True, slots=True)
class Differences:
    """What one arm showed less what the baseline showed, one number per independent unit.

    Attributes:
        metric: Of what; for a ratio, the numbers are differences of logarithms.
        arm: The arm, `base` the baseline.
        unit: What one number is: ``item``, or ``block`` where the arms did not fit together and ran in turns.
        values: The differences, in the order in which they came.
        num_guessed: Units that the arm failed on and the baseline did not, where the score for that is a guess because
            its bounds are not known: neither "better" nor "no worse" rests on guesses.
        num_left_out: Units without a number, as one of the arms failed on them.
    """

    metric: Metric
    arm: str
    base: str
    unit: str
    values: tuple[float, ...]
    num_guessed: int = 0
    num_left_out: int = 0

    @property
    def goodness(self) -> list[float]:
        """The same with the sign turned so that more is better."""
        return [self.metric.sign * value for value in self.values]


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one arm and one metric, with the numbers behind it.

    Attributes:
        differences: What it rests on.
        mean: Of the differences, in the metric's unit; for a ratio a relative change (0.03 is 3 % more).
        interval: Of it, for this comparison alone.
        p: Of "no difference", for this comparison alone; `adjusted_p` is corrected for all comparisons (Holm).
        margin_p: Of "worse by the margin or more, in the mean", corrected likewise; `None` where no margin was stated.
        detectable: The difference that so many units show four times out of five.
        peeked: The figures hold however often they were looked at; if not, only at the number of items fixed before.
        reason: Why a verdict cannot be given, where more than the numbers stands against it; empty otherwise.
    """

    differences: Differences
    mean: float
    interval: Interval
    p: float
    adjusted_p: float
    margin_p: float | None
    detectable: float
    peeked: bool
    verdict: Verdict
    reason: str = ""

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        metric, arm, base = self.differences.metric, self.differences.arm, self.differences.base
        count = f"{len(self.differences.values)} {self.differences.unit}s"
        if not len(self.differences.values):
            return f"{arm} and {base} have no {self.differences.unit} in common by which to compare {metric.name}"
        figures = f"{metric.name} {metric.change(self.mean)}, {_percent(self.interval.confidence)} interval "
        figures += f"{metric.change(self.interval.low)} to {metric.change(self.interval.high)}"
        if self.differences.num_left_out:
            figures += f"; without {self.differences.num_left_out} that one of them failed on"
        if self.verdict is Verdict.CANNOT_TELL:
            because = f": {self.reason}" if self.reason else ""
            return f"{arm} and {base} cannot be told apart on {count} ({figures}){because}"
        if self.verdict is Verdict.NO_WORSE:
            assert metric.margin is not None
            return f"{arm} is no worse than {base} by {metric.amount(metric.margin)} ({figures}, {count})"
        return f"{arm} is {self.verdict} than {base} ({figures}, {count})"

    def as_json(self) -> dict[str, object]:
        """Everything, for programs; `None` for what is unbounded."""
        return {
            "metric": self.differences.metric.name,
            "arm": self.differences.arm,
            "baseline": self.differences.base,
            "unit": self.differences.unit,
            "differences": list(self.differences.values),
            "num_guessed": self.differences.num_guessed,
            "num_left_out": self.differences.num_left_out,
            "mean": _finite(self.mean),
            "interval": [_finite(self.interval.low), _finite(self.interval.high)],
            "confidence": self.interval.confidence,
            "p": self.p,
            "adjusted_p": self.adjusted_p,
            "margin": self.differences.metric.margin,
            "reach": _finite(self.differences.metric.reach),
            "margin_p": self.margin_p,
            "detectable": _finite(self.detectable),
            "holds_when_peeked_at": self.peeked,
            "verdict": str(self.verdict),
            "reason": self.reason,
            "sentence": self.sentence,
        }


def judge(
    found: Sequence[Differences], *, level: float = 0.05, peeked: bool = False, seed: int = 0
) -> tuple[Judgement, ...]:
    """Judge all comparisons of one run together, so that the chance of any wrong verdict among them is `level`.

    Args:
        found: One for each arm but the baseline and each metric.
        level: The chance of a wrong verdict where the arms are the same.
        peeked: Whether the number of differences depends on the differences: then only figures are used that hold
            however often they are looked at.
        seed: Of the resampling.
    """
    ps = [sequence_p(one.values) if peeked else sign_flip_p(one.values, seed=seed) for one in found]
    with_margin = [one for one in found if one.metric.margin is not None]
    margins = holm([_margin_p(one, peeked=peeked, seed=seed) for one in with_margin])
    margin_p_of = {(one.arm, one.metric.name): p for one, p in zip(with_margin, margins, strict=True)}
    return tuple(
        _judgement(
            one, p, adjusted_p, margin_p_of.get((one.arm, one.metric.name)), level=level, peeked=peeked, seed=seed
        )
        for one, p, adjusted_p in zip(found, ps, holm(ps), strict=True)
    )


def _judgement(
    one: Differences, p: float, adjusted_p: float, margin_p: float | None, *, level: float, peeked: bool, seed: int
) -> Judgement:
    values, metric = one.values, one.metric
    interval = (
        sequence_interval(values, reach=metric.reach, confidence=1 - level)
        if peeked
        else mean_interval(values, reach=metric.reach, confidence=1 - level, seed=seed)
    )
    mean = math.fsum(values) / len(values) if values else math.nan
    verdict, reason = _verdict(one, mean, adjusted_p, margin_p, level=level, peeked=peeked)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan
    return Judgement(
        one,
        metric.relative(mean),
        Interval(metric.relative(interval.low), metric.relative(interval.high), interval.confidence),
        p,
        adjusted_p,
        margin_p,
        metric.relative(smallest_detectable(len(values), spread, level=level)),
        peeked,
        verdict,
        reason,
    )


def _verdict(
    one: Differences, mean: float, adjusted_p: float, margin_p: float | None, *, level: float, peeked: bool
) -> tuple[Verdict, str]:
    """And the reason, if it is that nothing can be told for more than the numbers."""
    are_different, way = adjusted_p <= level, one.metric.sign * mean
    # While peeking the sizes count less than for the mean: where most go one way and the mean another, neither is said.
    is_split = are_different and peeked and way * leaning(one.goodness) <= 0
    is_better = are_different and not is_split and way > 0
    if is_better or (margin_p is not None and margin_p <= level):
        if one.num_guessed:
            return Verdict.CANNOT_TELL, _guesses(one)
        return Verdict.BETTER if is_better else Verdict.NO_WORSE, ""
    if are_different and not is_split:
        return Verdict.WORSE, ""
    if is_split:
        return Verdict.CANNOT_TELL, "they differ, but most differences go one way and their mean goes the other"
    return Verdict.CANNOT_TELL, "" if margin_p is None else _missing_range(one, peeked=peeked)


def _margin_p(one: Differences, *, peeked: bool, seed: int) -> float:
    margin, reach = one.metric.margin_on_scale, one.metric.reach
    if peeked:
        return sequence_margin_p(one.goodness, margin, reach=reach)
    return mean_margin_p(one.goodness, margin, reach=reach, seed=seed)


def _guesses(one: Differences) -> str:
    return (
        f"{one.arm} failed on {one.num_guessed} that {one.base} did not fail on, and how bad a score that is says only "
        "its range; state Metric(bounds=...)"
    )


def _missing_range(one: Differences, *, peeked: bool) -> str:
    """What it takes to rule out a loss by the margin, where the numbers cannot do it."""
    if can_bound_mean(one.values, reach=one.metric.reach, peeked=peeked):
        return ""
    why, other = (
        ("a run is looked at", ", or finish a run of a fixed number of items")
        if peeked
        else ("so few units differ", "")
    )
    return f"where {why}, a loss by the margin is ruled out only within a range; state Metric(bounds=...){other}"


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _percent(share: float) -> str:
    return f"{100 * share:g} %"
