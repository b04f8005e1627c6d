"""Inference on differences: intervals, permutation tests, Holm, and tests that stay valid when one peeks.

Pure functions of numbers. A difference is the arm's figure less the baseline's, of the same item; for ratios, of
logarithms. The bootstrap and the permutation tests are scipy's.

Two questions are kept apart. "Are the arms the same?" is answered by symmetry: if they are, signs are coin flips.
"Where is the mean, can it be as low as the margin?" is not: losses that are rare and large are not symmetric about
their mean, and a sample that has none of them looks like one of an arm that has none. That takes the range of the
figures: without one no interval of a mean holds for all distributions (Bahadur and Savage 1956). `reach` says it: no
difference is further from nought; infinite if that is not known.
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
# Where fewer differ from the value that most have, a bootstrap of them says too little of what is rare.
_FEW = 10
# Shares of the most that may be staked: from all, for rare losses, down to what shows small means beside large spreads.
_STAKES = 0.5 ** np.arange(8)[:, np.newaxis]
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
    differences: Sequence[float] | Floats,
    *,
    reach: float = math.inf,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Of the mean of paired differences: bias-corrected and accelerated bootstrap (Efron 1987, as in scipy).

    Where most differences are the same and fewer than ten are not, it is no narrower than what `reach` leaves open
    (`mean_margin_p`); without it, than what a rare one as large as the largest seen does. With fewer than two
    differences nothing is known, and without a reach nothing where all are nought; where all are the same otherwise,
    they are the interval.
    """
    values = _as_floats(differences)
    if len(values) < 2 or (math.isinf(reach) and not np.any(values)):
        return Interval(-math.inf, math.inf, confidence)
    found, usual = _bca(values, confidence, seed, resamples), _usual(values)
    if usual is None or (math.isinf(reach) and found.low == found.high):
        return found
    size = float(np.abs(values - usual).max())
    least, most = (-reach, reach) if math.isfinite(reach) else (usual - size, usual + size)
    low = np.quantile(_reweighted_means(values, least, seed, resamples), (1 - confidence) / 2)
    high = np.quantile(_reweighted_means(values, most, seed, resamples), (1 + confidence) / 2)
    return Interval(min(found.low, float(low)), max(found.high, float(high)), confidence)


def _bca(values: Floats, confidence: float, seed: int, resamples: int) -> Interval:
    low, high = float(values.min()), float(values.max())
    # What differs by rounding alone makes the acceleration nought over nought.
    if high - low <= 4 * len(values) * np.finfo(np.float64).eps * max(abs(low), abs(high)):
        return Interval(low, high, confidence)
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


def _usual(values: Floats) -> float | None:
    """The value that most have, where few have another."""
    found, counts = np.unique(values, return_counts=True)
    if not len(values) or 2 * counts.max() <= len(values) or len(values) - counts.max() >= _FEW:
        return None
    return float(found[counts.argmax()])


def _reweighted_means(values: Floats, unseen: float, seed: int, resamples: int) -> Floats:
    """Means of the values and of one more that was not seen, by weights drawn evenly from all that sum to one."""
    draw = np.random.default_rng(seed)
    sample = np.append(values, unseen)
    means: list[Floats] = []
    for start in range(0, resamples, _batch(len(sample))):
        weights = draw.exponential(size=(min(_batch(len(sample)), resamples - start), len(sample)))
        means.append(weights @ sample / weights.sum(axis=1))
    return np.concatenate(means)


def mean_margin_p(
    differences: Sequence[float] | Floats,
    margin: float,
    *,
    reach: float = math.inf,
    seed: int = 0,
    resamples: int = NUM_RESAMPLES,
) -> float:
    """The p-value of "the arm is worse by `margin` or more, in the mean", at a number fixed before; greater is better.

    How often a mean with random weights is as low, when the worst there can be was seen once more (Gaffke 2005): for
    scores of two values it is the exact binomial test (Clopper and Pearson 1934), for large samples the normal one. For
    all distributions it is conjectured to hold (Learned-Miller and Thomas 2019); no case is known where it does not.

    Without a reach, what was not seen is taken to be twice as far below the mean as the worst that was; and where few
    differ from the value that most have, nothing is ruled out.
    """
    values = _as_floats(differences)
    if len(values) < 2 or not can_bound_mean(values, reach=reach, peeked=False):
        return 1.0
    unseen = -reach if math.isfinite(reach) else float(2 * values.min() - values.mean())
    means = _reweighted_means(values, unseen, seed, resamples)
    return float((1 + np.count_nonzero(means <= -margin)) / (1 + resamples))


