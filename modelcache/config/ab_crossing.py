"""What no key of `ab` can tell alone: arms that must be models, weights that must add up, slices that overlap."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from typing import TYPE_CHECKING

from modelcache.config.document import Path, Tree
from modelcache.config.values import read_fraction, word
from modelcache.spec import did_you_mean

if TYPE_CHECKING:
    from modelcache.config.crossing import Report

# Thirds written in decimals.
_TOLERANCE = 1e-3


def look_at_ab(tree: Mapping[str, Tree], models: Collection[str], report: Report) -> None:
    """Report everything that is wrong across keys of `ab`."""
    section = tree.get("ab")
    if not isinstance(section, dict):
        return
    compare = section.get("compare")
    if isinstance(compare, dict):
        _arms(("ab", "compare", "arms"), compare.get("arms"), models, report)
    experiments = section.get("experiments")
    slices: list[tuple[str, str, float, float]] = []
    for name, experiment in experiments.items() if isinstance(experiments, dict) else ():
        if isinstance(experiment, dict):
            at: Path = ("ab", "experiments", name)
            _weights(at, experiment.get("arms"), models, report)
            _overrides(at, experiment, report)
            slices += ((name, *found) for found in _slice(at, experiment.get("layer"), report))
    for (one, layer, start, end), (other, its_layer, its_start, its_end) in combinations(slices, 2):
        if layer == its_layer and start < its_end and its_start < end:
            report(
                ("ab", "experiments", other, "layer"),
                f"overlaps with {one!r} in the layer {layer!r}, so that units would be in both; give them slices apart",
            )


def _arms(at: Path, arms: Tree | None, models: Collection[str], report: Report) -> None:
    if not isinstance(arms, (list, tuple)):
        return
    if len(arms) < 2:
        report(at, "needs two models or more; name one twice to compare it with itself")
    for index, arm in enumerate(arms):
        _known((*at, index), word(arm), models, report)


def _weights(at: Path, arms: Tree | None, models: Collection[str], report: Report) -> None:
    if not isinstance(arms, dict):
        return
    if len(arms) < 2:
        report((*at, "arms"), "needs two models or more, each with its weight", at_key=True)
    weights = [weight for value in arms.values() if (weight := _fraction(value)) is not None]
    for name in arms:
        _known((*at, "arms", name), name, models, report, at_key=True)
    total = sum(weights)
    if len(weights) == len(arms) > 1 and abs(total - 1) > _TOLERANCE:
        listed = " + ".join(f"{100 * weight:g}%" for weight in weights)
        message = f"weights must add up to 100%, got {listed} = {100 * total:g}%; use 'share' to ramp up"
        report((*at, "arms"), message, at_key=True)
    for name, value in arms.items():
        if _fraction(value) == 0:
            report((*at, "arms", name), "a weight must be above 0%; leave the arm out")


def _overrides(at: Path, experiment: Mapping[str, Tree], report: Report) -> None:
    arms, overrides = experiment.get("arms"), experiment.get("overrides")
    if isinstance(arms, dict) and isinstance(overrides, dict):
        for unit, value in overrides.items():
            arm = word(value)
            if arm is not None and arm not in arms:
                listed = ", ".join(map(repr, arms))
                report((*at, "overrides", unit), f"names {arm!r}, which is none of its arms: {listed}")


def _slice(at: Path, layer: Tree | None, report: Report) -> Iterator[tuple[str, float, float]]:
    if not isinstance(layer, dict):
        return
    name = word(layer.get("name"))
    start = _fraction(layer["start"]) if "start" in layer else 0.0
    end = _fraction(layer["end"]) if "end" in layer else 1.0
    if name is None or start is None or end is None:
        return
    if start >= end:
        report((*at, "layer"), f"begins at {100 * start:g}% and ends at {100 * end:g}%: nobody is in it", at_key=True)
        return
    yield name, start, end


def _known(at: Path, name: str | None, models: Collection[str], report: Report, *, at_key: bool = False) -> None:
    if name is not None and name not in models:
        hint = did_you_mean(name, models) or "; models are listed in 'models'"
        report(at, f"no model is called {name[:80]!r}{hint}", at_key=at_key)


def _fraction(value: object) -> float | None:
    try:
        return read_fraction(value)
    except ValueError:
        return None
