"""The pages of docs/ say what is: made pages are fresh, the table of errors is whole."""

from __future__ import annotations

import builtins
import re
import runpy
from pathlib import Path

import modelcache
import modelcache.ab
import modelcache.errors
import modelcache.testing
from modelcache.cli.output import Exit

ROOT = Path(__file__).parents[2]
PAGES = {page.relative_to(ROOT): page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md"))}
LINKS = re.compile(r"\]\((?!https?:)([^)#]+)\)")


def test_the_page_of_configuration_is_the_one_the_settings_make() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "write_configuration_page.py"))
    assert PAGES[Path("docs/configuration.md")] == made["page"](), "run tools/write_configuration_page.py"


def test_the_page_of_the_api_is_the_one_the_docstrings_make() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "write_api_page.py"))
    assert PAGES[Path("docs/api.md")] == made["page"](), "run tools/write_api_page.py"


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    listed = runpy.run_path(str(ROOT / "tools" / "write_api_page.py"))["listed"]()
    assert listed["modelcache.ab"] == set(modelcache.ab.__all__)
    assert listed["modelcache.testing"] == set(modelcache.testing.__all__)
    rest = set(modelcache.__all__) - listed["modelcache"]
    assert all(name.endswith("Error") for name in rest - {"__version__"})


def test_every_error_is_described_with_the_builtin_it_also_is() -> None:
    text = PAGES[Path("docs/errors.md")]
    rows = dict(re.findall(r"^\| `(\w+Error)` \| `(\w+)` \|", text, re.MULTILINE))
    bases = {"ModelCacheError", "CapacityError", "LeaseError"}
    assert set(rows) == {name for name in modelcache.__all__ if name.endswith("Error")} - bases
    for name, builtin in rows.items():
        assert issubclass(getattr(modelcache, name), getattr(builtins, builtin)), name


def test_the_tree_of_errors_is_the_one_that_ships() -> None:
    shown = re.findall(r"^[ │├└─]*(\w+Error)$", PAGES[Path("docs/errors.md")], re.MULTILINE)
    documented = re.findall(r"^[ │├└─]*(\w+Error)\b", modelcache.errors.__doc__ or "", re.MULTILINE)
    assert shown == documented


def test_every_exit_code_is_described() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGES[Path("docs/errors.md")], re.MULTILINE)}
    assert codes == {int(code) for code in Exit}


def test_every_link_between_files_leads_somewhere() -> None:
    for page, text in {**PAGES, Path("README.md"): (ROOT / "README.md").read_text(encoding="utf-8")}.items():
        for target in LINKS.findall(text):
            assert (ROOT / page.parent / target).exists(), f"{page} links to {target}"
