"""Write docs/configuration.md from the settings themselves: `python tools/write_configuration_page.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from modelcache.config.ab_settings import CompareSettings, ExperimentSettings, ScoreSettings, SliceSettings
from modelcache.config.fields import Section
from modelcache.config.layers import settings_paths, variable
from modelcache.config.schema import (
    BudgetSettings,
    ModelSettings,
    PolicySettings,
    Settings,
    SimulatedSettings,
)

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
_SECTIONS: tuple[tuple[str, type[Section]], ...] = (
    ("budgets", BudgetSettings),
    ("policy", PolicySettings),
    ("simulated", SimulatedSettings),
)
_AB: tuple[tuple[str, type[Section]], ...] = (
    ("`ab.compare` is what `modelcache ab run` compares.", CompareSettings),
    ("Under `ab.compare.scores`, each name has these keys.", ScoreSettings),
    ("Under `ab.experiments`, each name has these keys.", ExperimentSettings),
    ("Its `layer` has these.", SliceSettings),
)
_INTRODUCTION = """\
# Configuration

Every key of a configuration file, made from the settings by `tools/write_configuration_page.py`. Those of `budgets`
and `policy` and most of the top level are also arguments of `ModelCache(...)`, without the section (`policy.evict` is
`policy=`); those of a model are arguments of `register(...)`.

- **Sizes** are text with a unit: `"20GiB"` is 1024-based, `"20GB"` is 1000-based. In Python, a plain `int` is bytes.
- **Shares** such as `"80%"` are of the total of the device (or of the machine or container, whichever is smaller)
  less what others hold, resolved once at start and logged.
- **Durations** are `"90s"`, `"10m"`, `"1m30s"` or `"never"`. In Python, a number is seconds.
- **Who wins**: an argument of a call, then an option of the command line, then the environment, then the file, then
  the default. `modelcache config show FILE` lists every value with where it comes from.
- **Paths** are relative to the file. Models are read from the folder of the file and from `roots`, nowhere else.
- Unknown or duplicate keys, wrong types and values that contradict each other are errors with file, line and column,
  all of them at once. `modelcache config check FILE` imports and loads nothing; it ends with 2 when the file cannot
  be used.

What `policy.pressure: watch` does is on a [page of its own](pressure.md); so is what lies in `image_dir`, what of it is
kept for the next start, and [how to clear it](image_files.md).

`configs/workstation_24gb.yaml` shows every key in use. An editor checks files as you type with
`configs/modelcache.schema.json`, or `modelcache config schema`. `MODELCACHE_CONFIG` names the file for commands that
are given none.
"""


def page() -> str:
    """The whole page."""
    by_variable = {path: variable(path) for path in settings_paths()}
    sections = {name for name, _ in _SECTIONS} | {"models", "ab"}
    top = [
        (name, str(field.description), by_variable.get((name,), ""))
        for name, field in Settings.model_fields.items()
        if name not in sections
    ]
    parts = [_INTRODUCTION, "## Top level\n", _table(top, has_variables=True)]
    for name, section in _SECTIONS:
        rows = [
            (f"{name}.{key}", str(field.description), by_variable.get((name, key), ""))
            for key, field in section.model_fields.items()
        ]
        parts += [f"## {name}\n", f"{Settings.model_fields[name].description}\n", _table(rows, has_variables=True)]
    rows = [(key, str(field.description), "") for key, field in ModelSettings.model_fields.items()]
    parts += ["## models\n", "Under `models`, each name has these keys.\n", _table(rows, has_variables=False)]
    parts.append("## ab\n")
    for words, section in _AB:
        rows = [(key, str(field.description), "") for key, field in section.model_fields.items()]
        parts += [f"{words}\n", _table(rows, has_variables=False)]
    return "\n".join(parts)


def _table(rows: Iterable[tuple[str, str, str]], *, has_variables: bool) -> str:
    lines = (
        ["| Key | Meaning | Environment |", "|---|---|---|"] if has_variables else ["| Key | Meaning |", "|---|---|"]
    )
    for key, meaning, environment in rows:
        cells = [f"`{key}`", meaning.replace("|", "\\|")]
        if has_variables:
            cells.append(f"`{environment}`" if environment else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
