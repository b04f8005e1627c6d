"""What keys mean to each other: names, options of loaders, paths, and sizes that cannot hold together."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from modelcache.config import check_text, effective, missing_files
from modelcache.errors import ConfigError

MODEL = "{loader: transformers, path: models/a"


def problems(text: str) -> list[str]:
    """Every finding, with what is a warning marked."""
    try:
        findings = check_text(text, "m.yaml").warnings
    except ConfigError as error:
        findings = error.findings
    return [f"{finding.severity} {finding}" for finding in findings]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            f"preload: [a, a]\nmodels:\n  a: {MODEL}}}\n",
            "error m.yaml:1:14: preload[1]: 'a' is listed already; remove one of them",
        ),
        ("preload: [a]\n", "error m.yaml:1:11: preload[0]: no model is called 'a'; models are listed in 'models'"),
        ("preload: embed\n", "error m.yaml:1:10: preload: must be a list, such as [a, b], got 'embed'"),
        ("models: [{name: ../a}]\n", "error m.yaml:1:9: models: must be a mapping of keys to values, got a list"),
        (
            f"models:\n  a: {MODEL}, task: text-generation, model: AutoModel}}\n",
            "error m.yaml:2:45: models.a.task: chooses the class, and so does 'model'; leave one of them out",
        ),
        (
            f"models:\n  a: {MODEL}, model: 'my:Net'}}\n",
            "error m.yaml:2:52: models.a.model: must be the name of a class of transformers, such as AutoModel, "
            "got 'my:Net'",
        ),
        (
            "models:\n  a: {loader: safetensors, weights: w, model: Net}\n",
            "error m.yaml:2:47: models.a.model: must be your class, \"package.module:Class\", got 'Net'",
        ),
        (
            "models:\n  a: {loader: safetensors, weights: w}\n",
            "error m.yaml:2:3: models.a: model is missing; the loader 'safetensors' needs it",
        ),
        (
            f"models:\n  a: {MODEL}, trust_remote_code: true}}\n",
            "error m.yaml:2:45: models.a: 'trust_remote_code' cannot be set in a file; if you trust its author, load "
            "this model in a function of your own",
        ),
        (
            "models:\n  a: {loader: transformers, path: ~/models/a}\n",
            "error m.yaml:2:35: models.a.path: '~' is not expanded here; write the whole path instead of '~/models/a'",
        ),
        (
            'models:\n  a: {loader: transformers, path: "x\\0y"}\n',
            "error m.yaml:2:35: models.a.path: must be printable text of at most 4096 characters, got 'x\\x00y'",
        ),
        (
            "models:\n  a: {loader: transformers, path: /etc}\n",
            "error m.yaml:2:35: models.a.path: '/etc' leaves the folder of this file; add its folder to 'roots' if "
            "this is intended",
        ),
        (
            "budgets: {ram: 4GiB, page_locked: 8GiB}\n",
            "error m.yaml:1:35: budgets.page_locked: 8.0 GiB exceeds budgets.ram, 4.0 GiB, of which it is a part; "
            "lower it or raise budgets.ram",
        ),
        (
            "device: simulated\nbudgets: {vram: 20GiB}\n",
            "error m.yaml:2:17: budgets.vram: 20.0 GiB exceeds the 8.0 GiB of the simulated device; lower it or raise "
            "simulated.capacity",
        ),
        (
            "budgets: {vram: 0.8}\n",
            'error m.yaml:1:17: budgets.vram: must be a size such as "16GiB" or "80%", got the number 0.8; for a '
            'share write "80%"',
        ),
        (
            "budgets: {vram: 17179869184}\n",
            'error m.yaml:1:17: budgets.vram: 17179869184 has no unit; write "17179869184B", or a size such as "16GiB"',
        ),
        (
            f"models:\n  a: {MODEL}, concurrency: 0}}\n",
            'error m.yaml:2:58: models.a.concurrency: must be a whole number, 1 or more, or "unlimited", got the '
            "number 0",
        ),
        (
            "segment: 100MB\n",
            "error m.yaml:1:10: segment: must be a multiple of 512 bytes, 4KiB or more, got '100MB'",
        ),
        (
            f"budgets: {{vram: 24GiB}}\nmodels:\n  a: {MODEL}, size: 30GiB, workspace: 2GiB}}\n",
            "warning m.yaml:3:51: models.a.size: 32.0 GiB with its workspace exceeds budgets.vram, 24.0 GiB; it can "
            "never be used: raise the budget or name a smaller variant",
        ),
        (
            f"budgets: {{vram: 8GiB}}\nmodels:\n  a: {MODEL}, size: 5GiB, pin: vram}}\n"
            f"  b: {MODEL}, size: 5GiB, pin: vram}}\n",
            "warning m.yaml:1:17: budgets.vram: the 2 models pinned there need 10.0 GiB together, more than the 8.0 "
            "GiB of it; pin fewer",
        ),
        (
            "device: host_only\nbudgets: {vram: 8GiB}\n",
            "warning m.yaml:2:17: budgets.vram: not used with 'device: host_only', where RAM is the top tier",
        ),
        (
            "device: host_only\nmemory: mapped\n",
            "warning m.yaml:2:9: memory: not used with 'device: host_only', where there is no device memory",
        ),
        (
            "image_dir: images\n",
            "warning m.yaml:1:1: image_dir: not used without budgets.disk; set that as well, to 100GiB or the like",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_told_at_their_place(text: str, line: str) -> None:
    assert problems(text) == [line]


def test_many_decimal_sizes_are_remarked_on_but_not_those_of_a_disk() -> None:
    found = problems("budgets: {vram: 24GB, ram: 96GB, disk: 200GB}\n")
    assert [line.split(": ")[1] for line in found] == ["budgets.vram", "budgets.ram"]


def test_a_link_out_of_the_folder_needs_a_root_as_well(tmp_path) -> None:
    elsewhere, here = tmp_path / "disk", tmp_path / "conf"
    elsewhere.mkdir()
    here.mkdir()
    (here / "models").symlink_to(elsewhere)
    file = here / "m.yaml"
    file.write_text(f"models:\n  a: {MODEL}}}\n")
    with pytest.raises(ConfigError) as caught:
        effective(str(file), environ={})
    assert str(caught.value) == (
        f"{file}:2:35: models.a.path: 'models/a' leads to {str(elsewhere / 'a')!r} by a symbolic link, out of the "
        "folder of this file; add that folder to 'roots' if this is intended"
    )
    file.write_text(f"roots: [{elsewhere}]\nmodels:\n  a: {MODEL}}}\n")
    assert effective(str(file), environ={}).specs[0].name == "a"


def test_a_link_to_itself_is_no_crash(tmp_path) -> None:
    (tmp_path / "models").symlink_to("models")
    file = tmp_path / "m.yaml"
    file.write_text(f"models:\n  a: {MODEL}}}\n")
    (finding,) = missing_files(effective(str(file), environ={}))
    assert "models/a" in finding.message


def test_a_later_change_of_folder_changes_no_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.yaml").write_text(f"image_dir: images\nbudgets: {{disk: 1GiB}}\nmodels:\n  a: {MODEL}}}\n")
    found = effective("m.yaml", environ={})
    monkeypatch.chdir("/")
    assert found.specs[0].loader.options["path"] == str(tmp_path / "models" / "a")
    assert found.settings.image_dir == str(tmp_path / "images")


def test_missing_weights_are_told_with_what_is_there_instead(tmp_path) -> None:
    folder = tmp_path / "models" / "a"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"")
    file = tmp_path / "m.yaml"
    file.write_text(f"models:\n  a: {MODEL}}}\n  b: {{loader: transformers, path: models/b}}\n")
    lines = [str(finding) for finding in missing_files(effective(str(file), environ={}))]
    assert lines == [
        f"{file}:2:35: models.a.path: 'models/a': no file 'model.safetensors'. The folder has: config.json, "
        "pytorch_model.bin (pickle, not loaded).",
        f"{file}:3:35: models.b.path: there is no 'models/b'; put the files there or correct the path",
    ]


def test_a_problem_of_the_file_is_told_even_where_the_environment_hides_it(tmp_path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("budgets: {vram: 16 Gb}\n")
    with pytest.raises(ConfigError) as caught:
        effective(str(file), environ={"MODELCACHE_BUDGETS__VRAM": "20GiB"})
    assert [(finding.path, finding.key) for finding in caught.value.findings] == [(str(file), "budgets.vram")]


def test_every_value_that_holds_is_spelt_as_a_file_would(tmp_path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(
        f"policy: {{idle: 90s}}\nmodels:\n  a: {MODEL}, workspace: 1.5GiB, concurrency: unlimited, idle: never}}\n"
        f"  b: {MODEL}}}\n"
    )
    environ = {"MODELCACHE_PROGRESS": "0"}
    rows = {row.key: (row.text, row.origin) for row in effective(str(file), environ=environ).rows()}
    assert rows["segment"] == ("64MiB", "default")
    assert rows["simulated.link"] == ("8GB/s", "default")
    assert rows["budgets.disk"] == ("none", "default")
    assert rows["policy.idle"] == ("90s", f"{file}:1")
    assert rows["progress"] == ("false", "MODELCACHE_PROGRESS")
    assert rows["models.a.workspace"] == ("1536MiB", f"{file}:3")
    assert rows["models.a.concurrency"] == ("unlimited", f"{file}:3")
    assert rows["models.a.idle"] == ("never", f"{file}:3")
    assert rows["models.b.idle"] == (None, "default")


def test_checking_imports_no_torch_and_nothing_a_file_names(tmp_path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "my_models.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    file = tmp_path / "m.yaml"
    file.write_text("models:\n  a: {loader: 'my_models:load'}\n")
    code = (
        "import sys; from modelcache.config import effective; effective('m.yaml'); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'my_models')))"
    )
    environ = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, check=False)
    assert (done.returncode, marker.exists()) == (0, False)


def test_importing_the_package_imports_neither_pydantic_nor_yaml() -> None:
    code = "import sys, modelcache; sys.exit(any(name in sys.modules for name in ('pydantic', 'yaml', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
