"""Inference on differences: intervals, permutation tests, Holm, and a test that stays valid when one peeks.

Pure functions of numbers. A difference is the arm's figure less the baseline's, of the same item; for ratios, of
logarithms. The bootstrap and the permutation tests are scipy's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Alternative = Literal["two-sided", "less", "greater"]
Floats = NDArray[np.float64]

#: Bootstrap samples and permutations; the smallest p-value that can be shown is 1 over one more.
NUM_RESAMPLES = 9_999
# Numbers that scipy may hold at a time while it resamples.
_BATCH_NUMBERS = 4_000_000
# The sequence is tightest at about this many differences, and close to it from a tenth to ten times as many.
_TUNED_FOR = 64
_MIXTURE = _TUNED_FOR / 8.8
# The planned shares count as much as so many units in the prior of a fault: all of 20 units in one arm of two is one.
_SHARE_WEIGHT = 10.0


@dataclass(frozen=True, slots=True)
class Interval:
    """Where the mean difference is, with `confidence`."""

    low: float
    high: float
    confidence: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def mean_interval(
    differences: Sequence[float] | Floats, *, confidence: float = 0.95, seed: int = 0, resamples: int = NUM_RESAMPLES
) -> Interval:
    """Of the mean of paired differences: bias-corrected and accelerated bootstrap (Efron 1987, as in scipy).

    With fewer than two differences nothing is known; where all are the same, they are the interval.
    """
    values = _as_floats(differences)
    if len(values) < 2:
        return Interval(-math.inf, math.inf, confidence)
    if np.ptp(values) == 0.0:
        return Interval(float(values[0]), float(values[0]), confidence)
    found = stats.bootstrap(
        (values,),
        np.mean,
        method="BCa",
        confidence_level=confidence,
        n_resamples=resamples,
        batch=_batch(len(values)),
        rng=np.random.default_rng(seed),
    )
    return Interval(float(found.confidence_interval.low), float(found.confidence_interval.high), confidence)


def sign_flip_p(
    differences: Sequence[float] | Floats,
    *,
    alternative: Alternative = "two-sided",
    seed: int = 0,
    resamples: int = NUM_RESAMPLES,
) -> float:
    """The p-value of "the arms are the same": how often flipped signs give a mean as far from nought.

    Exact where there are few differences, sampled where there are many. Without a difference it is 1.
    """
    values = _as_floats(differences)
    if len(values) < 2 or not np.any(values):
        return 1.0
    found = stats.permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        alternative=alternative,
        n_resamples=resamples,
        batch=_batch(len(values)),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The same p-values, adjusted so that the chance of any wrong "yes" among them is what is read off (Holm 1979)."""
    adjusted = [1.0] * len(p_values)
    so_far = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = so_far
    return adjusted


def evidence(differences: Sequence[float] | Floats, centre: float = 0.0) -> float:
    """How much the differences speak against being symmetric about `centre`: an e-value, to be read at any time.

    If they are symmetric about it, as those of two identical arms run in random order are, it exceeds 1/a at any time
    ever with a chance of at most a, whatever their distribution: given their sizes, signs are coin flips, so
    ``exp(x S - x^2 V / 2)`` of the sum S and the sum of squares V is a supermartingale for each x (de la Pena 1999),
    and so is its mixture over a normal x (Howard, Ramdas, McAuliffe, Sekhon 2021, proposition 5). Each difference is
    first divided by the root mean square of all up to itself, which no sign enters, so the scale does not matter.
    """
    values = _as_floats(differences) - centre
    if not len(values):
        return 1.0
    mean_squares = np.cumsum(np.square(values)) / np.arange(1, len(values) + 1)
    scaled = np.divide(values, np.sqrt(mean_squares), out=np.zeros_like(values), where=mean_squares > 0)
    total, squares = float(scaled.sum()), float(np.square(scaled).sum())
    exponent = total**2 / (2 * (squares + _MIXTURE))
    return math.sqrt(_MIXTURE / (squares + _MIXTURE)) * math.exp(min(exponent, 700.0))


def sequence_p(differences: Sequence[float] | Floats) -> float:
    """The p-value of "the arms are the same" that may be looked at after each difference."""
    return min(1.0, 1.0 / evidence(differences))


def sequence_margin_p(differences: Sequence[float] | Floats, margin: float) -> float:
    """The p-value of "the arm is worse by `margin` or more", at any time; greater differences are better."""
    values = _as_floats(differences)
    if not len(values) or values.mean() <= -margin:
        return 1.0
    return min(1.0, 1.0 / evidence(values, -margin))


def sequence_interval(differences: Sequence[float] | Floats, *, confidence: float = 0.95) -> Interval:
    """A confidence sequence: the centres that `evidence` does not rule out, valid however often it is looked at."""
    values = _as_floats(differences)
    least = 1.0 / (1.0 - confidence)
    mean = float(values.mean()) if len(values) else 0.0
    spread = float(values.std()) if len(values) else 0.0
    if spread == 0.0:
        is_known = len(values) > 0 and evidence(values, mean + 1.0) >= least
        return Interval(mean, mean, confidence) if is_known else Interval(-math.inf, math.inf, confidence)
    return Interval(_edge(values, mean, -spread, least), _edge(values, mean, spread, least), confidence)


def _edge(values: Floats, mean: float, step: float, least: float) -> float:
    """The first centre from `mean` in the direction of `step` that the evidence rules out."""
    inside, outside = mean, mean + step
    for _ in range(40):
        if evidence(values, outside) >= least:
            break
        inside, outside = outside, mean + 2 * (outside - mean)
    else:
        return math.copysign(math.inf, step)
    for _ in range(50):
        middle = (inside + outside) / 2
        if evidence(values, middle) >= least:
            outside = middle
        else:
            inside = middle
    return outside


def smallest_detectable(count: int, spread: float = 1.0, *, power: float = 0.8, level: float = 0.05) -> float:
    """The mean difference that `count` differences of standard deviation `spread` show with a chance of `power`.

    For the two-sided test at `level` at a fixed number of items, by the normal approximation; infinite below two.
    """
    if count < 2:
        return math.inf
    reach: float = stats.norm.ppf(1 - level / 2) + stats.norm.ppf(power)
    return float(reach * spread / math.sqrt(count))


def share_p(counts: Sequence[int], weights: Sequence[float]) -> float:
    """The p-value of "units were given out by these weights", which may be looked at after each unit.

    One over the evidence of a Dirichlet prior about the weights against the weights themselves, which exceeds 1/a at
    any time with a chance of at most a, for few units too (Lindon and Malek 2022). If weights were changed, give the
    sums of what each unit met: then counts spread less than by one set of weights.
    """
    total = sum(weights)
    shares = [(count, weight / total) for count, weight in zip(counts, weights, strict=True) if count or weight]
    if any(not share for _, share in shares):
        return 0.0
    evidence = math.lgamma(_SHARE_WEIGHT) - math.lgamma(_SHARE_WEIGHT + sum(count for count, _ in shares))
    for count, share in shares:
        prior = _SHARE_WEIGHT * share
        evidence += math.lgamma(prior + count) - math.lgamma(prior) - count * math.log(share)
    return math.exp(min(0.0, -evidence))


def _as_floats(values: Sequence[float] | Floats) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _batch(count: int) -> int:
    return max(1, _BATCH_NUMBERS // count)
