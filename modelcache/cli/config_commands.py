"""``modelcache config``: write a file, check one, show what holds and why, print the schema. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from modelcache import ConfigError, Effective, config_schema, format_bytes, format_seconds, load_config, missing_files
from modelcache.cli.output import (
    Exit,
    complain,
    complain_about,
    data_console,
    finding_json,
    finding_line,
    note,
    table,
    write_json,
    write_text,
)

DEFAULT_FILE = Path("modelcache.yaml")
_WHICH = "The file. Default: the one that MODELCACHE_CONFIG names, else modelcache.yaml."
_TEMPLATE = """\
# yaml-language-server: $schema=./modelcache.schema.json
# What modelcache keeps where. Check it with: modelcache config check
# Sizes are text with a unit: "20GiB" (1024-based) or "20GB" (1000-based). Durations: "90s", "10m", "never".
version: 1

device: auto              # cuda:0 if there is one, else host_only; or cuda:N, simulated

budgets:
  vram: auto              # 80% of the device, less what others hold
  ram: auto               # 50% of the machine or container
  # disk: 100GiB          # image files, for models whose loader cannot be called again

policy:
  evict: lru
  # idle: 10m             # park a model after this long without use

# preload: [embed]

models: {}                # remove the {} and list yours, such as:
  # embed:
  #   loader: sentence-transformers
  #   path: models/minilm
  #   pin: vram
  # qwen:
  #   loader: transformers
  #   path: models/qwen
  #   dtype: bfloat16
  #   workspace: 3GiB
  # mine:
  #   loader: my_models:load
"""

# How the plain numbers of some keys are shown to people; JSON has the numbers.
_SPELLINGS: dict[str, Callable[[Any], str]] = {
    "segment": format_bytes,
    "capacity": format_bytes,
    "size": format_bytes,
    "workspace": format_bytes,
    "link": lambda rate: f"{rate / 1e9:g} GB/s",
    "idle": format_seconds,
}

app = typer.Typer(name="config", help="Write, check and show configuration files.", no_args_is_help=True)


def load(file: Path | None, over: Mapping[str, object] | None = None) -> Effective:
    """The settings of a file: the one named, else the one the environment names, else ``modelcache.yaml`` here.

    Args:
        file: As named on the command line.
        over: Values of the command line, by dotted key.

    Raises:
        ConfigError: There is none, or it has problems.
    """
    if file is None:
        found = load_config(None, cli=over)
        if found.path is not None:
            return found
    return load_config(str(file or DEFAULT_FILE), cli=over)


@app.command(epilog="Examples:\n\nmodelcache config init\n\nmodelcache config init conf/models.yaml --force")
def init(
    file: Annotated[Path, typer.Argument(help="The file to write.", metavar="FILE")] = DEFAULT_FILE,
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented file to start from."""
    if file.exists() and not force:
        complain(f"{file} is there already; choose another name, or replace it with --force")
        raise typer.Exit(Exit.USAGE)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_TEMPLATE, encoding="utf-8")
    except OSError as error:
        complain(f"{file} cannot be written: {error.strerror}")
        raise typer.Exit(Exit.FAILED) from error
    write_text(str(file))
    note(f"next: modelcache config check {file}")


@app.command(epilog="Examples:\n\nmodelcache config check\n\nmodelcache config check conf/models.yaml --json")
def check(
    file: Annotated[Path | None, typer.Argument(help=_WHICH, metavar="FILE")] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Write the findings as JSON.")] = False,
) -> None:
    """Check a file: every problem with its place, in one pass. Nothing is imported or loaded."""
    try:
        found = load(file)
        findings, path, is_valid = (*found.warnings, *missing_files(found)), found.path, True
    except ConfigError as error:
        findings, path, is_valid = error.findings, error.path, False
    if as_json:
        write_json({"file": path, "valid": is_valid, "findings": [finding_json(each) for each in findings]})
    else:
        for finding in findings:
            write_text(finding_line(finding))
        num_errors = sum(finding.severity == "error" for finding in findings)
        note(f"{path}: ok" if is_valid else f"{path}: problems found: {num_errors}")
    raise typer.Exit(Exit.OK if is_valid else Exit.USAGE)


@app.command(
    epilog="Examples:\n\nmodelcache config show\n\nMODELCACHE_BUDGETS__VRAM=20GiB modelcache config show --json"
)
def show(
    file: Annotated[Path | None, typer.Argument(help=_WHICH, metavar="FILE")] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Write the values as JSON.")] = False,
) -> None:
    """Show every value that holds, and where it comes from: the environment, the file, or the default."""
    has_file = file is not None or DEFAULT_FILE.exists()
    found = load(file) if has_file else load_config(None)
    rows = _rows(found)
    if as_json:
        write_json({row.key: {"value": row.value, "origin": row.origin} for row in rows})
    else:
        data_console().print(table(("Key", "Value", "From"), ((row.key, row.shown, row.origin) for row in rows)))
    complain_about(found.warnings)


@app.command(epilog="Examples:\n\nmodelcache config schema > modelcache.schema.json")
def schema() -> None:
    """Print the JSON Schema of the file, for editors."""
    write_json(config_schema())


@dataclass(frozen=True, slots=True)
class _Row:
    key: str
    value: Any
    origin: str

    @property
    def shown(self) -> str:
        """The value as a person would write it."""
        name = self.key.rpartition(".")[2]
        if isinstance(self.value, bool):
            return str(self.value).lower()
        if isinstance(self.value, list):
            return ", ".join(map(str, self.value)) or "-"
        if self.value is None:
            return "never" if self.key == "policy.idle" else "-"
        return _SPELLINGS[name](self.value) if name in _SPELLINGS else str(self.value)


def _rows(found: Effective) -> list[_Row]:
    rows: list[_Row] = []

    def walk(value: Any, path: tuple[str, ...]) -> None:
        fields = getattr(type(value), "model_fields", None)
        if fields is not None:
            for name in fields:
                walk(getattr(value, name), (*path, name))
        elif hasattr(value, "items"):
            for name, inner in value.items():
                walk(inner, (*path, name))
        else:
            origin = found.origins.get(path)
            rows.append(_Row(".".join(path), _plain(value), "default" if origin is None else str(origin)))

    walk(found.settings, ())
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if is_dataclass(value) else value
