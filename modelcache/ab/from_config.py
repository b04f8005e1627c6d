"""The comparison that the section `ab` of a configuration describes; for experiments see `Experiment.from_config`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from modelcache import Effective, ModelCache, load_config
from modelcache.ab.compare import compare
from modelcache.ab.comparison import Comparison
from modelcache.ab.inputs import InputError
from modelcache.ab.metrics import Metric


def compare_from_config(
    cache: ModelCache,
    found: Effective | str | PathLike[str],
    *,
    on_progress: Callable[[str], object] = lambda _line: None,
) -> Comparison:
    """Run the comparison of a configuration.

    Args:
        cache: Has the models.
        found: The configuration, or its file.
        on_progress: Called with a line now and then.

    Raises:
        ConfigError: The file has problems.
        InputError: It describes no comparison, or one of its functions or its items are not there.
    """
    found = found if isinstance(found, Effective) else load_config(str(found))
    asked = found.settings.ab.compare
    where = found.path or "the configuration"
    if asked is None:
        raise InputError("there is no 'ab.compare' to run; say there what to compare", where)
    scores = [
        Metric(
            name,
            _function(score.measure, where),
            score.better,  # type: ignore[arg-type]
            score.scale,  # type: ignore[arg-type]
            score.margin,
            bounds=score.bounds,
        )
        for name, score in asked.scores.items()
    ]
    folder = Path(found.folder)
    return compare(
        cache,
        asked.arms,
        folder / asked.items,
        run=_function(asked.run, where),
        score=scores,
        repeats=asked.repeats,
        seed=asked.seed,
        latency_margin=asked.latency_margin,
        level=asked.level,
        primary=asked.primary,
        warm_up=asked.warm_up,
        stop_early=asked.stop_early,
        max_items=asked.max_items,
        max_seconds=asked.max_time,
        allow_disk=asked.allow_disk,
        log=None if asked.log is None else folder / asked.log,
        on_progress=on_progress,
    )


def _function(entry: str, where: str) -> Callable[..., Any]:
    module, _, path = entry.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for name in path.split("."):
            value = getattr(value, name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{entry!r} cannot be had ({error}); is its folder on PYTHONPATH?", where) from error
    if not callable(value):
        raise InputError(f"{entry!r} is not a function, but {value!r:.80}", where)
    function: Callable[..., Any] = value
    return function
