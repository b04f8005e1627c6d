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
    "07_compare.py": "wide (again) and wide cannot be told apart",
    "08_split_traffic.py": "the split is as planned",
    "09_language_model.py": "comes back without the disk: True",
    "10_never_evicted.py": "embed is still ready",
    "11_asyncio_server.py": "three 2 -> 6.0",
    "12_digits_pair.py": "rounded is worse than trained",
}


def test_every_example_is_run() -> None:
    assert set(SAYS) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", SAYS)
def test_an_example_says_what_it_promises(name: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout


@pytest.mark.timeout(120)
def test_the_comparison_of_the_configuration_is_run_from_the_command_line(tmp_path: Path) -> None:
    words = ["ab", "run", "configs/ab_compare.yaml", "--html", str(tmp_path / "ab.html")]
    done = subprocess.run(
        [sys.executable, "-m", "modelcache", *words], capture_output=True, text=True, check=False, cwd=EXAMPLES.parent
    )
    assert done.returncode == 0, done.stderr
    assert "five-layers" in done.stdout
    assert "0 disk loads after warm-up" in done.stdout
    assert (tmp_path / "ab.html").stat().st_size < 2_000_000
