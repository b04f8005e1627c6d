"""The seeded bugs themselves: each says what it breaks and who must notice, and still applies to the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location("mutants", ROOT / "tools" / "mutants.py")
mutants = importlib.util.module_from_spec(_SPEC)
sys.modules["mutants"] = mutants
_SPEC.loader.exec_module(mutants)

PATCHES = sorted(mutants.MUTANTS.glob("*.patch"))


def test_a_patch_that_names_no_test_is_refused(tmp_path):
    path = tmp_path / "nobody.patch"
    path.write_text("# breaks: something\n--- a/modelcache/tier.py\n+++ b/modelcache/tier.py\n")
    with pytest.raises(ValueError, match="at least one '# killed by:'"):
        mutants.Mutant.read(path)


def test_a_patch_that_does_not_apply_says_so(tmp_path):
    path = tmp_path / "stale.patch"
    path.write_text(
        "# breaks: something\n# killed by: tests/test_units.py\n"
        "--- a/modelcache/tier.py\n+++ b/modelcache/tier.py\n@@ -1,1 +1,1 @@\n-no such line\n+another\n"
    )
    assert "patch" in mutants.Mutant.read(path).plant(tmp_path)


def test_there_are_enough_of_them():
    assert len(PATCHES) >= 40


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_every_seeded_bug_applies_and_names_tests_that_exist(path, tmp_path):
    mutant = mutants.Mutant.read(path)
    assert mutant.plant(tmp_path) == ""
    for test in mutant.tests:
        file, *names = test.split("[")[0].split("::")
        assert (ROOT / file).is_file(), test
        text = (ROOT / file).read_text()
        assert all(name in text or name == "runTest" for name in names), test
