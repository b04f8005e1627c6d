"""From a file, the environment, a command line and a call to settings, with the place of every problem.

Nothing is imported or executed by checking. All problems are found in one pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from modelcache.config.ab_settings import AbSettings, CompareSettings, ExperimentSettings, ScoreSettings, SliceSettings
from modelcache.config.crossing import LOADER_OPTIONS, PATH_OPTIONS, Crossing
from modelcache.config.document import MOST_FINDINGS, Document, Path, Place, Tree, parse, read_file, spell
from modelcache.config.fields import Section
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
from modelcache.config.schema import ModelSettings, Settings
from modelcache.config.values import show, spell_value
from modelcache.errors import ConfigError, Finding, WeightsError
from modelcache.headers import model_files, weight_places
from modelcache.spec import LoaderSpec, ModelSpec, did_you_mean, is_entry
from modelcache.tier import Tier

#: Where a file is looked for when none is named.
DEFAULT_FILE = "modelcache.yaml"
#: Keys that ask for code from elsewhere to be run; only a program may, never a file.
_CODE_KEYS = frozenset({"trust_remote_code", "allow_pickle", "custom_pipeline"})


@dataclass(frozen=True, slots=True)
class Row:
    """One value that holds.

    Attributes:
        key: Such as ``budgets.vram``.
        text: The value as a file would say it; `None` where nothing is set.
        origin: Where it was set: a file and line, a variable, ``cli``, ``call`` or ``default``.
    """

    key: str
    text: str | None
    origin: str


@dataclass(frozen=True, slots=True)
class Effective:
    """Settings, and where each came from.

    Attributes:
        path: The file; `None` when there was none.
        settings: Frozen, valid.
        origins: Where each key was set, by path; what is missing has its default.
        warnings: What is allowed and probably not meant.
        folder: Where relative paths begin; absolute, so that a later `chdir` changes nothing.
    """

    path: str | None
    settings: Settings
    origins: Mapping[Path, Origin]
    warnings: tuple[Finding, ...] = ()
    folder: str = "."

    @property
    def specs(self) -> tuple[ModelSpec, ...]:
        """The models, in the order of the file; their paths resolved against its folder."""
        folder = FilePath(self.folder)
        idle_s = self.settings.policy.idle
        return tuple(
            _spec(name, model, folder, idle_s if ("models", name, "idle") not in self.origins else model.idle)
            for name, model in self.settings.models.items()
        )

    def rows(self) -> Iterator[Row]:
        """Every value that holds, with where it comes from."""
        waiting: list[tuple[Path, object]] = [((), self.settings)]
        while waiting:
            path, value = waiting.pop()
            if isinstance(value, Section):
                waiting += reversed([((*path, name), getattr(value, name)) for name in type(value).model_fields])
            elif isinstance(value, Mapping):
                waiting += reversed([((*path, name), inner) for name, inner in value.items()])
            else:
                origin = self.origins.get(path, Origin.DEFAULT)
                # A model that does not say when it is idle follows `policy.idle`.
                is_inherited = path[-1] == "idle" and path[0] == "models" and origin is Origin.DEFAULT
                yield Row(spell(path), None if is_inherited else spell_value(path, value), str(origin))


def _folder(path: str | None) -> str:
    """The folder of a file, or the current one, as an absolute path."""
    return os.path.dirname(os.path.abspath(path)) if path is not None else os.path.abspath(os.curdir)  # noqa: PTH100, PTH120 - no link is followed


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
    """Settings of a call without a file: what it does not give is the environment's, or else the default."""
    return _check(Document(""), None, call, {}, environ).settings


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
    tree = overlay(document.tree, layers)
    if layers:
        # What lies on top may hide a problem of the file, and is not everywhere.
        _Check(document, places, findings).validate(document.tree)
    check = _Check(document, places | {setting.path: setting.origin for setting in layers}, findings)
    valid = check.validate(tree)
    Crossing(tree, _folder(path), check.report).look()
    if valid is None or any(finding.severity == "error" for finding in findings):
        raise ConfigError(_in_order(findings))
    resolved = _resolved(valid, path, origins)
    return Effective(path, resolved, MappingProxyType(origins), _in_order(findings), _folder(path))