def can_bound_mean(differences: Sequence[float] | Floats, *, reach: float, peeked: bool) -> bool:
    """Whether a mean can be ruled out: not without the range, if peeking or where few differ from the usual value."""
    return math.isfinite(reach) or not (peeked or _usual(_as_floats(differences)) is not None)


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
    scaled = _scaled(_as_floats(differences) - centre)
    if not len(scaled):
        return 1.0
    total, squares = float(scaled.sum()), float(np.square(scaled).sum())
    exponent = total**2 / (2 * (squares + _MIXTURE))
    return math.sqrt(_MIXTURE / (squares + _MIXTURE)) * math.exp(min(exponent, 700.0))


def _scaled(values: Floats) -> Floats:
    mean_squares = np.cumsum(np.square(values)) / np.arange(1, len(values) + 1)
    return np.divide(values, np.sqrt(mean_squares), out=np.zeros_like(values), where=mean_squares > 0)


def leaning(differences: Sequence[float] | Floats) -> int:
    """Which way the `evidence` against nought points: 1, -1, or 0. Of skewed differences the mean may be elsewhere."""
    return int(np.sign(_scaled(_as_floats(differences)).sum()))


def sequence_p(differences: Sequence[float] | Floats) -> float:
    """The p-value of "the arms are the same" that may be looked at after each difference."""
    return min(1.0, 1.0 / evidence(differences))


def mean_evidence(differences: Sequence[float] | Floats, mean: float, reach: float) -> float:
    """How much the differences speak for more than `mean` on average: an e-value, to be read at any time.

    The wealth of who starts with 1 and stakes a share of it on each difference being above `mean`, at odds that are
    fair if that is their mean (Waudby-Smith and Ramdas 2024); on average over eight shares, each kept throughout. If
    the mean is not above, it ever exceeds 1/a with a chance of at most a, whatever the distribution within `reach`.
    """
    gains = (_as_floats(differences) + reach) / (mean + reach)
    with np.errstate(divide="ignore"):
        wealth = np.log(1 - _STAKES + _STAKES * gains).sum(axis=1)
    return math.exp(min(float(np.logaddexp.reduce(wealth)) - math.log(len(_STAKES)), 700.0))


def sequence_margin_p(differences: Sequence[float] | Floats, margin: float, *, reach: float = math.inf) -> float:
    """The p-value of "the arm is worse by `margin` or more, in the mean", at any time; greater differences are better.

    Without a reach nothing is ruled out.
    """
    values = _as_floats(differences)
    if math.isinf(reach) or not len(values) or values.mean() <= -margin:
        return 1.0
    return min(1.0, 1.0 / mean_evidence(values, -margin, reach)) if margin < reach else 0.0


def sequence_interval(
    differences: Sequence[float] | Floats, *, reach: float = math.inf, confidence: float = 0.95
) -> Interval:
    """A confidence sequence, valid however often it is looked at: the means that `mean_evidence` does not rule out.

    Without a reach, the centres that `evidence` does not rule out: they hold the mean if differences are symmetric
    about it, and nearly so if they are many. It is unbounded where they are plainly not symmetric, as the mean itself
    is ruled out, and where few differ from the value that most have.
    """
    values = _as_floats(differences)
    unbounded = Interval(-math.inf, math.inf, confidence)
    if not len(values):
        return unbounded
    if math.isfinite(reach):
        least = 2.0 / (1.0 - confidence)
        low, high = _least_mean(values, reach, least), -_least_mean(-values, reach, least)
        return Interval(low, high, confidence)
    least = 1.0 / (1.0 - confidence)
    mean, spread = float(values.mean()), float(values.std())
    if spread == 0.0:
        is_known = mean != 0.0 and evidence(values, mean + 1.0) >= least
        return Interval(mean, mean, confidence) if is_known else unbounded
    if _usual(values) is not None or evidence(values, mean) >= least:
        return unbounded
    return Interval(_edge(values, mean, -spread, least), _edge(values, mean, spread, least), confidence)


def _least_mean(values: Floats, reach: float, least: float) -> float:
    """Up to where the evidence for more than that rules means out; it falls as the mean that is asked about rises."""
    outside, inside = -reach, float(values.mean())
    for _ in range(50):
        middle = (inside + outside) / 2
        if not outside < middle < inside:
            break
        if mean_evidence(values, middle, reach) >= least:
            outside = middle
        else:
            inside = middle
    return outside


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
