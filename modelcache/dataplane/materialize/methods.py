"""The materialize functions as methods of one model: of this object only, never of its class."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch

from modelcache.dataplane.loading.adapters import modules_of
from modelcache.dataplane.materialize.entry_points import materialize_meta_tensors
from modelcache.dataplane.materialize.entry_points import materialized as materialized_block

ModelT = TypeVar("ModelT")


class ModelMethod(partial[Any]):
    """A function bound to one model, kept among that model's own attributes.

    A bound method would do the same, but it cannot be unpickled inside its own object. A deep copy or a pickle of the
    model takes this along, bound to the copy. Like any bound method it keeps its model alive, so a model that has
    some is freed by the garbage collector.
    """

    @property
    def model(self) -> object:
        """The model it works on."""
        return self.args[0]

    def __repr__(self) -> str:
        return f"<{self.func.__name__} of {type(self.model).__name__}>"


def materialize(model: ModelT, device: torch.device | str | int = "cpu", **options: Any) -> ModelT:
    """Make every meta tensor of this model real; as `modelcache.materialize_meta_tensors`.

    Args:
        model: The model.
        device: Where all of it shall be.
        **options: Further arguments of `materialize_meta_tensors`.

    Returns:
        The same model.
    """
    return materialize_meta_tensors(model, device, **options)


def materialize_all(model: ModelT, device: torch.device | str | int = "cpu", **options: Any) -> ModelT:
    """Make every meta tensor of this model real and put all of it on `device`; the same as `materialize`."""
    return materialize_meta_tensors(model, device, **options)


def materialized(
    model: ModelT, device: torch.device | str | int = "cpu", **options: Any
) -> AbstractContextManager[ModelT]:
    """This model made whole for the length of a block; as `modelcache.materialized`, `on_modified` included."""
    return materialized_block(model, device, **options)


_METHODS = (materialize, materialize_all, materialized)


def add_materialize_methods(model: ModelT) -> ModelT:
    """Give one model the methods ``materialize()``, ``materialize_all(device=)`` and ``materialized()``.

    They take the further arguments of `materialize_meta_tensors` by name; ``materialized`` also `on_modified`, and it
    is for a ``with`` statement. They are attributes of this object: its class, other models and the state dict have
    nothing of it. `copy.deepcopy` and `pickle` take them along, bound to the copy (a pickle then wants modelcache where
    it is loaded). Adding them again does nothing.

    Args:
        model: A module, or a pipeline or other object that holds modules as attributes.

    Returns:
        The same object.

    Raises:
        ValueError: The model has an attribute of one of these names already. Nothing was added.
        TypeError: The object holds no modules, or takes no attributes.
    """
    refuse_taken_names(model)
    for function in _METHODS:
        found = vars(model).get(function.__name__)
        if not isinstance(found, ModelMethod) or found.model is not model:
            method = ModelMethod(function, model)
            method.__doc__ = function.__doc__
            vars(model)[function.__name__] = method
    return model


def refuse_taken_names(model: object) -> None:
    """Raise what `add_materialize_methods` would raise, and do nothing else.

    Raises:
        ValueError: As there.
        TypeError: As there.
    """
    modules_of(model)
    kind = type(model).__name__
    if not hasattr(model, "__dict__"):
        raise TypeError(
            f"an object of type {kind} takes no attributes; call modelcache.materialize_meta_tensors(model) instead"
        )
    # Asked of the object and not of its dictionary: submodules and what the class has are attributes as well.
    names = [function.__name__ for function in _METHODS]
    taken = [name for name in names if hasattr(model, name) and not isinstance(getattr(model, name), ModelMethod)]
    if taken:
        raise ValueError(
            f"{kind} already has an attribute {taken[0]!r}, which is not replaced; call "
            "modelcache.materialize_meta_tensors(model) and modelcache.materialized(model) instead"
        )
