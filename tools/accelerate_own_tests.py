"""Run accelerate's own tests with every dispatched model made whole, moved and restored before each test goes on.

The tests come from accelerate's source distribution, into a folder that goes away. They run twice: as they are, and
with `round_trip_plugin.py`. The end is 1 if a test then fails or is skipped that otherwise is not, or if anything
went wrong on a round trip.

Without an accelerator most of the tests skip themselves, so all of it is done three times: as it is; with device 0
called the CPU (`fake`); and with two simulated devices (`simulated`), see `accelerator_plugin.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree as ET

from on_top import ROOT, download_source, environment, install_on_top, table, version_in, where_and_when, write_report

FILES = ("test_big_modeling.py", "test_hooks.py", "test_modeling_utils.py")
ACCELERATORS = ("none", "fake", "simulated")
_WORST_FIRST = ("failed", "passed", "skipped")
_HEADER = ("accelerator", "run", "passed", "failed", "skipped", "round trips", "tensors made real", "bytes")


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the tests.

    Attributes:
        outcomes: By test: passed, failed or skipped.
        why: By test: what a failure or skip says.
        trips: What the plugin reports of each round trip.
    """

    outcomes: Mapping[str, str]
    why: Mapping[str, str]
    trips: list[dict[str, object]]

    def count(self, outcome: str) -> int:
        return Counter(self.outcomes.values())[outcome]

    def sum(self, key: str) -> int:
        return sum(int(str(trip[key])) for trip in self.trips)

    def cells(self) -> tuple[object, ...]:
        counts = (self.count("passed"), self.count("failed"), self.count("skipped"))
        if not self.trips:
            return (*counts, "-", "-", "-")
        return (*counts, len(self.trips), f"{self.sum('num_tensors'):,}", f"{self.sum('num_bytes'):,}")


def main() -> int:
    options = _parsed()
    with tempfile.TemporaryDirectory(prefix="accelerate-tests-") as work:
        folder = Path(work)
        libraries, version = _libraries(folder, options.accelerate)
        tests = _unpacked(options.sdist or download_source(folder / "sdist", f"accelerate=={version}"), folder)
        pairs = {
            accelerator: tuple(
                _run(tests, libraries, accelerator, folder / f"{accelerator}-{name}", with_trips=name == "trips")
                for name in ("plain", "trips")
            )
            for accelerator in options.accelerator or ACCELERATORS
        }
    worse = [f"{accelerator}: {line}" for accelerator, pair in pairs.items() for line in _worse(*pair)]
    report = _report(version, pairs, worse)
    print(report)
    if options.write:
        write_report(options.write, report)
    return 1 if worse else 0


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--accelerator",
        choices=ACCELERATORS,
        action="append",
        help="only this stand-in for an accelerator; may be repeated; default all three",
    )
    parser.add_argument("--accelerate", metavar="VERSION", help="this version instead of the installed one")
    parser.add_argument("--sdist", type=Path, help="its source distribution, instead of downloading it")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="also write the report there")
    return parser.parse_args()


def _libraries(folder: Path, wanted: str | None) -> tuple[Path, str]:
    """What the tests need beyond what is installed, and the version of accelerate that they will find."""
    libraries = folder / "libraries"
    install_on_top(libraries, "parameterized", *([f"accelerate=={wanted}"] if wanted else []))
    return libraries, version_in(libraries, "accelerate") if wanted else metadata.version("accelerate")


def _unpacked(source: Path, folder: Path) -> Path:
    with tarfile.open(source) as archive:
        members = [member for member in archive.getmembers() if "/tests/" in member.name]
        archive.extractall(folder, members, filter="data")
    found = [tests for tests in folder.glob("*/tests") if all((tests / name).is_file() for name in FILES)]
    if not found:
        sys.exit(f"{source.name} does not contain {', '.join(FILES)} in tests/")
    (found[0] / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    return found[0]


def _run(tests: Path, libraries: Path, accelerator: str, out: Path, *, with_trips: bool) -> Run:
    out.mkdir()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out / 'outcomes.xml'}"]
    if accelerator != "none":
        command += ["-p", "accelerator_plugin", "--accelerator", accelerator]
    trips = out / "trips.jsonl"
    if with_trips:
        command += ["-p", "round_trip_plugin", "--round-trips", str(trips)]
    done = subprocess.run(
        [*command, *FILES],
        cwd=tests,
        env=environment(libraries, ROOT / "tools", ROOT),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        sys.exit(f"pytest ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    lines = trips.read_text(encoding="utf-8").splitlines() if with_trips else []
    return _read(out / "outcomes.xml", [json.loads(line) for line in lines])


def _read(path: Path, trips: list[dict[str, object]]) -> Run:
    outcomes: dict[str, str] = {}
    why: dict[str, str] = {}
    for case in ET.parse(path).getroot().iter("testcase"):
        test = f"{str(case.get('classname')).rpartition('.')[2]}::{case.get('name')}"
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                why[test] = str(child.get("message")).partition("\n")[0]
        # A test with subtests is reported several times.
        outcomes[test] = min(outcome, outcomes.get(test, outcome), key=_WORST_FIRST.index)
    return Run(outcomes, why, trips)


def _worse(plain: Run, tripped: Run) -> list[str]:
    lines = [
        f"{test} {outcome}, and {tripped.outcomes.get(test, 'missing')} with round trips: {tripped.why.get(test, '')}"
        for test, outcome in plain.outcomes.items()
        if outcome == "passed" and tripped.outcomes.get(test) != "passed"
    ]
    lines += [f"{trip['test']} {trip['function']}: {trip['problem']}" for trip in tripped.trips if trip["problem"]]
    return lines if tripped.trips else [*lines, "no round trip was made"]


def _report(version: str, pairs: Mapping[str, tuple[Run, ...]], worse: list[str]) -> str:
    rows = [
        (accelerator, name, *run.cells())
        for accelerator, pair in pairs.items()
        for name, run in zip(("as it is", "with round trips"), pair, strict=True)
    ]
    failed = [
        f"- {accelerator}: {test}: {run.why[test]}"
        for accelerator, (run, _) in pairs.items()
        for test, outcome in run.outcomes.items()
        if outcome == "failed"
    ]
    verdict = ["Worse with round trips:", "", *(f"- {line}" for line in worse)] if worse else ["Nothing is worse."]
    parts = [
        f"accelerate {version}: {', '.join(f'tests/{name}' for name in FILES)}; {where_and_when()}.",
        table(_HEADER, rows),
        "\n".join(verdict),
        "\n".join(["Fails as it is, without us:", "", *failed]) if failed else "",
        _skips({accelerator: tripped for accelerator, (_, tripped) in pairs.items()}),
    ]
    return "\n\n".join(part for part in parts if part)


def _skips(runs: Mapping[str, Run]) -> str:
    """Why tests were skipped, in accelerate's words, and which were skipped everywhere."""
    counts = {
        accelerator: Counter(run.why[test] for test, outcome in run.outcomes.items() if outcome == "skipped")
        for accelerator, run in runs.items()
    }
    rows: list[tuple[object, ...]] = [
        (reason, *(count[reason] for count in counts.values()))
        for reason in sorted({reason for count in counts.values() for reason in count})
    ]
    last = list(runs.values())[-1]
    nowhere = [
        f"- {test}: {last.why[test]}"
        for test in sorted(last.outcomes)
        if all(run.outcomes.get(test) == "skipped" for run in runs.values())
    ]
    return "\n\n".join([table(("skipped because", *runs), rows), "Skipped in every run:", "\n".join(nowhere)])


if __name__ == "__main__":
    sys.exit(main())
