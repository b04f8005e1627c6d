"""accelerate's `dispatch_model`, for a model that shall become whole again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import torch
from accelerate.utils import get_balanced_memory

from modelcache.dataplane.materialize.methods import add_materialize_methods, refuse_taken_names
from modelcache.dataplane.materialize.record import loaders_of, put_record, refuse_stale_folder, take_record

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
Place = str | int | torch.device
DeviceMap = Mapping[str, Place]

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def dispatch_model(
    model: ModuleT,
    device_map: DeviceMap | str,
    main_device: Place | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    offload_dir: str | PathLike[str] | None = None,
    offload_index: dict[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | list[str] | None = None,
    preload_module_classes: list[str] | None = None,
    force_hooks: bool = False,
    *,
    allow_materialize: bool = True,
    **further: Any,
) -> ModuleT:
    """Dispatch a model with accelerate so that `materialize_meta_tensors` can make exactly this model whole again.

    All arguments but `allow_materialize` are those of `accelerate.dispatch_model`, which does the work. Before it
    does, the model's ties are recorded, and a checksum of every weight that goes to files: a folder that accelerate
    would not rewrite, or that somebody rewrites later, is found out. The weights are read once for that. Weights that
    are on ``meta`` already have no checksum, and neither has what a given `offload_index` names.

    Args:
        model: The model.
        device_map: Where each module goes; or ``"auto"``, ``"balanced"``, ``"balanced_low_0"`` or ``"sequential"``, for
            which accelerate works out the map.
        main_device: Where everything is computed that is kept on the CPU or on disk.
        state_dict: The weights to keep on the CPU.
        offload_dir: The folder for weights on disk. Use one folder for one model.
        offload_index: Where weights on disk are already.
        offload_buffers: Whether buffers go with the parameters.
        skip_keys: Inputs that are not moved between devices.
        preload_module_classes: Classes whose weights are loaded all at once.
        force_hooks: Put hooks on the model also when all of it is on one device.
        allow_materialize: Record, and give the model `materialize`, `materialize_all` and `materialized`, as
            `add_materialize_methods` does. When false, this is `accelerate.dispatch_model`.
        **further: What a newer accelerate takes.

    Returns:
        The same object.

    Raises:
        MaterializeError: `offload_dir` already holds other weights. The model is as it was.
        ValueError: The model has an attribute of such a name already, `device_map` is an unknown word, or accelerate
            refuses the arguments.
    """
    places = _worked_out(model, device_map) if isinstance(device_map, str) else dict(device_map)
    arguments: dict[str, Any] = {
        "device_map": places,
        "main_device": main_device,
        "state_dict": state_dict,
        "offload_dir": offload_dir,
        "offload_index": offload_index,
        "offload_buffers": offload_buffers,
        "skip_keys": skip_keys,
        "preload_module_classes": preload_module_classes,
        "force_hooks": force_hooks,
        **further,
    }
    if not allow_materialize:
        accelerate.dispatch_model(model, **arguments)
        return model
    refuse_taken_names(model)
    is_stored_by_us = offload_dir is not None and offload_index is None
    record = take_record(model, _names_for_disk(model, places) if is_stored_by_us else ())
    if offload_dir is not None:
        refuse_stale_folder(Path(offload_dir), record)
    known = loaders_of(model)
    accelerate.dispatch_model(model, **arguments)
    for loader in loaders_of(model):
        if not any(loader is other for other in known):
            put_record(loader, record)
    return add_materialize_methods(model)


def _worked_out(model: torch.nn.Module, word: str) -> dict[str, Place]:
    if word not in _AUTOMATIC:
        raise ValueError(f"device_map must be a mapping or one of {', '.join(map(repr, _AUTOMATIC))}, not {word!r}")
    whole: Any = {"no_split_module_classes": list(getattr(model, "_no_split_modules", None) or ())}
    if word != "sequential":
        whole["max_memory"] = get_balanced_memory(model, low_zero=word == "balanced_low_0", **whole)
    places: dict[str, Place] = accelerate.infer_auto_device_map(model, **whole)
    return places


def _names_for_disk(model: torch.nn.Module, places: Mapping[str, Place]) -> Sequence[str]:
    """The names that accelerate stores: all of the state dict below a module that goes to disk."""
    on_disk = [path for path, place in places.items() if place == "disk"]
    return [name for name in model.state_dict() if any(name == path or name.startswith(f"{path}.") for path in on_disk)]
