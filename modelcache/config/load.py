"""From a file, the environment, a command line and a call to settings, with the place of every problem.

Nothing is imported or executed by checking. All problems are found in one pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from modelcache.config.document import Document, Path, Place, Tree, parse, read_file, spell
from modelcache.config.layers import (
    Origin,
    Setting,
    config_variable,
    from_environment,
    from_keywords,
    from_tree,
    overlay,
    settings_paths,
)
from modelcache.config.schema import BudgetSettings, ModelSettings, Settings
from modelcache.config.values import Scalar, show
from modelcache.errors import ConfigError, Finding
from modelcache.spec import LOADER_KINDS, LoaderSpec, ModelSpec, did_you_mean, is_entry, option_problems
from modelcache.tier import Tier
from modelcache.units import format_bytes, parse_bytes

#: Where a file is looked for when none is named.
DEFAULT_FILE = "modelcache.yaml"
_LOADER_OPTIONS = ("path", "model", "weights", "task", "dtype")
_DECIMAL = re.compile(r"\s*\d+(?:\.\d+)?\s*(?:[KMGT]B)\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Effective:
    """Settings, and where each came from.

    Attributes:
        path: The file; `None` when there was none.
        settings: Frozen, valid.
        origins: Where each key was set, by path; what is missing has its default.
        warnings: What is allowed and probably not meant.
    """

    path: str | None
    settings: Settings
    origins: Mapping[Path, Origin]
    warnings: tuple[Finding, ...] = ()

    @property
    def specs(self) -> tuple[ModelSpec, ...]:
        """The models, in the order of the file; their paths resolved against its folder."""
        folder = FilePath(self.path).parent if self.path is not None else FilePath()
        idle_s = self.settings.policy.idle
        return tuple(
            _spec(name, model, folder, idle_s if ("models", name, "idle") not in self.origins else model.idle)
            for name, model in self.settings.models.items()
        )


def effective(
    path: str | None = None,
    *,
    call: Mapping[str, object] | None = None,
    cli: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Effective:
    """Settings of a file, with the environment, a command line and a call on top, in that order.

    Args:
        path: The file; `None` for the one that ``MODELCACHE_CONFIG`` names, or none.
        call: Values by dotted key, such as ``{"budgets.vram": "20GiB"}``; `None` is not set.
        cli: The same, from a command line.
        environ: In place of the process's environment.

    Raises:
        ConfigError: Every problem, in the order of the file.
    """
    path = path if path is not None else config_variable(environ)
    document = parse(read_file(path), path) if path is not None else Document("")
    return _check(document, path, call or {}, cli or {}, environ)


def settings_of(call: Mapping[str, object], environ: Mapping[str, str] | None = None) -> Settings:
    """Settings of a call without a file; the environment does not change what a program says of itself."""
    return _check(Document(""), None, call, {}, environ if environ is not None else {}).settings


def check_text(text: str, path: str = "modelcache.yaml") -> Effective:
    """Settings of a text, as `effective` of a file that holds it, the environment aside.

    Raises:
        ConfigError: Every problem.
    """
    return _check(parse(text.encode(), path), path, {}, {}, {})


def _check(
    document: Document,
    path: str | None,
    call: Mapping[str, object],
    cli: Mapping[str, object],
    environ: Mapping[str, str] | None,
) -> Effective:
    findings = list(document.findings)
    layers: list[Setting] = []
    for settings, problems in (
        from_environment(environ),
        from_keywords(cli, "cli"),
        from_keywords(call, "call"),
    ):
        layers += settings
        findings += problems
    places = {key: Origin("file", document.path, at.line, at.column) for key, at in document.values.items()}
    origins = {setting.path: setting.origin for setting in [*from_tree(document.tree, places), *layers]}
    places |= {setting.path: setting.origin for setting in layers}
    tree = overlay(document.tree, layers)
    check = _Check(document, places, findings)
    valid = check.validate(tree)
    check.warn_of_decimal_sizes(tree)
    check.cross(tree, path)
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors or valid is None:
        raise ConfigError(tuple(sorted(findings, key=_by_place)))
    return Effective(path, valid, MappingProxyType(origins), tuple(findings))


def _by_place(finding: Finding) -> tuple[bool, int, int]:
    return finding.line is None, finding.line or 0, finding.column or 0


@dataclass(slots=True)
class _Check:
    """What is wrong with a tree, and where."""

    document: Document
    places: Mapping[Path, Origin]
    findings: list[Finding] = field(default_factory=list)

    def validate(self, tree: Mapping[str, Tree]) -> Settings | None:
        try:
            return Settings.model_validate(tree)
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                self._translate(problem)
            return None

    def _translate(self, problem: ErrorDetails) -> None:
        path: Path = tuple(step for step in problem["loc"] if step != "[key]")
        kind = problem["type"]
        if kind == "extra_forbidden":
            self._report(path, _unknown_key(path), at_key=True, key=path[:-1])
        elif kind == "missing":
            self._report(path[:-1], f"needs the key {path[-1]!r}", at_key=True)
        elif kind == "value_error":
            self._report(path, str(problem["ctx"]["error"]), at_key=problem["loc"][-1:] == ("[key]",))
        elif kind in ("model_type", "mapping_type", "dict_type", "model_attributes_type"):
            self._report(path, f"must be a mapping of keys to values, got {show(problem['input'])}")
        elif kind in ("tuple_type", "list_type"):
            self._report(path, f"must be a list, such as [a, b], got {show(problem['input'])}")
        else:
            self._report(path, f"cannot be {show(problem['input'])}")

    def _report(
        self, path: Path, message: str, *, at_key: bool = False, key: Path | None = None, severity: str = "error"
    ) -> None:
        origin = self._origin(path, at_key=at_key)
        self.findings.append(
            Finding(
                origin.path, origin.line, origin.column, spell(path if key is None else key), message, severity=severity
            )
        )

    def _origin(self, path: Path, *, at_key: bool) -> Origin:
        """The place of a value or key, or of what is around it."""
        place: Place | None = self.document.keys.get(path) if at_key else None
        if place is not None:
            return Origin("file", self.document.path, place.line, place.column)
        while path:
            if path in self.places:
                return self.places[path]
            if path in self.document.keys:
                at = self.document.keys[path]
                return Origin("file", self.document.path, at.line, at.column)
            path = path[:-1]
        return Origin("file", self.document.path) if self.document.path else Origin.DEFAULT

    def warn_of_decimal_sizes(self, tree: Mapping[str, Tree]) -> None:
        """``24GB`` is less than the card of that name has."""
        budgets = tree.get("budgets")
        for name in BudgetSettings.model_fields if isinstance(budgets, dict) else ():
            value = budgets.get(name) if isinstance(budgets, dict) else None
            text = value.text if isinstance(value, Scalar) else ""
            if _DECIMAL.fullmatch(text):
                try:
                    size = format_bytes(parse_bytes(text))
                except ValueError:
                    continue
                meant = text.strip()[:-1] + "iB"
                message = f'"{text.strip()}" is {size}; if you mean the binary unit, write "{meant}"'
                self._report(("budgets", name), message, severity="warning")

    # --- across keys ----------------------------------------------------------------------------------------------

    def cross(self, tree: Mapping[str, Tree], path: str | None) -> None:
        """What no key can tell alone. Looks at the words, so that it finds its problems beside others."""
        models = tree.get("models")
        models = models if isinstance(models, dict) else {}
        preload = tree.get("preload")
        for index, name in enumerate(preload if isinstance(preload, list) else ()):
            word = _word(name)
            if word is not None and word not in models:
                hint = did_you_mean(word, models) or "; models are listed in 'models'"
                self._report(("preload", index), f"no model is called {word!r}{hint}")
        folder = FilePath(path).parent if path is not None else FilePath()
        named = tree.get("roots")
        roots = [folder / word for root in (named if isinstance(named, list) else ()) if (word := _word(root))]
        allowed = [each.resolve() for each in (folder, *roots)]
        for called, model in models.items():
            if isinstance(model, dict):
                self._cross_model(("models", called), model, folder, allowed)

    def _cross_model(self, at: Path, model: dict[str, Tree], folder: FilePath, allowed: list[FilePath]) -> None:
        loader = _word(model.get("loader"))
        if loader is not None and (loader in LOADER_KINDS or is_entry(loader)):
            given = [option for option in _LOADER_OPTIONS if option in model]
            for option, message in option_problems(loader, given):
                is_there = option in given
                self._report((*at, option) if is_there else at, message if is_there else f"{option} {message}")
        for option in ("path", "weights"):
            written = _word(model.get(option))
            if written is None:
                continue
            target = (folder / written).resolve()
            if not any(target.is_relative_to(root) for root in allowed):
                message = f"{written!r} leaves the folder of this file; add its folder to 'roots' if this is intended"
                self._report((*at, option), message)


def _word(value: object) -> str | None:
    """The text of a value; `None` where there is none."""
    if isinstance(value, Scalar):
        return None if value.is_empty else value.text
    return value if isinstance(value, str) else None


def _unknown_key(path: Path) -> str:
    """What a key that nobody knows is called, and what it may have been meant to be."""
    word, above = str(path[-1]), path[:-1]
    known = _keys_under(above)
    listed = ", ".join(known)
    return f"unknown key {word!r}{did_you_mean(word, known) or ';'} known keys: {listed}"


def _keys_under(above: Path) -> tuple[str, ...]:
    if not above:
        return tuple(Settings.model_fields)
    if above[0] == "models":
        return tuple(ModelSettings.model_fields)
    return tuple(path[1] for path in settings_paths() if len(path) == 2 and path[0] == above[0])


def missing_files(found: Effective) -> Iterator[Finding]:
    """One finding for each model whose files are not there; looks at names only."""
    folder = FilePath(found.path).parent if found.path is not None else FilePath()
    for name, model in found.settings.models.items():
        for option in ("path", "weights"):
            written = getattr(model, option)
            if written is not None and not (folder / written).exists():
                origin = found.origins.get(("models", name, option), Origin.DEFAULT)
                key = f"models.{name}.{option}"
                message = f"there is no {written!r}; put the files there or correct the path"
                yield Finding(origin.path, origin.line, origin.column, key, message, severity="warning")


def _spec(name: str, model: ModelSettings, folder: FilePath, idle_s: float | None) -> ModelSpec:
    options: dict[str, Any] = {}
    for option in _LOADER_OPTIONS:
        value = getattr(model, option)
        if value is not None:
            options[option] = str(folder / value) if option in ("path", "weights") else value
    loader = (
        LoaderSpec(entry=model.loader)
        if is_entry(model.loader)
        else LoaderSpec(kind=model.loader, options=MappingProxyType(options))
    )
    return ModelSpec(
        name=name,
        loader=loader,
        size_bytes=model.size,
        workspace_bytes=model.workspace or 0,
        pin=Tier(model.pin.value) if model.pin is not None else None,
        priority=model.priority,
        idle_s=idle_s,
        concurrency=model.concurrency,
        reload=model.reload,
        on_write=model.on_write,
    )


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a file, for editors."""
    schema = Settings.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "modelcache configuration"
    return schema
