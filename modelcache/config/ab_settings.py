"""The section `ab`: what is compared offline, and how traffic is split online."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema

from modelcache.config import values
from modelcache.config.fields import (
    Amount,
    Count,
    Entry,
    Flag,
    Fraction,
    Idle,
    Name,
    Number,
    PathText,
    Section,
    Seed,
    Text,
    frozen,
    no_null,
    no_null_list,
    words_json,
)

_BETTER = ("higher", "lower")
_SCALES = ("difference", "ratio")


class ScoreSettings(Section):
    """One score of a comparison."""

    measure: Entry = Field(
        description='Your function, "package.module:function"; called with (output, item), gives a number. Required.'
    )
    better: Annotated[str, PlainValidator(values.one_of(*_BETTER)), WithJsonSchema(words_json(*_BETTER))] = Field(
        default="higher", description='Which way is better: "higher" (default) or "lower".'
    )
    scale: Annotated[str, PlainValidator(values.one_of(*_SCALES)), WithJsonSchema(words_json(*_SCALES))] = Field(
        default="difference", description='How arms are compared: by "difference" (default) or by "ratio".'
    )
    margin: Amount | None = Field(
        default=None,
        description="How much worse is acceptable, in the score's unit. Default: nothing is called no worse.",
    )
    bounds: tuple[Number, Number] | None = Field(
        default=None,
        description=(
            "The least and the most that it can be, such as [0, 10]: with it also a run that stops early finds an arm "
            "no worse. Default: [0, 1] if all scores are 0 or 1, otherwise not known."
        ),
    )


class CompareSettings(Section):
    """What `modelcache ab run` does."""

    arms: tuple[Name, ...] = Field(
        description="Models, the baseline first; one twice compares it with itself. Required."
    )
    items: PathText = Field(description="A .jsonl or .csv file of items, relative to this file. Required.")
    run: Entry = Field(
        description='Your function, "package.module:function"; called with (model, item), gives an output. Required.'
    )
    scores: Annotated[Mapping[Text, ScoreSettings], BeforeValidator(no_null), AfterValidator(frozen)] = Field(
        default_factory=lambda: MappingProxyType({}),
        description="Scores by name. Times and failures are measured anyway.",
    )
    repeats: Count = Field(default=1, description="Calls of each arm for each item. Default 1.")
    seed: Seed = Field(default=0, description="Of the order and the resampling. Default 0.")
    latency_margin: Fraction | None = Field(
        default=None, description='How much slower is acceptable, such as "5%". Default: nothing is called no slower.'
    )
    level: Fraction = Field(
        default=0.05, description='The chance of a wrong verdict where arms are the same, over all. Default "5%".'
    )
    primary: Annotated[tuple[Text, ...], BeforeValidator(no_null_list)] = Field(
        default=(),
        description="Metrics that decide when enough is known. Default: the scores, or the time where there are none.",
    )
    warm_up: Seed = Field(default=2, description="Calls after each arrival of a model that do not count. Default 2.")
    stop_early: Flag = Field(
        default=False,
        description=(
            "End once every primary metric is decided; intervals are then wider, and hold at any time. Default false."
        ),
    )
    max_items: Count | None = Field(default=None, description="Use so many items, drawn by lot. Default: all.")
    max_time: Idle = Field(default=None, description='End after so long: "10m", or "never" (default).')
    allow_disk: Flag = Field(
        default=False,
        description="Go on although RAM does not hold all arms, so that switches are loads. Default false.",
    )
    log: PathText | None = Field(
        default=None,
        description=(
            "Where the run is recorded, relative to this file; a run cut short goes on there. Default: nowhere."
        ),
    )


class SliceSettings(Section):
    """The part of a layer that an experiment has."""

    name: Text = Field(description="The same for all experiments that must not overlap. Required.")
    start: Fraction = Field(default=0.0, description='Where the slice begins. Default "0%".')
    end: Fraction = Field(default=1.0, description='Where it ends. Default "100%".')


class ExperimentSettings(Section):
    """One experiment: how its units are shared out."""

    arms: Mapping[Name, Fraction] = Field(
        description=(
            "Models with their weights, adding up to 100%: {a: 50%, b: 50%}; the first is the control. Required."
        )
    )
    share: Fraction = Field(
        default=1.0, description='Of all units, how many take part; raise it to ramp up. Default "100%".'
    )
    layer: SliceSettings | None = Field(
        default=None, description="Where it must not overlap with other experiments. Default: it may."
    )
    overrides: Annotated[Mapping[Text, Name], BeforeValidator(no_null), AfterValidator(frozen)] = Field(
        default_factory=lambda: MappingProxyType({}), description="Units that get an arm without taking part."
    )
    is_on: Flag = Field(default=True, description="false sends everybody to the control. Default true.")
    log: PathText | None = Field(
        default=None, description="Where exposures are appended, relative to this file. Default: nowhere."
    )


class AbSettings(Section):
    """A/B testing."""

    compare: CompareSettings | None = Field(default=None, description="What `modelcache ab run` compares.")
    experiments: Annotated[Mapping[Text, ExperimentSettings], BeforeValidator(no_null), AfterValidator(frozen)] = Field(
        default_factory=lambda: MappingProxyType({}), description="Experiments by name, for `Experiment.from_config`."
    )
