"""Which models there are: name -> `ModelSpec`, and from what people write to a spec."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, TypeVar

from modelcache.errors import UnknownModelError
from modelcache.spec import (
    LoaderSpec,
    ModelSpec,
    OnWrite,
    Priority,
    check_loader,
    check_name,
    did_you_mean,
    is_entry,
    option_problems,
)
from modelcache.tier import Tier
from modelcache.units import parse_bytes, parse_duration

E = TypeVar("E", Tier, Priority, OnWrite)
Reader = Callable[[str, object], object]
_NO_OPTIONS: Mapping[str, object] = MappingProxyType({})


class Registry:
    """Registered models by name, in the order they came. A look-up of a known name costs one dictionary access."""

    def __init__(self) -> None:
        self._specs: dict[str, ModelSpec] = {}

    def add(self, spec: ModelSpec) -> None:
        """Register a model.

        Raises:
            ValueError: The name is taken.
        """
        # One step, so that of two threads with the same name one is told.
        held = self._specs.setdefault(spec.name, spec)
        if held is not spec:
            raise ValueError(
                f"{spec.name!r} is registered already, with the loader {held.loader}; unregister it first or choose "
                "another name"
            )

    def get(self, name: str) -> ModelSpec:
        """The spec of a model.

        Raises:
            UnknownModelError: It is not registered.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise self.unknown(name)
        return spec

    def remove(self, name: str) -> None:
        """Forget a model.

        Raises:
            UnknownModelError: It is not registered.
        """
        if self._specs.pop(name, None) is None:
            raise self.unknown(name)

    def names(self) -> tuple[str, ...]:
        """Every name, in the order they came."""
        return tuple(self._specs)

    def unknown(self, name: object) -> UnknownModelError:
        """The error about a name that nobody registered, with the nearest ones."""
        # Of a copy: other threads register meanwhile.
        matches = get_close_matches(str(name)[:64], self.names(), n=3)
        return UnknownModelError(str(name), tuple(matches), len(self._specs))


def build_spec(name: str, loader: object = None, **options: object) -> ModelSpec:
    """A spec from what `ModelCache.register` is given.

    Raises:
        ValueError: A name, loader or value that cannot be used; the message says what to write.
        TypeError: A value of the wrong type.
    """
    check_name(name)
    for_spec = {key: options.pop(key) for key in _READERS if key in options}
    read: dict[str, Any] = {key: _READERS[key](key, value) for key, value in for_spec.items() if value is not None}
    return ModelSpec(
        name=name,
        loader=_loader(loader, options),
        size_bytes=read.get("size"),
        workspace_bytes=read.get("workspace", 0),
        pin=read.get("pin"),
        priority=read.get("priority", Priority.NORMAL),
        idle_s=read.get("idle"),
        concurrency=read.get("concurrency"),
        reload=read.get("reload", False),
        on_write=read.get("on_write", OnWrite.WRITEBACK),
    )


def _loader(loader: object, options: Mapping[str, object]) -> LoaderSpec:
    if loader is None and options.get("model") is not None:
        loader = "safetensors"
    if isinstance(loader, str):
        check_loader(loader)
        # Python values for a constructor, which a configuration file does not have.
        given = [option for option in options if (loader, option) != ("safetensors", "model_args")]
        problems = option_problems(loader, given)
        if problems:
            raise ValueError("; ".join(f"{option} {problem}" for option, problem in problems))
        if is_entry(loader):
            return LoaderSpec(entry=loader)
        return LoaderSpec(kind=loader, options=MappingProxyType(dict(options)))
    if not callable(loader):
        raise TypeError(
            "a loader is a callable without arguments, a named loader such as 'transformers', or "
            f"'package.module:function'; got {type(loader).__name__}"
        )
    if options:
        key = next(iter(options))
        raise TypeError(f"register() takes no option {key!r} with a callable{did_you_mean(key, _READERS)}")
    return LoaderSpec(call=loader, options=_NO_OPTIONS)


def _size(key: str, value: object) -> int:
    if isinstance(value, str):
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    size = _integer(key, value, 'bytes, or text such as "3GiB"')
    if size < 0 or (size == 0 and key == "size"):
        raise ValueError(f"{key}: must be greater than 0, got {size}")
    return size


def _idle(key: str, value: object) -> float | None:
    if isinstance(value, str):
        try:
            return parse_duration(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f'{key}: must be a duration such as "10m", "never", or seconds above 0, got {value!r}')
    return float(value)


def _concurrency(key: str, value: object) -> int:
    if value == "unlimited":
        return 0
    count = _integer(key, value, 'leases at a time, or "unlimited"')
    if count < 0:
        raise ValueError(f"{key}: must not be negative, got {count}")
    return count


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{key}: must be True or False, got {value!r}")
    return value


def _integer(key: str, value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key}: must be {what}, got {value!r}")
    return value


def _one_of(members: Iterable[E]) -> Reader:
    known = {str(member): member for member in members}

    def read(key: str, value: object) -> E:
        member = known.get(str(value))
        if member is None:
            choices = ", ".join(map(repr, known))
            raise ValueError(f"{key}: must be one of {choices}, got {value!r}{did_you_mean(str(value), known)}")
        return member

    return read


_READERS: dict[str, Reader] = {
    "size": _size,
    "workspace": _size,
    "pin": _one_of((Tier.VRAM, Tier.RAM)),
    "priority": _one_of(tuple(Priority)),
    "idle": _idle,
    "concurrency": _concurrency,
    "reload": _flag,
    "on_write": _one_of(tuple(OnWrite)),
}
