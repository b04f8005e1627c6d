"""From a registration to an object: callables, ``"pkg.module:function"`` strings, and the named loaders.

Here is also the loader ``safetensors``, for a class of the user's own and a file of weights. The loaders for model
folders are in `folder_loaders.py`. Everything runs outside `inference_mode`, whatever the calling thread is in: tensors
made inside it could not be written later.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelcache.dataplane.files.weight_files import torch_dtype
from modelcache.dataplane.images.kept import KeptImages
from modelcache.dataplane.images.origin import Origin
from modelcache.dataplane.loading.adapters import handle_in, modules_of, named_tensors, refusal
from modelcache.dataplane.loading.folder_loaders import (
    calling_library,
    dtype_option,
    load_sentence_transformers,
    load_transformers,
)
from modelcache.dataplane.loading.matching import shown
from modelcache.dataplane.loading.skeletons import has_layout, layout_of, on_meta
from modelcache.dataplane.loading.source import Built, Keepable, Source
from modelcache.dataplane.loading.weights import JoinedSource, KeptSource, RebuildSource, SafetensorsSource
from modelcache.errors import LoaderError, WeightsError
from modelcache.headers import Header, TensorEntry, model_headers
from modelcache.spec import ModelSpec, did_you_mean, is_entry, option_problems

_log = logging.getLogger("modelcache.dataplane")

_KEPT_BYTES = 1 << 20  # computed buffers up to this size are kept, so that a reload need not build the model


def build(spec: ModelSpec, kept: KeptImages | None = None) -> Built:
    """Make the object that a registration describes, once; its bytes may be those of a kept image.

    Raises:
        LoaderError: The loader cannot be imported, raised, or returned something that cannot be cached.
        WeightsError: A weight file is missing, damaged or of an unsupported kind.
    """
    loader = spec.loader
    with torch.inference_mode(mode=False):
        if loader.kind is None:
            return _from_call(spec, loader.call if loader.call is not None else resolve(spec, str(loader.entry)))
        if loader.kind not in _KINDS:
            raise _error(spec, f"is not one of {', '.join(_KINDS)}, and has no ':' that would name a function")
        # `model_args` are Python values for a constructor, so a configuration file does not have them.
        given = [option for option in loader.options if (loader.kind, option) != ("safetensors", "model_args")]
        for option, problem in option_problems(loader.kind, given):
            raise _error(spec, f"was given options it cannot use: {option!r} {problem}")
        built = _KINDS[loader.kind](spec, loader.options, kept)
        _check_movable(spec, built.model)
        return built


def resolve(spec: ModelSpec, entry: str) -> Any:
    """Import what ``"pkg.module:name"`` names; the name may have dots.

    Raises:
        LoaderError: The text has another form, or there is no such module or name.
    """
    module_name, _, path = entry.partition(":")
    if not is_entry(entry):
        raise _error(spec, f"is {entry!r}, which is not of the form 'pkg.module:function'")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise _error(spec, f"cannot be imported: no module {missing!r} (is its folder on PYTHONPATH?)") from None
        raise _error(spec, f"cannot be imported: {module_name} needs the module {missing!r}") from error
    except Exception as error:  # importing runs the user's module, which may raise anything
        raise _error(spec, f"raised {type(error).__name__} when {module_name} was imported: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            hint = did_you_mean(part, [name for name in dir(found) if not name.startswith("_")])
            raise _error(spec, f"cannot be imported: {module_name} has no {path!r}{hint}")
        found = getattr(found, part)
    return found


def _from_call(spec: ModelSpec, call: object) -> Built:
    if not callable(call):
        raise _error(spec, f"is a {type(call).__name__}, which cannot be called")
    model = _called(spec, call)
    if not spec.reload:
        return Built(model, None)
    names = frozenset(named_tensors(model))
    source = RebuildSource(lambda: _called(spec, call), names, model_name=spec.name, loader=str(spec.loader))
    return Built(model, source)


def _called(spec: ModelSpec, call: Callable[..., object]) -> object:
    with torch.inference_mode(mode=False):
        try:
            model = call()
        except Exception as error:  # the user's code may raise anything; the cause is kept
            raise _error(spec, f"raised {type(error).__name__}: {error}") from error
    if model is None:
        raise _error(spec, "returned None; return the model")
    _refuse_handle(spec, model)  # before anything asks it a question, which it would pass on to its model
    if inspect.iscoroutine(model) or inspect.isasyncgen(model) or inspect.isgenerator(model):
        if inspect.iscoroutine(model):
            model.close()  # it will never run, and would warn about that
        raise _error(spec, f"returned a {type(model).__name__}; loaders are plain functions, run in a thread of ours")
    _check_movable(spec, model)
    return model


def _refuse_handle(spec: ModelSpec, model: object) -> None:
    place = handle_in(model)
    if place is not None:
        where = f" (at {place})" if place else ""
        raise _error(spec, f"returned the handle of a registered model{where}; return the model itself")


def _check_movable(spec: ModelSpec, model: object) -> None:
    """Refuse now what could not be moved later.

    Raises:
        LoaderError: The object cannot be adapted, cannot be moved, or was never loaded.
    """
    try:
        reason = refusal(model)
    except TypeError as error:
        raise _error(spec, f"returned something that cannot be cached: {error}") from None
    if reason is not None:
        raise _error(spec, f"returned a model that cannot be moved: {reason}")
    if spec.loader.kind is None:
        empty = [name for name, tensor in named_tensors(model).items() if tensor.is_meta]
        if empty and not _has_hooks(model):
            raise _error(spec, f"left tensors on meta, without data: {shown(empty)}; load their weights as well")


def _has_hooks(model: object) -> bool:
    """Whether accelerate's hooks could have the data of tensors on meta; whether they do is for `materialize`."""
    return any("_hf_hook" in module.__dict__ for root in modules_of(model).values() for module in root.modules())


