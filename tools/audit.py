"""Audit what modelcache depends on, without a network: what is installed, and the oldest versions that it allows.

    tools/audit.py

It runs `pip check`, and compares the direct dependencies with constraints/advisories.json: published advisories, looked
up by hand on the day that the file names. An installed version that is affected fails, and so does a lower bound in
pyproject.toml that allows an affected version, unless the file says why that does no harm here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
ADVISORIES = ROOT / "constraints" / "advisories.json"


@dataclass(frozen=True)
class Advisory:
    """One published advisory.

    Attributes:
        id: As GitHub or OSV name it.
        affected: The versions.
        what: In a few words.
        accepted: Why such a version does no harm here; empty if it does.
    """

    id: str
    cve: str
    package: str
    affected: SpecifierSet
    what: str
    accepted: str = ""

    def affects(self, version: Version) -> bool:
        """Whether this version is affected, builds such as ``2.12.0+cpu`` too."""
        return self.affected.contains(Version(version.public), prereleases=True)

    def __str__(self) -> str:
        return f"{self.id} ({self.cve}: {self.what}; affected: {self.affected})"


def read_advisories(path: Path = ADVISORIES) -> list[Advisory]:
    """The list.

    Raises:
        ValueError: An entry lacks something, or has an id of another form.
    """
    found = []
    for entry in json.loads(path.read_text())["advisories"]:
        if not str(entry["id"]).startswith(("GHSA-", "PYSEC-", "OSV-")):
            raise ValueError(f"{entry['id']!r} is no id of an advisory")
        found.append(Advisory(**{**entry, "affected": SpecifierSet(entry["affected"])}))
    return found


def direct_dependencies(pyproject: Path) -> list[Requirement]:
    """What is needed always, and by each extra."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()
    return [Requirement(text) for text in [*project["dependencies"], *(text for extra in extras for text in extra)]]


def lowest(requirement: Requirement) -> Version:
    """The oldest version that a requirement allows; 0 when it has no lower bound."""
    bounds = [Version(each.version) for each in requirement.specifier if each.operator in {">=", "==", "~=", ">"}]
    return max(bounds, default=Version("0"))


def bound_problems(needed: Sequence[Requirement], advisories: Sequence[Advisory]) -> Iterator[tuple[str, Advisory]]:
    """What the lower bounds allow."""
    for requirement, advisory in _pairs(needed, advisories):
        if advisory.affects(lowest(requirement)):
            yield f"'{requirement}' allows {lowest(requirement)}, which {advisory} affects", advisory


def _pairs(needed: Sequence[Requirement], advisories: Sequence[Advisory]) -> Iterator[tuple[Requirement, Advisory]]:
    for requirement in needed:
        for advisory in advisories:
            if canonicalize_name(advisory.package) == canonicalize_name(requirement.name):
                yield requirement, advisory


def installed_problems(installed: Mapping[str, str], advisories: Sequence[Advisory]) -> Iterator[tuple[str, Advisory]]:
    """What is installed and affected."""
    for advisory in advisories:
        version = installed.get(canonicalize_name(advisory.package))
        if version is not None and advisory.affects(Version(version)):
            yield f"{advisory.package} {version} is installed, which {advisory} affects", advisory


def installed_versions(needed: Sequence[Requirement]) -> dict[str, str]:
    """The versions here, by canonical name."""
    found = {}
    for requirement in needed:
        try:
            found[canonicalize_name(requirement.name)] = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found; 1 if any of it is a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pyproject", type=Path, default=ROOT / "pyproject.toml")
    parser.add_argument("--advisories", type=Path, default=ADVISORIES)
    parser.add_argument("--no-pip-check", action="store_true", help="look at advisories only")
    options = parser.parse_args(arguments)
    advisories = read_advisories(options.advisories)
    needed = direct_dependencies(options.pyproject)
    installed = installed_versions(needed)
    problems = []
    for text, advisory in [*installed_problems(installed, advisories), *bound_problems(needed, advisories)]:
        if advisory.accepted:
            print(f"note: {text}; accepted: {advisory.accepted}")
        else:
            problems.append(text)
    if not options.no_pip_check:
        done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
        problems += [f"pip check: {line}" for line in done.stdout.splitlines()] if done.returncode else []
    for text in problems:
        print(f"problem: {text}")
    age = json.loads(options.advisories.read_text())["looked_up"]
    print(f"{len(advisories)} advisories of {age}, {len(installed)} dependencies installed, {len(problems)} problems")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
