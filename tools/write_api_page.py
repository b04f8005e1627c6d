"""Write docs/api.md from the public names and their docstrings: `python tools/write_api_page.py`."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
_GROUPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("The cache", "modelcache", ("ModelCache",)),
    (
        "What it hands out",
        "modelcache",
        ("ModelHandle", "unwrap", "AsyncGet", "Lease", "Leases", "MoveFuture"),
    ),
    (
        "What it tells",
        "modelcache",
        (
            *("CacheStats", "ModelStats", "TierStats", "Counters", "Health", "Freed", "Forecast", "MoveEvent"),
            *("BudgetChange", "Tier", "MoveKind", "Reason", "Priority", "OnWrite"),
        ),
    ),
    (
        "Dispatched models",
        "modelcache",
        (
            *("materialize_meta_tensors", "plan_materialize", "restore_dispatch", "materialized", "is_dispatched"),
            *("dispatch_model", "add_materialize_methods", "MaterializePlan", "PlannedTensor"),
        ),
    ),
    (
        "Configuration and the machine",
        "modelcache",
        (
            *("load_config", "config_schema", "missing_files", "Effective", "Finding", "planned_budgets"),
            *("PlannedBudgets", "machine_report", "MachineReport", "Reading", "Unavailable", "weights_bytes"),
        ),
    ),
    (
        "Units",
        "modelcache",
        ("parse_bytes", "format_bytes", "parse_percent", "parse_rate", "format_seconds"),
    ),
    (
        "Comparing models: `modelcache.ab`",
        "modelcache.ab",
        (
            *("compare", "Arm", "Metric", "Comparison", "Judgement", "Verdict", "Experiment", "Assignment", "Serving"),
            *("Layer", "Split", "analyse", "Analysis", "InputError", "smallest_detectable"),
        ),
    ),
    (
        "Testing an application: `modelcache.testing`",
        "modelcache.testing",
        ("SimulatedDevice", "Faults", "Hold", "cache_of", "FakeClock", "FakePool", "FakeMover", "FakeModel"),
    ),
)
_INTRODUCTION = """\
# API

Every public name, made from the docstrings by `tools/write_api_page.py`. What is not here is private. Errors have
[a page of their own](errors.md), and the keys of a configuration file [too](configuration.md). Sizes are bytes where
they are numbers, times are seconds. `modelcache.ab` needs the extra `[ab]`.
"""
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields|Example|Examples):$")


def page() -> str:
    """The whole page."""
    pieces = [_INTRODUCTION]
    for heading, module, names in _GROUPS:
        pieces.append(f"## {heading}\n")
        for name in names:
            pieces.extend(_entries(name, getattr(importlib.import_module(module), name)))
    return "\n".join(pieces)


def listed() -> dict[str, set[str]]:
    """The names on the page, by module."""
    found: dict[str, set[str]] = {}
    for _, module, names in _GROUPS:
        found.setdefault(module, set()).update(names)
    return found


def _entries(name: str, thing: Any) -> Iterator[str]:
    yield f"### `{name}{_signature(thing)}`\n"
    yield _text(thing)
    if inspect.isclass(thing):
        for method, member in _own(thing):
            plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if isinstance(member, property | cached_property):
                yield f"#### `{name}.{method}`\n"
                yield _text(member)
            elif inspect.isfunction(plain):
                yield f"#### `{name}.{method}{_signature(plain)}`\n"
                yield _text(plain)


def _own(thing: type) -> Iterator[tuple[str, Any]]:
    """What it and its private bases define and document, in order."""
    seen = set()
    for each in thing.__mro__:
        if each is thing or (each.__module__.startswith("modelcache") and each.__name__.startswith("_")):
            for name, member in vars(each).items():
                if not name.startswith("_") and name not in seen and inspect.getdoc(member):
                    seen.add(name)
                    yield name, member


def _signature(thing: Any) -> str:
    """As it is called, without the annotations, which the text explains."""
    if inspect.isclass(thing) and "__init__" not in vars(thing):
        return ""
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    parameters = [
        each.replace(annotation=inspect.Parameter.empty)
        for name, each in signature.parameters.items()
        if name not in {"self", "cls"}
    ]
    text = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    text = re.sub(r"<(?:built-in function (\w+)|(\w+\.\w+): [^>]*)>", r"\1\2", text)
    return re.sub(r"<function .*?<lambda> at \w+>|<function .*? at \w+>", "...", text)


def _text(thing: Any) -> str:
    """A docstring as Markdown: sections become headings in bold, their entries become lists."""
    lines: list[str] = []
    is_list = False
    for line in (inspect.getdoc(thing) or "").replace("``", "`").splitlines():
        section = _SECTION.match(line)
        if section:
            is_list = section.group(1) in ("Args", "Attributes", "Raises")
            lines += [f"**{section.group(1)}**", ""]
        elif is_list and re.match(r"^ {4}\S", line):
            name, colon, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {rest}" if colon and " " not in name else f"  {line.strip()}")
        else:
            lines.append(f"  {line.strip()}" if is_list and line else line.strip())
            is_list = is_list and (not line or line.startswith(" "))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
