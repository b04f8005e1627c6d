"""The files in configs/ are documentation: each loads, matches the schema, and together they show every key."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from modelcache.config import effective, json_schema
from modelcache.config.layers import settings_paths
from modelcache.config.schema import ModelSettings

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))


def test_the_promised_files_are_there() -> None:
    assert {"minimal", "workstation_24gb", "server_two_models", "ab_compare"} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_loads_without_a_warning_and_matches_the_schema(file: Path) -> None:
    found = effective(str(file), environ={})
    assert found.warnings == ()
    assert found.specs
    jsonschema.validate(yaml.safe_load(file.read_text()), json_schema())


def test_the_committed_schema_is_that_of_the_settings() -> None:
    assert json.loads((CONFIGS / "modelcache.schema.json").read_text()) == json_schema()


def test_the_reference_shows_every_key() -> None:
    reference = yaml.safe_load((CONFIGS / "workstation_24gb.yaml").read_text())
    for path in settings_paths():
        into = reference
        for step in path:
            assert step in into, f"configs/workstation_24gb.yaml does not show {'.'.join(path)}"
            into = into[step]
    shown = {key for model in reference["models"].values() for key in model}
    assert shown == set(ModelSettings.model_fields)


def test_the_schema_is_a_schema_and_says_something_of_every_key() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        for key, says in section.get("properties", {}).items():
            assert says.get("description"), key


def test_the_schema_refuses_what_the_reader_refuses() -> None:
    for text in (
        "buget: {}",
        "budgets: {vram: 16}",
        "policy: {idle: 210}",
        "models: {a: {path: x}}",
        "models: {A B: {loader: 'm:f'}}",
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(text), json_schema())
