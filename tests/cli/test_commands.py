"""The commands as a person or a script meets them: what they write where, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from modelcache.cli.app import app

BROKEN = "version: 1\nbudgets:\n  vram: 16 Gb\nbuget: {}\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*words: str):
        return CliRunner().invoke(app, list(words))

    return run


def test_a_broken_file_ends_with_2_and_one_line_a_problem(run, tmp_path) -> None:
    (tmp_path / "models.yaml").write_text(BROKEN)
    result = run("config", "check", "models.yaml")
    assert result.exit_code == 2
    assert result.stdout.splitlines() == [
        "models.yaml:3:9: error: budgets.vram: unknown unit 'Gb' (gigabits?); use GB or GiB, e.g. \"16GiB\"",
        "models.yaml:4:1: error: unknown key 'buget'; did you mean 'budgets'? known keys: version, device, budgets, "
        "policy, preload, roots, image_dir, segment, max_waiters, lease_sites, progress, simulated, models",
    ]
    assert result.stderr == "models.yaml: problems found: 2\n"


def test_the_findings_are_to_be_had_as_json(run, tmp_path) -> None:
    (tmp_path / "models.yaml").write_text(BROKEN)
    found = json.loads(run("config", "check", "models.yaml", "--json").stdout)
    assert found["valid"] is False
    assert [(each["line"], each["key"], each["severity"]) for each in found["findings"]] == [
        (3, "budgets.vram", "error"),
        (4, "", "error"),
    ]


def test_files_that_are_not_there_are_a_warning(run, tmp_path) -> None:
    (tmp_path / "models.yaml").write_text("models:\n  a: {loader: transformers, path: nowhere}\n")
    result = run("config", "check", "models.yaml")
    assert result.exit_code == 0
    assert result.stdout == (
        "models.yaml:2:35: warning: models.a.path: there is no 'nowhere'; put the files there or correct the path\n"
    )


def test_a_file_that_is_not_there_ends_with_2(run) -> None:
    result = run("plan", "nowhere.yaml")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "nowhere.yaml: error: no such file; write one with 'modelcache config init'" in result.stderr


def test_init_writes_a_file_that_checks_and_replaces_none(run, tmp_path) -> None:
    assert run("config", "init").exit_code == 0
    assert run("config", "check").exit_code == 0
    (tmp_path / "modelcache.yaml").write_text("version: 1 # mine\n")
    result = run("config", "init")
    assert result.exit_code == 2
    assert "is there already; choose another name, or replace it with --force" in result.stderr
    assert (tmp_path / "modelcache.yaml").read_text() == "version: 1 # mine\n"
    assert run("config", "init", "--force").exit_code == 0


def test_show_says_where_each_value_comes_from(run, tmp_path, monkeypatch) -> None:
    (tmp_path / "modelcache.yaml").write_text("budgets: {ram: 2GiB}\n")
    monkeypatch.setenv("MODELCACHE_BUDGETS__VRAM", "1GiB")
    shown = json.loads(run("config", "show", "--json").stdout)
    assert shown["budgets.ram"] == {"value": "2GiB", "origin": "modelcache.yaml:1"}
    assert shown["budgets.vram"] == {"value": "1GiB", "origin": "MODELCACHE_BUDGETS__VRAM"}
    assert shown["policy.evict"] == {"value": "lru", "origin": "default"}


def test_the_schema_is_json(run) -> None:
    assert json.loads(run("config", "schema").stdout)["properties"]["budgets"]


def a_plan(tmp_path, vram: str) -> str:
    for name, size in (("a", 3), ("b", 2)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.zeros(size << 18)}, tmp_path / name / "model.safetensors")
    (tmp_path / "models.yaml").write_text(
        f"device: simulated\nbudgets: {{vram: {vram}, ram: 1GiB}}\nsimulated: {{capacity: 1GiB}}\nmodels:\n"
        "  a: {loader: transformers, path: a}\n  b: {loader: transformers, path: b, workspace: 1MiB}\n"
    )
    return "models.yaml"


def test_a_plan_reads_headers_and_says_who_gives_up_first(run, tmp_path) -> None:
    result = run("plan", a_plan(tmp_path, "5MiB"), "--json")
    assert result.exit_code == 0, result.stderr
    what = json.loads(result.stdout)
    assert [(model["name"], model["weights_bytes"], model["size_from"]) for model in what["models"]] == [
        ("a", 3 << 20, "headers"),
        ("b", 2 << 20, "headers"),
    ]
    assert what["fit_together"] == [["a"], ["b"]]
    assert what["switches"][1]["gives_up"][0]["name"] == "a"


def test_a_model_that_never_fits_ends_with_3(run, tmp_path) -> None:
    result = run("plan", a_plan(tmp_path, "2MiB"))
    assert result.exit_code == 3
    assert "a: larger than the whole budget" in result.stderr


def test_a_plan_of_a_broken_file_names_the_file(run, tmp_path) -> None:
    path = a_plan(tmp_path, "5MiB")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"\x80\x04pickle")
    result = run("plan", path)
    assert result.exit_code == 3
    assert "pickle" in result.stderr


def test_wrong_usage_ends_with_2(run) -> None:
    assert run("plan", "--vram").exit_code == 2
    assert run("nonsense").exit_code == 2


@pytest.mark.parametrize("words", [["--help"], ["config", "check"], ["config", "schema"], ["plan"]], ids=" ".join)
def test_no_command_but_the_demo_imports_torch(words, tmp_path) -> None:
    (tmp_path / "modelcache.yaml").write_text("models: {}\n")
    code = (
        f"import sys; sys.argv = ['modelcache', *{words!r}]\n"
        "from modelcache.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
