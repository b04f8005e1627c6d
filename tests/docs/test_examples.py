"""Every example runs, in a process of its own, and says what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "01_get.py": "first is parked",
    "02_safetensors.py": "same answer after eviction: True",
    "03_asyncio.py": "20 answers",
    "04_dispatched.py": "it runs from the dispatch it came with",
    "05_from_yaml.py": "did you mean 'policy'?",
    "06_test_your_app.py": "once the memory is back",
}


def test_every_example_is_run() -> None:
    assert set(SAYS) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", SAYS)
def test_an_example_says_what_it_promises(name: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
