"""Run our tests of dispatched models with every version of accelerate that is supported.

Each version is installed into a folder that goes away, in front of the installed libraries, which stay as they are.
What a version cannot build is skipped by the tests themselves, with the reason. The end is 1 if anything fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET

from on_top import ROOT, environment, install_on_top, table, version_in, where_and_when, write_report

VERSIONS = ("1.1.*", "1.10.*", "1.14.*", "1.15.*")
_TESTS = (
    "dataplane/test_accelerate_state.py",
    "dataplane/test_materialize*.py",
    "dataplane/test_dispatched.py",
    "test_dispatched_models.py",
)
# Of accelerate 1.1 itself, while it is imported with a newer numpy; warnings are errors in our tests.
_OLD_NUMPY = "ignore:numpy.core is deprecated:DeprecationWarning"


def main() -> int:
    options = _parsed()
    rows: list[tuple[object, ...]] = []
    notes: list[str] = []
    for wanted in options.version or VERSIONS:
        with tempfile.TemporaryDirectory(prefix="accelerate-version-") as work:
            libraries = Path(work) / "libraries"
            install_on_top(libraries, f"accelerate=={wanted}")
            version = version_in(libraries, "accelerate")
            outcomes = _run(libraries, Path(work) / "outcomes.xml")
        counts = Counter(outcome for outcome, _, _ in outcomes)
        rows.append((version, counts["passed"], counts["failed"], counts["skipped"]))
        skips = Counter(why for outcome, _, why in outcomes if outcome == "skipped")
        notes += [f"- skipped {count}: {why}" for why, count in sorted(skips.items())]
        notes += [f"- {version}: {test} failed: {why}" for outcome, test, why in outcomes if outcome == "failed"]
    names = ", ".join(f"tests/{name}" for name in _TESTS)
    parts = [f"{names}; {where_and_when()}.", table(("accelerate", "passed", "failed", "skipped"), rows)]
    report = "\n\n".join([*parts, "\n".join(notes)]).rstrip()
    print(report)
    if options.write:
        write_report(options.write, report)
    return 1 if any(failed for _, _, failed, _ in rows) else 0


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--version",
        action="append",
        help=f"such as 1.14.0 or 1.14.*; may be repeated; default {', '.join(VERSIONS)}",
    )
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="also write the report there")
    return parser.parse_args()


def _run(libraries: Path, outcomes: Path) -> list[tuple[str, str, str]]:
    """Outcome, name and reason of each test."""
    files = [str(path) for name in _TESTS for path in sorted((ROOT / "tests").glob(name))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", _OLD_NUMPY]
    done = subprocess.run(
        [*command, f"--junitxml={outcomes}", *files],
        cwd=ROOT,
        env=environment(libraries, ROOT),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        sys.exit(f"pytest ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    found = []
    for case in ET.parse(outcomes).getroot().iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if bad is None else "skipped" if bad.tag == "skipped" else "failed"
        why = "" if bad is None else str(bad.get("message")).partition("\n")[0]
        found.append((outcome, f"{case.get('classname')}::{case.get('name')}", why))
    return found


if __name__ == "__main__":
    sys.exit(main())
