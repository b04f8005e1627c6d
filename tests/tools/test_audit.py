"""The audit of dependencies: it sees what is affected, installed or allowed, and its own list is in order."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location("audit", ROOT / "tools" / "audit.py")
audit = importlib.util.module_from_spec(_SPEC)
sys.modules["audit"] = audit
_SPEC.loader.exec_module(audit)


def audited(tmp_path: Path, bound: str, *, affected: str, accepted: str = "", package: str = "packaging") -> int:
    """Audit a project that needs one package, by one advisory."""
    pyproject, advisories = tmp_path / "pyproject.toml", tmp_path / "advisories.json"
    pyproject.write_text(f'[project]\nname = "x"\ndependencies = ["{bound}"]\n')
    entry = {"id": "GHSA-0000-0000-0000", "cve": "CVE-0", "package": package, "affected": affected, "what": "runs code"}
    advisories.write_text(json.dumps({"looked_up": "2026-01-01", "advisories": [{**entry, "accepted": accepted}]}))
    return audit.main(["--pyproject", str(pyproject), "--advisories", str(advisories), "--no-pip-check"])


def test_an_affected_version_that_is_installed_is_a_problem(tmp_path, capsys):
    assert audited(tmp_path, "packaging>=9999", affected="<9999") == 1
    assert "packaging" in capsys.readouterr().out


def test_a_lower_bound_that_allows_an_affected_version_is_a_problem(tmp_path, capsys):
    assert audited(tmp_path, "packaging>=1.0", affected="<1.1") == 1
    assert "problem: 'packaging>=1.0' allows 1.0, which GHSA-0000-0000-0000" in capsys.readouterr().out


def test_no_lower_bound_allows_everything(tmp_path):
    assert audited(tmp_path, "packaging", affected="<1.1") == 1


def test_what_is_accepted_is_told_with_its_reason(tmp_path, capsys):
    assert audited(tmp_path, "packaging>=1.0", affected="<1.1", accepted="never called") == 0
    assert "accepted: never called" in capsys.readouterr().out


def test_a_bound_above_and_an_installed_version_above_are_no_problem(tmp_path):
    assert audited(tmp_path, "packaging>=1.1", affected="<1.1") == 0
    assert audited(tmp_path, "packaging>=1.0", affected="<1.1", package="another") == 0


@pytest.mark.parametrize(
    ("version", "affected", "is_affected"),
    [
        ("2.12.0+cpu", "<=2.12.0", True),
        ("2.13.0+cu130", "<2.13.0", False),
        ("5.8.1", ">=4.49.0,<=5.8.1", True),
        ("4.48.0", ">=4.49.0,<=5.8.1", False),
        ("5.0.0rc2", "<5.0.0rc3", True),
    ],
)
def test_versions_are_compared_as_they_are_meant(version, affected, is_affected):
    advisory = audit.Advisory("GHSA-x", "CVE-0", "x", audit.SpecifierSet(affected), "something")
    assert advisory.affects(Version(version)) == is_affected


def test_an_id_of_another_form_is_refused(tmp_path):
    path = tmp_path / "advisories.json"
    path.write_text(json.dumps({"advisories": [{"id": "TODO"}]}))
    with pytest.raises(ValueError, match="is no id of an advisory"):
        audit.read_advisories(path)


def test_the_list_is_about_direct_dependencies_each_id_once():
    advisories = audit.read_advisories()
    names = {audit.canonicalize_name(each.name) for each in audit.direct_dependencies(ROOT / "pyproject.toml")}
    assert {audit.canonicalize_name(each.package) for each in advisories} <= names
    assert len({each.id for each in advisories}) == len(advisories)


def test_this_project_passes(capsys):
    assert audit.main(["--no-pip-check"]) == 0, capsys.readouterr().out
