"""The settings: every key with its unit, its default and what it means. Frozen, plain values.

Paths are as written; `load.py` resolves them. Budgets stay unresolved (`Size`) until `budgets.resolve_budgets` is told
what the machine has.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema

from modelcache.config import values
from modelcache.config.ab_settings import AbSettings
from modelcache.config.fields import (
    DEVICE_JSON,
    LOADER_JSON,
    Budget,
    Bytes,
    Concurrency,
    Count,
    Flag,
    Idle,
    Name,
    OptionalBudget,
    PathText,
    Rate,
    Section,
    Segment,
    Text,
    frozen,
    no_null,
    no_null_list,
    words_json,
)
from modelcache.config.values import NOTHING, Auto
from modelcache.spec import LOADER_KINDS, OnWrite, Priority
from modelcache.tier import Tier

ROUNDINGS = ("exact", "512", "2MiB", "power_of_two")
MEMORIES = ("allocated", "mapped")


class BudgetSettings(Section):
    """Bytes each tier may hold. Hard: never exceeded at any instant.

    A size is absolute ("20GiB", "20GB"), a share ("80%": of the total of the device or container, less what others
    hold, resolved once at start) or "auto".
    """

    vram: Budget = Field(
        default_factory=Auto,
        description='VRAM. A size, a share of the device, or "auto": 80%. On a host-only machine it is not used.',
    )
    ram: Budget = Field(
        default_factory=Auto,
        description='RAM. A size, a share of the machine or container, or "auto": 50%.',
    )
    page_locked: OptionalBudget = Field(
        default_factory=Auto,
        description=(
            "How much of the RAM budget may be page-locked, which makes copies fast but is taken from the whole "
            'machine. A size, a share of RAM, "none", or "auto": half of the RAM budget.'
        ),
    )
    ram_spare: OptionalBudget = Field(
        default_factory=Auto,
        description=(
            "How much of the RAM budget is kept mapped and touched ahead of the next load, so that it does not wait "
            'for memory. A size, a share of RAM, "none", or "auto": one segment, or nothing where that is more than '
            "1/32 of the RAM budget."
        ),
    )
    disk: OptionalBudget = Field(
        default_factory=lambda: NOTHING,
        description=(
            "Image files: of models that cannot be read again, and of those that load slowly, for the next start. A "
            'size, a share of the free disk, "auto": 50%, or "none" (the default): nothing is spilled or kept.'
        ),
    )


class PolicySettings(Section):
    """What goes first, and when."""

    evict: Annotated[str, PlainValidator(values.one_of("lru", "cost")), WithJsonSchema(words_json("lru", "cost"))] = (
        Field(
            default="lru",
            description=(
                'Which model gives up room first: "lru" (default, least recently used) or "cost" (age times size).'
            ),
        )
    )
    idle: Idle = Field(
        default=None,
        description='Park a model after this long without use: "10m", "1m30s", or "never" (default).',
    )
    when_full: Annotated[
        str, PlainValidator(values.one_of("wait", "reject")), WithJsonSchema(words_json("wait", "reject"))
    ] = Field(
        default="wait",
        description='When every model that could make room is in use: "wait" (default) or "reject" at once.',
    )
    pressure: Annotated[
        str, PlainValidator(values.one_of("off", "watch")), WithJsonSchema(words_json("off", "watch"))
    ] = Field(
        default="off",
        description=(
            'When memory gets short while the cache runs: "off" (default), budgets stay as they are; or "watch": '
            "the control group, stalls (PSI) and the device's other users are looked at each second, the budgets "
            "of RAM and VRAM are lowered so that idle models give room, and raised again after a quiet while, "
            "never above what was configured."
        ),
    )


class SimulatedSettings(Section):
    """The accelerator in plain memory, for trying out a configuration without a GPU. Read with `device: simulated`."""

    capacity: Bytes = Field(default=8 << 30, description='Memory of the device, a size. Default "8GiB".')
    link: Rate = Field(default=8_000_000_000, description='Speed of the link to it, bytes per second. Default "8GB/s".')
    rounding: Annotated[str, PlainValidator(values.one_of(*ROUNDINGS)), WithJsonSchema(words_json(*ROUNDINGS))] = Field(
        default="exact",
        description=(
            'What its allocator takes for a request: "exact" (default), "512" or "2MiB" (the next multiple), or '
            '"power_of_two".'
        ),
    )


class ModelSettings(Section):
    """One model: how it is loaded, and how it is kept."""

    loader: Annotated[str, PlainValidator(values.read_loader), WithJsonSchema(LOADER_JSON)] = Field(
        description=(
            f'{", ".join(LOADER_KINDS)}, or "package.module:function": your own, imported when first used. Required.'
        ),
    )
    path: PathText | None = Field(
        default=None,
        description="Folder of the model, relative to this file. For transformers and sentence-transformers.",
    )
    model: Text | None = Field(
        default=None,
        description=(
            'The class. For safetensors "package.module:Class"; for transformers the name of one of its classes, such '
            "as AutoModelForCausalLM (default: the architecture that its config.json names)."
        ),
    )
    weights: PathText | None = Field(
        default=None,
        description="A safetensors file or a folder of them, relative to this file. For the loader safetensors.",
    )
    task: Text | None = Field(
        default=None,
        description=(
            'For transformers: build a pipeline for this task, such as "text-generation". Default: the bare model.'
        ),
    )
    dtype: Annotated[str | None, PlainValidator(values.read_dtype), WithJsonSchema(words_json(*values.DTYPES))] = Field(
        default=None,
        description=f"Type of the weights: {', '.join(values.DTYPES)}. Default: as the loader decides.",
    )
    size: Bytes | None = Field(
        default=None,
        description=(
            "Weights and buffers, a size, if you know it: with it the first load is planned like any other. "
            "A loader of your own is called even if they exceed the VRAM budget: it may dispatch them. "
            "Default: read from the files' headers, or measured by the first load."
        ),
    )
    workspace: Bytes | None = Field(
        default=None,
        description="What it needs beside its weights while it runs (activations, KV cache), a size. Default: nothing.",
    )
    pin: Annotated[
        Tier | None,
        PlainValidator(values.member_of((Tier.VRAM, Tier.RAM))),
        WithJsonSchema(words_json("vram", "ram")),
    ] = Field(
        default=None,
        description='Never give it up from this tier: "vram" or "ram". Default: not pinned.',
    )
    priority: Annotated[
        Priority,
        PlainValidator(values.member_of(tuple(Priority))),
        WithJsonSchema(words_json(*map(str, Priority))),
    ] = Field(
        default=Priority.NORMAL,
        description='"low" copies go before "normal" (default), those before "high".',
    )
    idle: Idle = Field(
        default=None,
        description='Park it after this long without use: "10m", or "never". Default: policy.idle.',
    )
    concurrency: Concurrency | None = Field(
        default=None,
        description='Leases at a time, or "unlimited". Default: 1 for pipelines, unlimited for modules.',
    )
    reload: Flag = Field(
        default=False,
        description="The loader may be called again to read the weights again, and gives the same bits. Default false.",
    )
    on_write: Annotated[
        OnWrite,
        PlainValidator(values.member_of(tuple(OnWrite))),
        WithJsonSchema(words_json(*map(str, OnWrite))),
    ] = Field(
        default=OnWrite.WRITEBACK,
        description=(
            'Weights that were written to are given up only after a "writeback" (default); or the eviction is '
            'a "refuse"d, or the writes are "discard"ed.'
        ),
    )


class Settings(Section):
    """A whole configuration."""

    version: Annotated[int, PlainValidator(values.read_version), WithJsonSchema({"const": 1})] = Field(
        default=1, description="Version of this format. Default 1."
    )
    device: Annotated[str, PlainValidator(values.read_device), WithJsonSchema(DEVICE_JSON)] = Field(
        default="auto",
        description=(
            "Where models run: cuda:N, simulated (no GPU needed), host_only (RAM is the top tier), or auto (default): "
            "cuda:0 if there is one, host_only if not."
        ),
    )
    memory: Annotated[str, PlainValidator(values.one_of(*MEMORIES)), WithJsonSchema(words_json(*MEMORIES))] = Field(
        default="allocated",
        description=(
            'How models get memory of the device: "allocated" (default) anew each time, or "mapped" below addresses '
            "that they keep for life, which CUDA graphs and compiled models need. On CUDA that takes the package "
            "cuda-bindings. On a host-only machine it is not used."
        ),
    )
    budgets: Annotated[BudgetSettings, BeforeValidator(no_null)] = Field(
        default_factory=BudgetSettings, description="Bytes each tier may hold."
    )
    policy: Annotated[PolicySettings, BeforeValidator(no_null)] = Field(
        default_factory=PolicySettings, description="Which models give up room, and when."
    )
    preload: Annotated[tuple[Name, ...], BeforeValidator(no_null_list)] = Field(
        default=(), description="Models to bring up at start, in this order. Default: none."
    )
    roots: Annotated[tuple[PathText, ...], BeforeValidator(no_null_list)] = Field(
        default=(),
        description=(
            "Folders that models may be read from, beside the folder of this file. Relative to this file. "
            "Default: none."
        ),
    )
    image_dir: PathText | None = Field(
        default=None,
        description="Folder for image files (budgets.disk), relative to this file. Default: the user's cache folder.",
    )
    segment: Segment = Field(
        default=64 << 20, description='Unit of moving, a size, a multiple of 512 bytes. Default "64MiB".'
    )
    max_waiters: Count = Field(
        default=512, description="Callers that may wait at a time; one more is refused. Default 512."
    )
    lease_sites: Flag = Field(
        default=False,
        description="Remember where each lease was taken, for messages. Makes a hit slower. Default false.",
    )
    progress: Flag = Field(
        default=True,
        description="Show a bar for loads and moves of more than 2 s, on a terminal or in a notebook. Default true.",
    )
    simulated: Annotated[SimulatedSettings, BeforeValidator(no_null)] = Field(
        default_factory=SimulatedSettings, description="The simulated device; read with device: simulated."
    )
    models: Annotated[Mapping[Name, ModelSettings], BeforeValidator(no_null), AfterValidator(frozen)] = Field(
        default_factory=lambda: MappingProxyType({}), description="The models, by name."
    )
    ab: Annotated[AbSettings, BeforeValidator(no_null)] = Field(
        default_factory=AbSettings, description="Comparisons and experiments, see modelcache.ab. Default: none."
    )
