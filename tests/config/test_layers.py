"""Call over command line over environment over file over default, and where each value came from."""

from __future__ import annotations

import pytest

from modelcache.config import effective, settings_of
from modelcache.config.values import Absolute, Auto, Share
from modelcache.errors import ConfigError
from modelcache.spec import OnWrite, Priority
from modelcache.tier import Tier


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "models.yaml"
    path.write_text(
        "budgets: {vram: 10GiB}\npolicy: {idle: 10m}\nmodels:\n"
        "  embed: {loader: sentence-transformers, path: minilm, pin: vram, idle: never}\n"
        "  mine: {loader: 'pkg:load', workspace: 2GiB, priority: high, on_write: refuse, reload: true}\n"
    )
    return path


def size_of(found) -> object:
    return found.settings.budgets.vram


def test_each_layer_wins_over_those_below_it(file) -> None:
    environ = {"MODELCACHE_BUDGETS__VRAM": "20GiB"}
    cli, call = {"budgets.vram": "30GiB"}, {"budgets.vram": "40GiB"}
    path, at = str(file), ("budgets", "vram")
    assert size_of(effective(environ={})) == Auto()
    found = effective(path, environ={})
    assert size_of(found) == Absolute(10 << 30, "10GiB")
    assert str(found.origins[at]) == f"{path}:1"
    found = effective(path, environ=environ)
    assert size_of(found).size_bytes == 20 << 30
    assert str(found.origins[at]) == "MODELCACHE_BUDGETS__VRAM"
    found = effective(path, cli=cli, environ=environ)
    assert (size_of(found).size_bytes, str(found.origins[at])) == (30 << 30, "cli")
    found = effective(path, call=call, cli=cli, environ=environ)
    assert (size_of(found).size_bytes, str(found.origins[at])) == (40 << 30, "call")


def test_the_environment_names_the_file(file) -> None:
    assert effective(environ={"MODELCACHE_CONFIG": str(file)}).path == str(file)


def test_a_wrong_value_in_the_environment_is_placed_there() -> None:
    with pytest.raises(ConfigError) as caught:
        effective(environ={"MODELCACHE_BUDGETS__VRAM": "16"})
    assert str(caught.value) == (
        'MODELCACHE_BUDGETS__VRAM: budgets.vram: 16 bytes is smaller than any model; add a unit: "16GiB"'
    )


def test_a_misspelt_variable_is_a_warning_since_it_may_be_anothers() -> None:
    (warning,) = effective(environ={"MODELCACHE_BUDGETS__VRAN": "16GiB"}).warnings
    assert "is no setting and is ignored; did you mean 'MODELCACHE_BUDGETS__VRAM'?" in str(warning)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file; write one with 'modelcache config init'"):
        effective("nowhere.yaml", environ={})


def test_models_become_specs_with_paths_beside_the_file(file) -> None:
    embed, mine = effective(str(file), environ={}).specs
    assert embed.loader.kind == "sentence-transformers"
    assert embed.loader.options["path"] == str(file.parent / "minilm")
    assert (embed.pin, embed.idle_s) == (Tier.VRAM, None)
    assert mine.loader.entry == "pkg:load"
    assert (mine.workspace_bytes, mine.priority, mine.on_write) == (2 << 30, Priority.HIGH, OnWrite.REFUSE)
    assert (mine.reload, mine.idle_s) == (True, 600.0)


def test_a_root_allows_what_leaves_the_folder_of_the_file(tmp_path) -> None:
    path = tmp_path / "conf" / "models.yaml"
    path.parent.mkdir()
    text = "models:\n  a: {loader: transformers, path: ../shared/a}\n"
    path.write_text(text)
    with pytest.raises(ConfigError, match="leaves the folder of this file"):
        effective(str(path), environ={})
    path.write_text("roots: [../shared]\n" + text)
    assert effective(str(path), environ={}).specs[0].name == "a"


def test_a_call_takes_bytes_and_text_and_names_what_it_does_not_know() -> None:
    settings = settings_of({"budgets.vram": 1 << 30, "budgets.ram": "50%"})
    assert settings.budgets.vram.size_bytes == 1 << 30
    assert settings.budgets.ram == Share(0.5, "50%")
    with pytest.raises(ConfigError, match="unknown key; did you mean 'budgets.vram'"):
        settings_of({"budgets.vrom": 1})


def test_the_environment_gives_what_a_call_does_not(monkeypatch) -> None:
    monkeypatch.setenv("MODELCACHE_BUDGETS__VRAM", "20GiB")
    assert settings_of({}).budgets.vram.size_bytes == 20 << 30
    assert settings_of({"budgets.vram": "30GiB"}).budgets.vram.size_bytes == 30 << 30
    monkeypatch.delenv("MODELCACHE_BUDGETS__VRAM")
    assert settings_of({}).budgets.vram == Auto()


@pytest.mark.parametrize("word", ["off", '"off"', "watch"])
def test_watching_for_pressure_is_off_or_on_with_or_without_quotes(tmp_path, word) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(f"policy: {{pressure: {word}}}\n")
    assert effective(str(path), environ={}).settings.policy.pressure == word.strip('"')
    found = effective(str(path), environ={"MODELCACHE_POLICY__PRESSURE": "watch"})
    assert found.settings.policy.pressure == "watch"
    assert effective(environ={}).settings.policy.pressure == "off"


def test_another_word_for_pressure_is_refused_with_the_choice(tmp_path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("policy: {pressure: on}\n")
    with pytest.raises(ConfigError, match=r"policy\.pressure.*off or watch"):
        effective(str(path), environ={})
