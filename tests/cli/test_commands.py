"""The commands as a person or a script meets them: what they write where, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import modelcache
import modelcache.demo
from modelcache.cli import main
from modelcache.cli.app import app

BROKEN = "version: 1\nbudgets:\n  vram: 16 Gb\nbuget: {}\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODELCACHE_CONFIG", raising=False)

    def run(*words: str):
        return CliRunner().invoke(app, list(words))

    return run


def test_a_broken_file_ends_with_2_and_one_line_a_problem(run, tmp_path) -> None:
    (tmp_path / "models.yaml").write_text(BROKEN)
    result = run("config", "check", "models.yaml")
    assert result.exit_code == 2
    assert result.stdout.splitlines() == [
        "models.yaml:3:9: error: budgets.vram: unknown unit 'Gb' (gigabits?); use GB or GiB, e.g. \"16GiB\"",
        (
            "models.yaml:4:1: error: unknown key 'buget'; did you mean 'budgets'? known keys: version, device, memory, "
            "budgets, policy, preload, roots, image_dir, segment, max_waiters, lease_sites, progress, simulated, models, ab"
        ),
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
        f"device: simulated\nsegment: 1MiB\nbudgets: {{vram: {vram}, ram: 1GiB}}\nsimulated: {{capacity: 1GiB}}\nmodels:\n"
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


def test_sizes_on_the_command_line_need_not_be_those_of_this_machine(run, tmp_path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("budgets: {vram: 80%, ram: 9000GiB, page_locked: 4000GiB}\ndevice: cuda:0\nmodels: {}\n")
    refused = run("plan", "models.yaml", "--vram", "500GiB")
    assert refused.exit_code == 2
    assert "models.yaml:1:27: error: budgets.ram: 9000.0 GiB exceeds" in refused.stderr
    result = run("plan", "models.yaml", "--vram", "500GiB", "--ram", "8TiB", "--json")
    assert result.exit_code == 0, result.stderr
    budgets = json.loads(result.stdout)["budgets"]
    assert budgets["vram"] == {"bytes": 500 << 30, "origin": "--vram"}
    assert budgets["ram"] == {"bytes": 8 << 40, "origin": "--ram"}


def test_a_plan_says_where_its_speeds_come_from(run, tmp_path) -> None:
    path = a_plan(tmp_path, "5MiB")
    speeds = json.loads(run("plan", path, "--json").stdout)["speeds"]
    assert speeds["link"] == {"bytes_per_s": 8_000_000_000, "origin": "simulated.link"}
    assert speeds["disk"]["origin"].startswith("assumed")
    speeds = json.loads(run("plan", path, "--json", "--link", "50GB/s", "--disk", "1GiB/s").stdout)["speeds"]
    assert speeds["link"] == {"bytes_per_s": 50_000_000_000, "origin": "--link"}
    assert speeds["disk"] == {"bytes_per_s": 1 << 30, "origin": "--disk"}


def test_a_plan_for_people_ends_with_what_ram_means(run, tmp_path) -> None:
    lines = run("plan", a_plan(tmp_path, "5MiB")).stdout.splitlines()
    assert [line.split() for line in lines if line.startswith("b ")] == [
        ["b", "2.0", "MiB", "headers", "1.0", "MiB", "-", "839", "us", "262", "us"],
        ["b", "0", "B", "-", "a", "1.0", "MiB"],
    ]
    assert lines[-1] == "RAM: all known models together have 5.0 MiB, so none is read from disk twice."


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--vram", "16Gb"], "unknown unit 'Gb' (gigabits?); use GB or GiB"),
        (["--ram", "16"], "16 bytes is smaller than any model"),
        (["--link", "8GB"], "cannot read '8GB'; write a speed such as \"8GB/s\""),
        (["--disk", "fast"], "cannot read 'fast'; write a speed"),
        (["--vram"], "requires an argument"),
    ],
)
def test_an_option_that_cannot_be_read_ends_with_2(run, tmp_path, words, told) -> None:
    result = run("plan", a_plan(tmp_path, "5MiB"), *words)
    assert result.exit_code == 2
    assert told in " ".join(result.stderr.replace("│", "").split())
    assert result.stdout == ""


def test_an_unknown_command_ends_with_2(run) -> None:
    result = run("nonsense")
    assert result.exit_code == 2
    assert "No such command 'nonsense'" in result.stderr


@pytest.mark.parametrize("words", [["config", "check"], ["plan"]], ids=" ".join)
def test_without_a_name_the_environment_names_the_file_before_the_folder_does(
    run, tmp_path, monkeypatch, words
) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert "no such file; write one with 'modelcache config init'" in result.stdout + result.stderr
    (tmp_path / "modelcache.yaml").write_text("models: {}\n")
    assert run(*words).exit_code == 0
    (tmp_path / "other.yaml").write_text("version: 7\n")
    monkeypatch.setenv("MODELCACHE_CONFIG", "other.yaml")
    result = run(*words)
    assert result.exit_code == 2
    assert "other.yaml:1:10: error: version" in result.stdout + result.stderr


def test_show_without_a_file_shows_the_defaults_as_people_write_them(run) -> None:
    result = run("config", "show")
    assert result.exit_code == 0, result.stderr
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in result.stdout.splitlines()}
    assert rows["segment"] == "64 MiB default"
    assert rows["simulated.link"] == "8 GB/s default"
    assert rows["policy.idle"] == "never default"
    assert rows["progress"] == "true default"
    assert rows["preload"] == "- default"


def test_init_makes_the_folder_and_says_what_it_cannot_write(run, tmp_path) -> None:
    assert run("config", "init", "deep/er/models.yaml").stdout == "deep/er/models.yaml\n"
    (tmp_path / "file").write_text("")
    result = run("config", "init", "file/models.yaml")
    assert result.exit_code == 1
    assert "error: file/models.yaml cannot be written: " in result.stderr


def test_the_template_means_the_defaults(run, tmp_path) -> None:
    assert run("config", "init").exit_code == 0
    written = json.loads(run("config", "show", "--json").stdout)
    (tmp_path / "modelcache.yaml").unlink()
    defaults = json.loads(run("config", "show", "--json").stdout)
    assert {key: row["value"] for key, row in written.items()} == {key: row["value"] for key, row in defaults.items()}


def test_the_examples_of_the_template_are_a_valid_file(run, tmp_path) -> None:
    assert run("config", "init").exit_code == 0
    path = tmp_path / "modelcache.yaml"
    text = path.read_text().replace("models: {} ", "models: ")
    text = "".join(
        line.replace("# ", "", 1) if line.startswith(("  # ", "# preload")) else line
        for line in text.splitlines(keepends=True)
    )
    path.write_text(text)
    result = run("config", "check", "--json")
    assert result.exit_code == 0, result.stdout
    assert set(json.loads(run("config", "show", "--json").stdout)) >= {"models.embed.pin", "models.mine.loader"}


# --- the program ------------------------------------------------------------------------------------------------------


def test_the_version_goes_to_standard_output(run) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"modelcache {modelcache.__version__}\n", "")


@pytest.mark.parametrize(
    "words",
    [[], ["demo"], ["doctor"], ["plan"], *(["config", word] for word in ("init", "check", "show", "schema"))],
    ids=lambda words: " ".join(words) or "modelcache",
)
def test_every_help_ends_with_examples(run, words) -> None:
    result = run(*words, "--help")
    assert result.exit_code == 0
    assert f"modelcache {' '.join(words)}".strip() in result.stdout.partition("Examples:")[2]


@pytest.mark.parametrize(
    ("error", "exit_code", "told"),
    [
        (
            modelcache.UnknownModelError("flux", ("flux2",), 1),
            1,
            "error: no model is registered as 'flux'; did you mean",
        ),
        (modelcache.ConfigError((modelcache.Finding("a.yaml", 1, 2, "k", "m"),)), 2, "a.yaml:1:2: error: k: m\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["failed", "configuration", "interrupted"],
)
def test_what_a_command_raises_becomes_words_and_an_exit_code(run, monkeypatch, error, exit_code, told) -> None:
    def fail(**options):
        raise error

    monkeypatch.setattr("modelcache.demo.run", fail)
    result = run("demo")
    assert result.exit_code == exit_code
    assert result.stderr.startswith(told)
    assert "Traceback" not in result.stderr


def test_the_demo_ends_with_its_own_verdict(run, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("modelcache.demo.run", lambda **options: asked.append(options) or len(asked) - 1)
    assert run("demo").exit_code == 0
    assert run("demo", "--out", "report", "--synthetic").exit_code == 1
    assert asked[1] == {"out": Path("report"), "synthetic": True}


def test_interrupted_before_any_command_ends_with_130(monkeypatch) -> None:
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("modelcache.cli.app.app", interrupt)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def program(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "modelcache", *words], capture_output=True, text=True, **options)


def test_python_m_modelcache_is_the_same_program(tmp_path) -> None:
    done = program("config", "check", "none.yaml", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == "none.yaml: error: no such file; write one with 'modelcache config init'\n"
    assert done.stderr == "none.yaml: problems found: 1\n"


def test_nothing_is_coloured_when_colour_is_not_wanted(tmp_path) -> None:
    environment = {"PATH": "/usr/bin", "NO_COLOR": "1", "TERM": "xterm-256color"}
    for words in (["config", "show"], ["--help"], ["plan", "none.yaml"]):
        done = program(*words, cwd=tmp_path, check=False, env=environment)
        assert "\x1b[" not in done.stdout + done.stderr


def test_a_reader_that_goes_away_is_no_traceback(tmp_path) -> None:
    done = subprocess.run(
        f"'{sys.executable}' -m modelcache config schema | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [["--help"], ["demo", "--help"], ["config", "check"], ["config", "show"], ["config", "schema"], ["plan"]],
    ids=" ".join,
)
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
