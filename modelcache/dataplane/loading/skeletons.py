"""Models on ``meta`` that only lack their bytes, and whether they are what an ordinary load would have made.

Nothing global is patched: `torch.device` is a mode of the calling thread, and dtypes are put right afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelcache.dataplane.image import View, WeightImage
from modelcache.dataplane.inventory import group, walk
from modelcache.dataplane.loading.adapters import modules_of
from modelcache.dataplane.process_lock import process_lock

#: Held while a library or a model class builds a model. transformers changes torch's default dtype and `torch.linspace`
#: for the whole process while it does (transformers#40357, #41782): a model built beside it would take its dtype, and
#: what two change at once stays changed.
one_builder = process_lock()
# What loading leaves on modules, and building does not.
_MARKS = frozenset({"_is_hf_initialized"})
_PLAIN = (str, int, float, complex, bool, bytes, type(None), torch.dtype, torch.device, torch.Size)


class UnlikeError(Exception):
    """In what a skeleton differs from the model that an image was made of. Stays inside the data plane."""


def on_meta(make: Callable[[], object]) -> object | None:
    """The model on ``meta``, or `None` if it cannot be built there."""
    try:
        with one_builder, torch.device("meta"):
            model = make()
        modules = modules_of(model).values()
    except Exception:  # a constructor that computes with values fails on meta in its own way; it is built for real
        return None
    # A tensor that is a plain attribute is in no file and nobody would ever fill it.
    stray = any(
        isinstance(value, torch.Tensor) and value.is_meta
        for root in modules
        for module in root.modules()
        for held in vars(module).values()
        for value in (held if isinstance(held, (list, tuple)) else (held,))
    )
    return None if stray else model


def transformers_skeleton(model_class: Any, folder: Path, about: Mapping[str, Any]) -> nn.Module | None:
    """A model of transformers as `from_pretrained` makes it, without its bytes; dtypes may still be others.

    Args:
        model_class: Of the model, no ``Auto`` class.
        folder: Of the model; its configuration is read.
        about: What `facts_of` said of the model.
    """
    config = model_class.config_class.from_pretrained(str(folder), local_files_only=True)
    config.name_or_path = str(folder)
    _set_dtype(config, None if about["dtype"] is None else getattr(torch, about["dtype"]))
    model = on_meta(lambda: model_class(config))
    if not isinstance(model, nn.Module):
        return None
    frozen = frozenset(about["frozen"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    _finish(model.eval(), folder, frozenset(about["conversions"]))
    return model


def _finish(model: Any, folder: Path, used: frozenset[str]) -> None:
    """What `from_pretrained` does with a model beside filling it."""
    model.set_use_kernels(False)
    if hasattr(model, "adjust_generation_fn") and model.can_generate():
        places = dict.fromkeys(("cache_dir", "proxies", "token"))
        flags = {"force_download": False, "local_files_only": True, "trust_remote_code": False}
        model.adjust_generation_fn(None, False, None, str(folder), revision="main", subfolder="", **places, **flags)
    with contextlib.suppress(ImportError):  # versions that keep no account of it
        from transformers.conversion_mapping import get_model_conversion_mapping

        # For saving it: under which names its tensors were in the files.
        model._weight_conversions = [
            each for each in get_model_conversion_mapping(model) if _conversion_print(each) in used
        ]


def facts_of(model: Any) -> dict[str, object]:
    """What must be known of a model of transformers to build it again, and to tell whether it became the same."""
    dtype = getattr(model.config, "dtype", None)
    return {
        "class": type(model).__name__,
        "dtype": str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None,
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "conversions": [_conversion_print(each) for each in getattr(model, "_weight_conversions", None) or ()],
        "object": object_print(model),
    }


def take_layout(model: object, image: WeightImage, views: Sequence[Mapping[str, View]]) -> None:
    """Give the tensors of a skeleton the dtypes and strides of an image, and see whether it fills all of them.

    Raises:
        UnlikeError: A tensor, a tie or the order of the tensors is not as in the image.
    """
    wanted = {name: view for each in views for name, view in each.items()}
    done: set[int] = set()
    for slot in walk(modules_of(model)).slots:
        view = wanted.get(slot.name)
        if view is None or not slot.tensor.is_meta or view.shape != tuple(slot.tensor.shape):
            raise UnlikeError(f"{slot.name!r} is not in the image in that shape")
        if id(slot.tensor) not in done:
            done.add(id(slot.tensor))
            if View.of(slot.tensor, view.offset_bytes) != view:
                slot.tensor.data = torch.empty_strided(view.shape, view.stride, dtype=view.dtype, device="meta")
    if not has_layout(model, image, views):
        raise UnlikeError("its tensors share memory in another way than in the image, or come in another order")


def has_layout(model: object, image: WeightImage, views: Sequence[Mapping[str, View]]) -> bool:
    """Whether a model will be laid out as an image is: the same tensors, as they are, in the same order."""
    return layout_of(model) == [(place.size_bytes, each) for place, each in zip(image.storages, views, strict=True)]


def layout_of(model: object) -> list[tuple[int, Mapping[str, View]]]:
    """The storages of a model as it will be laid out: size, and the tensors over it."""
    return [
        (storage.size_bytes, {reader.slot.name: reader.view for reader in storage.readers})
        for storage in group(walk(modules_of(model)).slots)
    ]


def object_print(model: Any) -> str:
    """A digest of everything of a model but its bytes: configurations, modules, their plain attributes."""
    digest = hashlib.sha256()
    for fact in _facts(model):
        digest.update(repr(fact).encode())
    return digest.hexdigest()


def _facts(model: Any) -> Iterator[object]:
    for name in ("config", "generation_config"):
        config = getattr(model, name, None)
        yield name, None if config is None else config.to_json_string(use_diff=False)
    yield [_conversion_print(each) for each in getattr(model, "_weight_conversions", None) or ()]
    for name, module in model.named_modules(remove_duplicate=False):
        yield name, type(module).__module__, type(module).__qualname__, sorted(module._non_persistent_buffers_set)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield key, None if tensor is None else (type(tensor).__qualname__, tensor.requires_grad)
        for key, value in sorted(vars(module).items()):
            if key not in _MARKS:
                yield key, _known_of(value)


def _known_of(value: object, depth: int = 0) -> object:
    """What can be compared of an attribute: plain values, and the types of all others."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if depth < 4 and type(value) in (list, tuple, dict, set, frozenset):
        if isinstance(value, dict):
            return [(repr(key), _known_of(each, depth + 1)) for key, each in value.items()]
        known = [_known_of(each, depth + 1) for each in value]  # type: ignore[attr-defined]
        return sorted(map(repr, known)) if isinstance(value, (set, frozenset)) else known
    return type(value).__module__, type(value).__qualname__


def _conversion_print(conversion: Any) -> str:
    return repr((type(conversion).__qualname__, conversion.source_patterns, conversion.target_patterns))


def _set_dtype(config: Any, dtype: torch.dtype | None) -> None:
    config.dtype = dtype
    for name in getattr(config, "sub_configs", ()):
        inner = getattr(config, name, None)
        if inner is not None:
            inner.dtype = dtype