def load_safetensors(spec: ModelSpec, options: Mapping[str, object], kept: KeptImages | None = None) -> Built:
    """Build a class of the user's and take its weights from safetensors files, under the names of its `state_dict`.

    Options: `model`, a class, a function, a transformers configuration, an object with a `build` method, or the
    ``"pkg.module:name"`` of one; `weights`, a file or folder; `model_args`, keyword arguments for it; `dtype`.
    Floating-point tensors have the dtype of the file unless `dtype` says otherwise.

    The model is first built on ``meta``, which costs neither memory nor time. If the files have every tensor, it stays
    there: the source writes the bytes where they are needed. Otherwise some buffers are computed when the model is
    built, so it is built once more on the CPU and filled in place. Nothing global is patched for this.

    Raises:
        LoaderError: An option is wrong, or building the model raised.
        WeightsError: The files are missing or damaged, or lack a parameter or persistent buffer of the model.
    """
    weights = options.get("weights")
    if not isinstance(weights, (str, Path)) or not str(weights):
        raise _error(spec, "needs the option weights, a safetensors file or the folder of several")
    make = _factory(spec, options)
    headers = model_headers(Path(weights).expanduser(), name=spec.name)
    entries = {key: entry for header in headers for key, entry in header.tensors.items()}

    def make_real() -> object:
        with torch.device("cpu"):
            return calling_library(spec, make)

    model = on_meta(make)
    if model is None:
        model = make_real()
    where, computed = _match_exactly(spec, model, entries, weights)
    if computed and any(tensor.is_meta for tensor in computed.values()):
        model = make_real()
        where, computed = _match_exactly(spec, model, entries, weights)
    _take_dtypes(model, {name: entries[key] for name, key in where.items()}, dtype_option(spec, options))
    files = SafetensorsSource(headers, where, model_name=spec.name)
    targets = {name: tensor for name, tensor in named_tensors(model).items() if name in where and not tensor.is_meta}
    files.fill(_unique(targets))
    for module in modules_of(model).values():
        module.eval()
    if unused := entries.keys() - set(where.values()):
        _log.warning("weights not used model=%s file=%s tensors=%s", spec.name, files.describe(), shown(unused))
    source = _with_computed(spec, files, computed, make_real)
    return Built(model, source, None if kept is None else _keepable(spec, model, entries, where, headers, kept))


def _keepable(
    spec: ModelSpec,
    model: object,
    entries: Mapping[str, TensorEntry],
    where: Mapping[str, str],
    headers: Sequence[Header],
    kept: KeptImages,
) -> Keepable | None:
    """An image spares the conversion of a model that has another dtype than its files; others are as quickly read."""
    tensors = named_tensors(model)
    converts = any(torch_dtype(entries[key]) != tensors[name].dtype for name, key in where.items())
    if not converts or not all(tensor.is_meta and tensor.numel() for tensor in tensors.values()):
        return None
    # In their order: a class of the same name may lay its tensors out in another way by now.
    layout = [
        [
            (name, where.get(name), str(view.dtype), view.shape, view.stride, view.offset_bytes)
            for name, view in views.items()
        ]
        for _, views in layout_of(model)
    ]
    facts = {"loader": "safetensors", "layout": layout, "segment": kept.segment_bytes}
    try:
        origin = Origin.of(facts, [header.path for header in headers])
    except OSError as error:
        _log.warning("no image of model=%s is kept or used: %s", spec.name, error)
        return None
    found = kept.find(origin)
    if found is not None and not has_layout(model, found.image, found.views):
        _log.warning("%s is not used for model=%s: it has another layout", found.file.path, spec.name)
        return None
    # There is nothing to try before one is written: the model that it is written of began on meta as well.
    return Keepable(origin, {}, lambda _image, _views: model, found)


