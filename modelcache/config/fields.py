"""What the settings are made of: kinds of values with how they are read and what an editor is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainValidator, WithJsonSchema

from modelcache.config import values
from modelcache.config.values import Scalar, Size
from modelcache.spec import LOADER_KINDS, NAME_PATTERN

_SIZE_PATTERN = r"^\s*[0-9]+(\.[0-9]+)?\s*([KMGT]i?)?B\s*$"
_DURATION_PATTERN = r"^(never|([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+)$"
_PERCENT_PATTERN = r"^\s*[0-9]+(\.[0-9]+)?\s*%\s*$"
ENTRY_PATTERN = r"^[^\s:]+:[^\s:]+$"

Json = dict[str, Any]


def text_json(pattern: str, *examples: str) -> Json:
    """What an editor is told of text that matches a pattern."""
    return {"type": "string", "pattern": pattern, "examples": list(examples)}


def words_json(*words: str) -> Json:
    """What an editor is told of one of a few words."""
    return {"enum": list(words)}


_SIZE_JSON = text_json(_SIZE_PATTERN, "3GiB", "512MiB")
_BUDGET_JSON: Json = {
    "anyOf": [words_json("auto"), text_json(_PERCENT_PATTERN, "80%"), text_json(_SIZE_PATTERN, "20GiB")]
}
_OPTIONAL_BUDGET_JSON: Json = {"anyOf": [words_json("none"), *_BUDGET_JSON["anyOf"]]}
_COUNT_JSON: Json = {"type": "integer", "minimum": 1}
_PATH_JSON: Json = {"type": "string", "minLength": 1}
LOADER_JSON: Json = {"anyOf": [words_json(*LOADER_KINDS), text_json(ENTRY_PATTERN, "my_models:load")]}
DEVICE_JSON: Json = {"anyOf": [words_json("auto", "simulated", "host_only"), text_json(r"^cuda:[0-9]+$", "cuda:0")]}
_NAME_JSON: Json = {"type": "string", "pattern": f"^{NAME_PATTERN}$"}


def no_null(value: object) -> object:
    """A section with nothing under it is an empty section: all its keys may be comments."""
    return {} if isinstance(value, Scalar) and value.is_empty else value


def no_null_list(value: object) -> object:
    """The same for a list."""
    return () if isinstance(value, Scalar) and value.is_empty else value


def frozen(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """A mapping that stays as it is."""
    return MappingProxyType(dict(value))


Budget = Annotated[Size, PlainValidator(values.read_budget), WithJsonSchema(_BUDGET_JSON)]
OptionalBudget = Annotated[Size, PlainValidator(values.read_optional_budget), WithJsonSchema(_OPTIONAL_BUDGET_JSON)]
Bytes = Annotated[int, PlainValidator(values.read_size), WithJsonSchema(_SIZE_JSON)]
Segment = Annotated[int, PlainValidator(values.read_segment), WithJsonSchema(_SIZE_JSON)]
Rate = Annotated[
    int, PlainValidator(values.read_rate), WithJsonSchema(text_json(_SIZE_PATTERN[:-4] + r"/s\s*$", "8GB/s"))
]
Idle = Annotated[
    float | None,
    PlainValidator(values.read_idle),
    WithJsonSchema(text_json(_DURATION_PATTERN, "10m", "1m30s", "never")),
]
Flag = Annotated[bool, PlainValidator(values.read_flag), WithJsonSchema({"type": "boolean"})]
Count = Annotated[int, PlainValidator(values.read_count), WithJsonSchema(_COUNT_JSON)]
Concurrency = Annotated[
    int,
    PlainValidator(values.read_concurrency),
    WithJsonSchema({"anyOf": [words_json("unlimited"), _COUNT_JSON]}),
]
PathText = Annotated[str, PlainValidator(values.read_path), WithJsonSchema(_PATH_JSON)]
Text = Annotated[str, PlainValidator(values.read_text), WithJsonSchema({"type": "string", "minLength": 1})]
Name = Annotated[str, PlainValidator(values.read_name), WithJsonSchema(_NAME_JSON)]
Entry = Annotated[str, PlainValidator(values.read_entry), WithJsonSchema(text_json(ENTRY_PATTERN, "my_evaluation:run"))]
Fraction = Annotated[float, PlainValidator(values.read_fraction), WithJsonSchema(text_json(_PERCENT_PATTERN, "50%"))]
Amount = Annotated[float, PlainValidator(values.read_amount), WithJsonSchema({"type": "number", "exclusiveMinimum": 0})]
Number = Annotated[float, PlainValidator(values.read_number), WithJsonSchema({"type": "number"})]
Seed = Annotated[int, PlainValidator(values.read_seed), WithJsonSchema({"type": "integer", "minimum": 0})]


class Section(BaseModel):
    """A group of keys. Unknown keys are refused; nothing changes after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