def _in_order(findings: list[Finding]) -> tuple[Finding, ...]:
    """By place, each once, and no more of them than a person reads."""
    ordered = sorted(dict.fromkeys(findings), key=lambda each: (each.line is None, each.line or 0, each.column or 0))
    if len(ordered) > MOST_FINDINGS:
        rest = Finding(ordered[0].path, None, None, "", f"{len(ordered) - MOST_FINDINGS} more problems follow")
        ordered = [*ordered[:MOST_FINDINGS], rest]
    return tuple(ordered)


def _resolved(settings: Settings, path: str | None, origins: Mapping[Path, Origin]) -> Settings:
    """The folder for image files as an absolute path: one of a file begins at that file."""
    if settings.image_dir is None:
        return settings
    in_file = origins[("image_dir",)].kind == "file"
    folder = _folder(path if in_file else None)
    return settings.model_copy(update={"image_dir": os.path.normpath(FilePath(folder) / settings.image_dir)})


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
            self.report(path, _unknown_key(path), at_key=True, key=path[:-1])
        elif kind == "missing":
            self.report(path[:-1], f"needs the key {path[-1]!r}", at_key=True)
        elif kind == "value_error":
            self.report(path, str(problem["ctx"]["error"]), at_key=problem["loc"][-1:] == ("[key]",))
        elif kind in ("model_type", "mapping_type", "dict_type", "model_attributes_type"):
            self.report(path, f"must be a mapping of keys to values, got {show(problem['input'])}")
        elif kind in ("tuple_type", "list_type"):
            self.report(path, f"must be a list, such as [a, b], got {show(problem['input'])}")
        else:
            self.report(path, f"cannot be {show(problem['input'])}")

    def report(
        self, path: Path, message: str, *, at_key: bool = False, key: Path | None = None, severity: str = "error"
    ) -> None:
        """Note one problem, at a key or at its value; `key` is what is named instead of the path."""
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


def _unknown_key(path: Path) -> str:
    """What a key that nobody knows is called, and what it may have been meant to be."""
    word, above = str(path[-1]), path[:-1]
    known = _keys_under(above)
    listed = ", ".join(known)
    if word in _CODE_KEYS:
        return f"{word!r} cannot be set in a file; if you trust its author, load this model in a function of your own"
    shown = word if len(word) <= 80 else word[:77] + "..."
    return f"unknown key {shown!r}{did_you_mean(word, known) or ';'} known keys: {listed}"


def _keys_under(above: Path) -> tuple[str, ...]:
    if not above:
        return tuple(Settings.model_fields)
    if above[0] == "models":
        return tuple(ModelSettings.model_fields)
    if above[0] == "ab":
        return tuple(_ab_section(above).model_fields)
    return tuple(path[1] for path in settings_paths() if len(path) == 2 and path[0] == above[0])


def _ab_section(above: Path) -> type[Section]:
    match above:
        case ("ab", "compare", "scores", _):
            return ScoreSettings
        case ("ab", "compare"):
            return CompareSettings
        case ("ab", "experiments", _, "layer"):
            return SliceSettings
        case ("ab", "experiments", _):
            return ExperimentSettings
        case _:
            return AbSettings


def missing_files(found: Effective) -> Iterator[Finding]:
    """One finding for each model whose files are not there; looks at names only."""
    folder = FilePath(found.folder)
    for name, model in found.settings.models.items():
        for option in PATH_OPTIONS:
            written = getattr(model, option)
            problem = None if written is None else _what_is_missing(folder / written, written)
            if problem is not None:
                origin = found.origins.get(("models", name, option), Origin.DEFAULT)
                key = f"models.{name}.{option}"
                yield Finding(origin.path, origin.line, origin.column, key, problem, severity="warning")


def _what_is_missing(place: FilePath, written: str) -> str | None:
    try:
        if not place.exists():
            return f"there is no {written!r}; put the files there or correct the path"
        for part in weight_places(place):
            model_files(part)
    except WeightsError as error:
        return f"{written!r}: {error.problem}"
    except OSError as error:
        return f"{written!r} cannot be looked at: {error.strerror}"
    return None


def _spec(name: str, model: ModelSettings, folder: FilePath, idle_s: float | None) -> ModelSpec:
    options: dict[str, Any] = {}
    for option in LOADER_OPTIONS:
        value = getattr(model, option)
        if value is not None:
            options[option] = str(folder / value) if option in PATH_OPTIONS else value
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
    # The names are a pattern; what does not match it is an error and not another kind of key.
    schema["properties"]["models"]["additionalProperties"] = False
    return schema