def _with_computed(
    spec: ModelSpec, files: SafetensorsSource, computed: Mapping[str, torch.Tensor], make_real: Callable[[], object]
) -> Source:
    if not computed:
        return files
    if sum(tensor.numel() * tensor.dtype.itemsize for tensor in computed.values()) <= _KEPT_BYTES:
        return JoinedSource([files, KeptSource(computed)])
    again = RebuildSource(make_real, frozenset(computed), model_name=spec.name, loader=str(spec.loader))
    return JoinedSource([files, again])


def _factory(spec: ModelSpec, options: Mapping[str, object]) -> Callable[[], object]:
    model, arguments = options.get("model"), options.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise _error(spec, f"has model_args that are a {type(arguments).__name__}, not names and values")
    if isinstance(model, str):
        model = resolve(spec, model)
    if isinstance(model, nn.Module):
        raise _error(spec, "has a model that is already built; give its class, or register a function that returns it")
    made_by_library = type(model).__module__.startswith("transformers.") and hasattr(model, "architectures")
    if made_by_library and not isinstance(model, type):
        return lambda: _from_transformers_config(model)
    if callable(model):
        return lambda: model(**arguments)
    if callable(method := getattr(model, "build", None)):
        return lambda: method(**arguments)
    raise _error(spec, "needs the option model: a class, a configuration with a build method, or 'pkg.module:Class'")


def _from_transformers_config(config: Any) -> object:
    import transformers

    named = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    return named.from_config(config) if named is transformers.AutoModel else named._from_config(config)


def _match_exactly(
    spec: ModelSpec, model: object, entries: Mapping[str, TensorEntry], weights: object
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Full name -> key for what the files have, under all names of a tied tensor; and the buffers they lack."""
    where: dict[str, str] = {}
    computed: dict[str, torch.Tensor] = {}
    missing: list[str] = []
    for names, tensor, is_optional in _tied_groups(model):
        key = next((name for name in names if name in entries), None)
        if key is None:
            if is_optional:
                computed.update(dict.fromkeys(names, tensor))
            else:
                missing.append(names[0])
        elif entries[key].shape != tuple(tensor.shape):
            problem = f"has shape {list(entries[key].shape)} in the file, but the model wants {list(tensor.shape)}."
            raise WeightsError(spec.name, str(weights), problem, key)
        else:
            where.update(dict.fromkeys(names, key))
    if missing:
        extra = shown(entries.keys() - set(where.values())) or "no others"
        problem = f"lacks tensors of the model: {shown(missing)}. It has instead: {extra}. Check model and weights."
        raise WeightsError(spec.name, str(weights), problem)
    return where, computed


def _tied_groups(model: object) -> Iterator[tuple[list[str], torch.Tensor, bool]]:
    """All names of each tensor object, the tensor, and whether files need not have it (a non-persistent buffer)."""
    names: dict[int, list[str]] = {}
    tensors = named_tensors(model)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    optional: set[int] = set()
    for root in modules_of(model).values():
        for module in root.modules():
            optional |= {id(module._buffers[name]) for name in module._non_persistent_buffers_set}
    for identity, group in names.items():
        yield group, tensors[group[0]], identity in optional


def _take_dtypes(model: object, entries: Mapping[str, TensorEntry], dtype: torch.dtype | None) -> None:
    """Give every floating-point tensor of the files the dtype it will have: `dtype`, or its own in the file."""
    made: dict[int, torch.Tensor] = {}
    for name, tensor in named_tensors(model).items():
        stored = torch_dtype(entries[name]) if name in entries else None
        if stored is None or not (stored.is_floating_point and tensor.is_floating_point()):
            continue
        wanted = dtype or stored
        if wanted != tensor.dtype and id(tensor) not in made:
            made[id(tensor)] = tensor
            tensor.data = torch.empty_like(tensor, dtype=wanted)


def _unique(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict({id(tensor): (name, tensor) for name, tensor in tensors.items()}.values())


def _error(spec: ModelSpec, problem: str) -> LoaderError:
    return LoaderError(spec.name, str(spec.loader), problem)


_Load = Callable[[ModelSpec, Mapping[str, object], KeptImages | None], Built]
_KINDS: Mapping[str, _Load] = {
    "transformers": load_transformers,
    "sentence-transformers": load_sentence_transformers,
    "safetensors": load_safetensors,
}
