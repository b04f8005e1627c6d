"""Put another function in the place of one of accelerate's, under every name that it was imported as."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

#: A function of accelerate called with these arguments, by name: gets the original and the call.
Around = Callable[[Callable[..., Any], inspect.BoundArguments], Any]


def wrap_everywhere(module_name: str, names: tuple[str, ...], around: Around) -> None:
    """Let calls of these functions go through `around`, in the module and in all that have imported them from it.

    Modules that are imported later find the wrappers where the functions were. A name that this version of accelerate
    does not have is left out.
    """
    module = importlib.import_module(module_name)
    for name in names:
        if function := getattr(module, name, None):
            replace_everywhere(function, _wrapper(function, around))


def _wrapper(function: Callable[..., Any], around: Around) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(function, signature.bind(*args, **kwargs))

    return wrapper


def replace_everywhere(old: object, new: object) -> None:
    """Replace an object wherever a loaded module has it under a name of its own."""
    for module, name in names_of(old):
        setattr(module, name, new)


def names_of(wanted: object) -> list[tuple[ModuleType, str]]:
    """Every loaded module that has this very object, with the name."""
    found = []
    for module in list(sys.modules.values()):
        # Modules that make their attributes on demand are not asked: only what is there already counts.
        attributes = getattr(module, "__dict__", None)
        if isinstance(attributes, dict):
            found += [(module, name) for name, value in list(attributes.items()) if value is wanted]
    return found
