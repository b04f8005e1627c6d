"""Fuzz everything that reads what somebody else wrote: the targets of tests/fuzz/targets.py.

    tools/fuzz.py --seconds 20              every target for 20 seconds, two at a time
    tools/fuzz.py --target header           one of them

Each target runs in a process of its own, with atheris where it is installed (the extra `fuzz`), which keeps what
reaches new code; else with a plain loop of seeded mutations, which knows nothing of coverage. An input that fails is
kept in tests/fuzz/cases/<target>/, where `make test` tries it again for ever.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fuzz.targets import Target

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "tests" / "fuzz" / "cases"
#: An input that takes longer than this hangs.
HANG_S = 10
LARGEST_BYTES = 8192


@dataclass(frozen=True)
class Outcome:
    """What came of fuzzing one target."""

    target: str
    engine: str
    executions: int
    seconds: float
    edges: int | None
    failed: tuple[Path, ...]
    output: str


def has_atheris() -> bool:
    """Whether the fuzzer that sees coverage is there."""
    return importlib.util.find_spec("atheris") is not None


def _targets() -> dict[str, Target]:
    # Not from here, where this file would be taken for the folder of the same name.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(ROOT), str(ROOT / "tests"), *(each for each in sys.path if Path(each).resolve() != here)]
    from fuzz.targets import TARGETS

    return TARGETS


def seeds_of(name: str, target: Target) -> list[bytes]:
    """Where to start: the seeds, and everything that once failed."""
    kept = sorted((CASES / name).glob("*")) if (CASES / name).is_dir() else []
    return [*target.seeds, *(path.read_bytes() for path in kept)]


# ----------------------------------------------------------------------------------------------- in the worker


def with_atheris(name: str, seconds: float, artifacts: Path, seed: int) -> None:
    """Never returns: the fuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["modelcache", "yaml"]):
        target = _targets()[name]
        target.run(target.seeds[0])  # what it imports late is imported here
    corpus = artifacts / "corpus"
    corpus.mkdir()
    for content in seeds_of(name, target):
        (corpus / _name_of(content)).write_bytes(content)
    words = artifacts / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
    options = [
        f"-max_total_time={int(seconds)}",
        f"-seed={seed}",
        f"-artifact_prefix={artifacts}/failed-",
        f"-dict={words}",
        f"-max_len={LARGEST_BYTES}",
        f"-timeout={HANG_S}",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
        "-verbosity=1",
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *options], target.run)
    atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(rf"\x{byte:02x}" for byte in word)


def mutated(rng: random.Random, pool: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """An input made of others."""
    data = bytearray(rng.choice(pool))
    for _ in range(rng.randint(1, 4)):
        place = rng.randint(0, len(data))
        match rng.randrange(6):
            case 0:
                data[place : place + rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 4))
            case 1 if words:
                data[place : place + rng.choice((0, 0, 3))] = rng.choice(words)
            case 2:
                other = rng.choice(pool)
                begin = rng.randint(0, len(other))
                data[place:place] = other[begin : begin + rng.randint(1, 32)]
            case 3 if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 4:
                del data[place : place + rng.randint(1, 16)]
            case _:
                data[place:place] = data[place : place + rng.randint(1, 8)] * rng.randint(1, 3)
    return bytes(data[:LARGEST_BYTES])


def without_coverage(name: str, seconds: float, artifacts: Path, seed: int) -> None:
    """A loop of mutations until the time is over or an input fails."""
    target = _targets()[name]
    rng, pool = random.Random(seed), seeds_of(name, target)
    executions, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        data = mutated(rng, pool, target.words)
        if len(pool) < 4096 and rng.random() < 0.02:
            pool.append(data)
        try:
            target.run(data)
        except BaseException:  # whatever it is, the input is kept and the process fails
            (artifacts / f"failed-{_name_of(data)}").write_bytes(data)
            traceback.print_exc()
            print(f"Done {executions} runs", flush=True)
            sys.exit(1)
        executions += 1
    print(f"Done {executions} runs", flush=True)


def _name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------- in the parent


def fuzzed(name: str, engine: str, seconds: float, seed: int) -> Outcome:
    """Fuzz one target in a process of its own, and keep what failed."""
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as folder:
        command = [sys.executable, __file__, "--worker", name, "--engine", engine]
        command += ["--seconds", str(seconds), "--seed", str(seed), "--artifacts", folder]
        began_s = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds + 120,
                env=environment,
                check=False,
            )
            output, code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as error:
            output, code = f"{error}: it hangs", 1
        took_s = time.monotonic() - began_s
        failed = [_kept(name, path) for path in sorted(Path(folder).glob("failed-*"))]
    if code and not failed:
        output += f"\nexit status {code}"
        failed = [Path("(no input was kept)")]
    counts = re.findall(r"(?:Done |number_of_executed_units: |^#)(\d+)", output, re.MULTILINE)
    edges = re.findall(r"cov: (\d+)", output)
    executions = max(map(int, counts), default=0)
    return Outcome(name, engine, executions, took_s, int(edges[-1]) if edges else None, tuple(failed), output)


def _kept(name: str, artifact: Path) -> Path:
    data = artifact.read_bytes()
    place = CASES / name / _name_of(data)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    return place


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz, and print what came of it; 1 if an input failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each target")
    parser.add_argument("--target", action="append", help="one of them; may be repeated")
    parser.add_argument("--engine", choices=("auto", "atheris", "plain"), default="auto")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--figures", type=Path, metavar="FILE", help="write the executions of each target there, as JSON"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--artifacts", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    engine = options.engine
    if engine == "auto":
        engine = "atheris" if has_atheris() else "plain"
    if options.worker:
        tempfile.tempdir = str(options.artifacts)  # the fuzzer ends the process without cleaning up
        work = with_atheris if engine == "atheris" else without_coverage
        work(options.worker, options.seconds, options.artifacts, options.seed)
        return 0
    if engine == "plain":
        print("plain mutations, without coverage (atheris is not used): these find less, and are no long run")
    names = options.target or list(_targets())
    return report(names, engine, options.seconds, options.seed, options.jobs, options.figures)


def report(names: Sequence[str], engine: str, seconds: float, seed: int, jobs: int, figures: Path | None = None) -> int:
    """Run the targets, print the table, and write the executions to `figures`."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(lambda name: fuzzed(name, engine, seconds, seed), names))
    print(f"{'target':<12} {'engine':<8} {'executions':>12} {'seconds':>8} {'edges':>6}  failed")
    for each in outcomes:
        edges = "-" if each.edges is None else str(each.edges)
        failed = (
            ", ".join(str(path.relative_to(ROOT) if path.is_absolute() else path) for path in each.failed) or "none"
        )
        print(f"{each.target:<12} {each.engine:<8} {each.executions:>12,} {each.seconds:>8.0f} {edges:>6}  {failed}")
    print(f"{'in all':<21} {sum(each.executions for each in outcomes):>12,}")
    if figures is not None:
        figures.parent.mkdir(exist_ok=True)
        found = {"fuzz executions": {each.target: each.executions for each in outcomes if not each.failed}}
        figures.write_text(json.dumps(found), encoding="utf-8")
    for each in outcomes:
        if each.failed:
            print(f"\n--- {each.target}\n{each.output[-4000:]}")
    return int(any(each.failed for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
