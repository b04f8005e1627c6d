"""What the README says of errors is what they say."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

from modelcache.demo.dispatched import CPU_ERROR, TO_ERROR
from modelcache.errors import (
    LeaseCycleError,
    LeaseTimeoutError,
    ModelCacheError,
    ModelNotResidentError,
    ModelTooLargeError,
)

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_quick_start_takes_five_statements() -> None:
    first = runpy.run_path(str(ROOT / "tools" / "quick_start.py"))["first_block"](README)
    statements = [each for each in ast.parse(first).body if not isinstance(each, ast.Import | ast.ImportFrom)]
    assert len(statements) == 5


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
