"""Every Python block of the README runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from modelcache.config import check_text
from modelcache.demo.dispatched import CPU_ERROR, TO_ERROR
from modelcache.errors import (
    LeaseCycleError,
    LeaseTimeoutError,
    ModelCacheError,
    ModelNotResidentError,
    ModelTooLargeError,
)

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
YAML = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", range(len(PYTHON)))
@pytest.mark.filterwarnings("default")
def test_a_block_of_the_readme_runs_as_printed(block: int, capsys) -> None:
    exec(compile(PYTHON[block], f"README.md block {block}", "exec"), {"__name__": "readme"})


def test_the_readme_has_its_blocks() -> None:
    assert len(PYTHON) >= 3
    assert "Cannot copy out of meta tensor" in README


@pytest.mark.parametrize(
    "error",
    [
        ModelTooLargeError("x", "vram", 30 << 30, 24 << 30),
        LeaseTimeoutError("x", 30.0, "...", ("...",)),
        LeaseCycleError("b", ("...",)),
        ModelNotResidentError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_readme_shows_an_error_in_the_words_it_comes_in(error: ModelCacheError) -> None:
    shown = re.findall(r"^\| `(.+?)` \|", README, re.MULTILINE)
    assert any(str(error).startswith(text.removesuffix("...")) for text in shown)


def test_the_readme_answers_the_errors_of_accelerate() -> None:
    assert TO_ERROR in README
    assert CPU_ERROR in README


@pytest.mark.parametrize("text", YAML)
def test_a_configuration_of_the_readme_is_valid(text: str) -> None:
    assert check_text(text).settings.models
    assert yaml.safe_load(text)
