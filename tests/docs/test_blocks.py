"""Every block of code that a person meets runs as printed, in the order of its page; what cannot run here is marked text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modelcache import ModelCache
from modelcache.config import check_text

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "SECURITY.md", "benchmarks/README.md"]
PAGES += [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "sh", "yaml", "text")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {page: FENCED.findall((ROOT / page).read_text(encoding="utf-8")) for page in PAGES}
RUN = [page for page in PAGES if any(language in ("python", "sh") for language, _ in BLOCKS[page])]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_its_language(page: str) -> None:
    assert all(language in LANGUAGES for language, _ in BLOCKS[page])
    prose = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    assert "```" not in prose
    assert not re.search(r"^\n    \S", prose, re.MULTILINE), "a block without fences"


@pytest.mark.parametrize("page", PAGES)
def test_a_block_of_configuration_is_valid(page: str) -> None:
    for language, text in BLOCKS[page]:
        if language == "yaml":
            assert check_text(text).settings.models


def test_the_readme_has_blocks_of_each_kind() -> None:
    assert {language for language, _ in BLOCKS["README.md"]} == set(LANGUAGES)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("page", RUN)
@pytest.mark.filterwarnings("default")
def test_the_blocks_of_a_page_run_as_printed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("configs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    for number, (language, text) in enumerate(BLOCKS[page]):
        place = f"{page}, block {number}"
        if language == "python":
            names: dict[str, object] = {"__name__": "page"}
            exec(compile(text, place, "exec"), names)
            if isinstance(cache := names.get("cache"), ModelCache):  # a program's end closes it
                cache.close()
        elif language == "sh":
            done = subprocess.run(["bash", "-ec", text], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{place} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            assert "Traceback" not in done.stderr, place
