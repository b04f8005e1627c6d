"""Where settings come from, and which of two wins: a call, the command line, the environment, a file, the default.

The environment is read here and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel

from modelcache.config.document import Path, Tree
from modelcache.config.fields import Section
from modelcache.config.schema import Settings
from modelcache.config.values import Scalar
from modelcache.errors import Finding
from modelcache.spec import did_you_mean

ENVIRONMENT_PREFIX = "MODELCACHE_"
CONFIG_VARIABLE = "MODELCACHE_CONFIG"
_LARGEST_VARIABLE = 4096


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was set.

    Attributes:
        kind: ``call``, ``cli``, ``environment``, ``file`` or ``default``.
        path: The file, or the variable of the environment; empty otherwise.
        line: In the file, from 1.
        column: In the file, from 1.
    """

    kind: str
    path: str = ""
    line: int | None = None
    column: int | None = None

    DEFAULT: ClassVar[Origin]

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.path, self.line) if part not in {"", None})
        return place if self.kind in {"file", "environment"} else self.kind


Origin.DEFAULT = Origin("default")


@dataclass(frozen=True, slots=True)
class Setting:
    """One value from one layer."""

    path: Path
    value: Tree | object
    origin: Origin


def settings_paths() -> Iterator[tuple[str, ...]]:
    """Every key that stands outside `models` and `ab`, as a path."""
    for name, field in Settings.model_fields.items():
        if name in {"models", "ab", "version"}:
            continue
        section = _section(field.annotation)
        if section is not None:
            yield from ((name, inner) for inner in section.model_fields)
        else:
            yield (name,)


def _section(annotation: object) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def variable(path: tuple[str, ...]) -> str:
    """The environment variable of a key: ``MODELCACHE_BUDGETS__VRAM``."""
    return ENVIRONMENT_PREFIX + "__".join(path).upper()


def from_environment(environ: Mapping[str, str] | None) -> tuple[list[Setting], list[Finding]]:
    """What the environment sets, and what in it looks like a setting and is none (a warning: it may be another's)."""
    source = os.environ if environ is None else environ  # noqa: TID251 - this is the one place.
    known = {variable(path): path for path in settings_paths()}
    lists = {variable(("preload",)), variable(("roots",))}
    settings, findings = [], []
    for name in sorted(name for name in source if name.startswith(ENVIRONMENT_PREFIX) and name != CONFIG_VARIABLE):
        path, text = known.get(name), source[name].strip()[: _LARGEST_VARIABLE + 1]
        if path is None:
            hint = did_you_mean(name, {each.lower(): each for each in known}).replace("modelcache_", ENVIRONMENT_PREFIX)
            findings.append(
                Finding(name, None, None, "", f"is no setting and is ignored{_upper_hint(hint)}", severity="warning")
            )
        elif text:
            value: Tree = Scalar(text, loose=True)
            if name in lists:
                separator = os.pathsep if path == ("roots",) else ","
                value = [Scalar(part.strip(), loose=True) for part in text.split(separator) if part.strip()]
            settings.append(Setting(path, value, Origin("environment", name)))
    return settings, findings


def _upper_hint(hint: str) -> str:
    before, quote, rest = hint.partition("'")
    return before + quote + rest.upper()


def config_variable(environ: Mapping[str, str] | None) -> str | None:
    """The file that the environment names; `None` when it names none."""
    source = os.environ if environ is None else environ  # noqa: TID251 - this is the one place.
    return source.get(CONFIG_VARIABLE, "").strip() or None


def cuda_variables(environ: Mapping[str, str] | None = None) -> tuple[str | None, str | None]:
    """``CUDA_VISIBLE_DEVICES`` and ``CUDA_DEVICE_ORDER``; `None` for one that is not set."""
    source = os.environ if environ is None else environ  # noqa: TID251 - this is the one place.
    return source.get("CUDA_VISIBLE_DEVICES"), source.get("CUDA_DEVICE_ORDER")


def from_keywords(values: Mapping[str, object], kind: str) -> tuple[list[Setting], list[Finding]]:
    """What a call or a command line sets, by dotted key; `None` is not set. Text of a command line is read loosely."""
    known = {".".join(path): path for path in settings_paths()}
    settings, findings = [], []
    for key, value in values.items():
        if key not in known:
            findings.append(Finding("", None, None, key, f"unknown key{did_you_mean(key, known)}"))
        elif value is not None:
            taken = Scalar(value, loose=True) if kind == "cli" and isinstance(value, str) else value
            settings.append(Setting(known[key], taken, Origin(kind)))
    return settings, findings


def from_tree(tree: Mapping[str, Tree], places: Mapping[Path, Origin]) -> list[Setting]:
    """The leaves of a file's tree; a list is a leaf, and so is an empty mapping."""
    settings: list[Setting] = []
    waiting: list[tuple[Path, Tree]] = [((), dict(tree))]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict) and (value or not path):
            waiting += [((*path, key), inner) for key, inner in value.items()]
        else:
            settings.append(Setting(path, value, places.get(path, Origin("file"))))
    return settings


def overlay(tree: dict[str, Tree], settings: list[Setting]) -> dict[str, Tree]:
    """A copy of a file's tree with these values on top, in order. What is no mapping in the file stays as it is."""
    top: dict[str, Tree] = dict(tree)
    for setting in settings:
        into = top
        for step in setting.path[:-1]:
            inner = into.get(str(step), {})
            if isinstance(inner, Scalar) and inner.is_empty:
                inner = {}
            if not isinstance(inner, dict):
                break
            copied = dict(inner)
            into[str(step)] = copied
            into = copied
        else:
            into[str(setting.path[-1])] = setting.value  # type: ignore[assignment]  # a call's value is no tree
    return top
