"""The named loaders for model folders: ``transformers`` and ``sentence-transformers``.

A folder is data from elsewhere. Only safetensors files are read, each header is checked before the library sees it, and
nothing that the folder says runs code or reaches the network: the configuration files are searched for the keys that
would (`folder_checks.py`), and the libraries are told so as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modelcache.dataplane.files.mapped import leave_to_files
from modelcache.dataplane.files.weight_files import torch_dtype
from modelcache.dataplane.image import View, WeightImage
from modelcache.dataplane.images.format import Described
from modelcache.dataplane.images.kept import KeptImages
from modelcache.dataplane.images.origin import Origin
from modelcache.dataplane.loading.adapters import modules_of, named_tensors
from modelcache.dataplane.loading.folder_checks import checked_config, checked_headers, checked_parts, refuse_changed
from modelcache.dataplane.loading.matching import Match, match_tensors
from modelcache.dataplane.loading.skeletons import (
    UnlikeError,
    facts_of,
    object_print,
    one_builder,
    take_layout,
    transformers_skeleton,
)
from modelcache.dataplane.loading.source import Built, Keepable, Source
from modelcache.dataplane.loading.weights import JoinedSource, KeptSource, RebuildSource, SafetensorsSource
from modelcache.errors import LoaderError, WeightsError
from modelcache.headers import Header, listing
from modelcache.spec import ModelSpec

_log = logging.getLogger("modelcache.dataplane")

# Tensors in no file are kept in memory up to this size, or this fraction of the model if that is more.
_KEPT_BYTES = 1 << 20
_KEPT_FRACTION = 0.01


def load_transformers(spec: ModelSpec, options: Mapping[str, object], kept: KeptImages | None = None) -> Built:
    """Load a transformers model, or with `task` a pipeline.

    Options: `path`, a folder; `dtype`; `task`, such as ``text-generation``; `model`, a class of
    transformers such as ``AutoModelForCausalLM``, by default the architecture that the folder's configuration names.

    Where `kept` has an image of the model, it is built without its weights, and these are read from there.

    Raises:
        LoaderError: An option is wrong, or transformers refused the folder.
        WeightsError: The folder or its weights are missing, damaged, or would run code.
    """
    folder = _folder(spec, options)
    headers = checked_headers(spec.name, folder)
    config = checked_config(spec.name, folder / "config.json")
    if options.get("task") is not None and options.get("model") is not None:
        raise _error(spec, "has both a task and a model class; a task chooses the class, leave one of them out")
    drawn: set[str] = set()

    def load() -> object:
        import transformers

        common: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        if (dtype := dtype_option(spec, options)) is not None:
            common["dtype"] = dtype
        if (task := options.get("task")) is not None:
            # The device is named because a pipeline would choose the first accelerator by itself.
            return transformers.pipeline(
                text_option(spec, "task", task),
                model=str(folder),
                device="cpu",
                model_kwargs={"use_safetensors": True},
                **common,
            )
        model_class = _model_class(spec, options, config)
        model, info = model_class.from_pretrained(str(folder), output_loading_info=True, use_safetensors=True, **common)
        drawn.update(info["missing_keys"])
        return model.eval()

    def rebuilding(names: Iterable[str]) -> RebuildSource:
        again = partial(calling_library, spec, load)
        return RebuildSource(again, frozenset(names), model_name=spec.name, loader=str(spec.loader))

    origin = None if kept is None else _origin(spec, options, folder, headers, kept)
    found = None if kept is None or origin is None else kept.find(origin)
    if kept is not None and origin is not None and found is not None:
        around = _around(spec, folder, found)
        if around is not None:
            keepable = Keepable(origin, _about(found.about), partial(_rebuild, folder, found.about), found)
            return Built(around, rebuilding(named_tensors(around)), keepable)
    model = calling_library(spec, load)
    refuse_changed(spec.name, headers)
    source, is_direct = _source(spec, model, headers, rebuilding, drawn)
    if kept is not None and origin is not None and _origin(spec, options, folder, headers, kept) != origin:
        _log.warning("%s changed while model=%s was loaded: no image of it is kept", folder, spec.name)
        origin = None
    if origin is None or source is None or is_direct or drawn or not _is_keepable(model):
        return Built(model, source)
    about = facts_of(model)
    return Built(model, source, Keepable(origin, about, partial(_rebuild, folder, about)))


def _origin(
    spec: ModelSpec, options: Mapping[str, object], folder: Path, headers: tuple[Header, ...], kept: KeptImages
) -> Origin | None:
    """What a bare model of transformers is made from; `None` if more goes into it than can be told."""
    wanted = options.get("model")
    is_foreign = wanted is not None and not isinstance(wanted, str) and not _is_of_transformers(wanted)
    if options.get("task") is not None or is_foreign or (folder / "adapter_config.json").exists():
        return None
    facts = {
        "loader": "transformers",
        "path": str(folder),
        "dtype": str(dtype_option(spec, options)),
        "model": wanted if isinstance(wanted, str) else getattr(wanted, "__name__", None),
        "segment": kept.segment_bytes,
    }
    small = {"config.json", "generation_config.json", *(path.name for path in folder.glob("*.index.json"))}
    try:
        return Origin.of(facts, [header.path for header in headers], [folder / name for name in small])
    except OSError as error:
        _log.warning("%s: no image of model=%s is kept or looked for", error, spec.name)
        return None


def _is_of_transformers(kind: object) -> bool:
    import transformers

    return isinstance(kind, type) and getattr(transformers, kind.__name__, None) is kind


def _is_keepable(model: object) -> bool:
    """Whether a model is one that transformers builds from its configuration alone."""
    return (
        isinstance(model, torch.nn.Module)
        and _is_of_transformers(type(model))
        and getattr(model, "hf_quantizer", None) is None
        and all(tensor.numel() and type(tensor.data) is torch.Tensor for tensor in named_tensors(model).values())
    )


def _about(known: Mapping[str, object]) -> dict[str, object]:
    return {name: known[name] for name in ("class", "dtype", "frozen", "conversions", "object")}


def _around(spec: ModelSpec, folder: Path, found: Described) -> object | None:
    """A model on ``meta`` whose bytes are in an image; `None`, with a warning, if they are another model's."""
    try:
        return _rebuild(folder, found.about, found.image, found.views)
    except UnlikeError as error:
        _log.warning("%s is not used for model=%s: %s", found.file.path, spec.name, error)
    except Exception as error:  # libraries raise anything; the ordinary load will say what is wrong, if anything is
        _log.warning(
            "%s is not used for model=%s: %s: %s", found.file.path, spec.name, type(error).__name__, _first_line(error)
        )
    return None


def _rebuild(folder: Path, about: Mapping[str, Any], image: WeightImage, views: Sequence[Mapping[str, View]]) -> object:
    """Build a model on ``meta`` around an image.

    Raises:
        UnlikeError: It is not the model that the image was made of.
    """
    import transformers

    model_class = getattr(transformers, str(about["class"]), None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise UnlikeError(f"{about['class']!r} is no model of transformers")
    model = transformers_skeleton(model_class, folder, about)
    if model is None:
        raise UnlikeError("it cannot be built without its bytes")
    take_layout(model, image, views)
    if object_print(model) != about["object"]:
        raise UnlikeError("it became another one than was loaded from the files")
    return model


def load_sentence_transformers(spec: ModelSpec, options: Mapping[str, object], kept: KeptImages | None = None) -> Built:
    """Load a sentence-transformers model. Options: `path`, a folder; `dtype`. No images of it are kept.

    Raises:
        LoaderError: An option is wrong, the package is missing, or it refused the folder.
        WeightsError: The folder or its weights are missing, damaged, or would run code.
    """
    del kept  # more goes into such a model than can be told from its folder
    folder = _folder(spec, options)
    headers = checked_parts(spec.name, folder)

    def load() -> object:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise _error(spec, "needs the package sentence-transformers (pip install sentence-transformers)") from error
        kwargs: dict[str, Any] = {"use_safetensors": True}
        if (dtype := dtype_option(spec, options)) is not None:
            kwargs["dtype"] = dtype
        return SentenceTransformer(
            str(folder), device="cpu", local_files_only=True, trust_remote_code=False, model_kwargs=kwargs
        ).eval()

    def rebuilding(names: Iterable[str]) -> RebuildSource:
        again = partial(calling_library, spec, load)
        return RebuildSource(again, frozenset(names), model_name=spec.name, loader=str(spec.loader))

    model = calling_library(spec, load)
    refuse_changed(spec.name, headers)
    return Built(model, _source(spec, model, headers, rebuilding, set())[0])


def _source(
    spec: ModelSpec,
    model: object,
    headers: tuple[Header, ...],
    rebuilding: Callable[[Iterable[str]], RebuildSource],
    drawn: set[str],
) -> tuple[Source | None, bool]:
    """The cheapest way to read the model again: its files, else the loader; and whether files give bytes as they are.

    What is still in a mapping of the files is let go: the source writes it where it is needed.
    `drawn` names what the library initialized because the folder does not have it: calling it again would draw other
    numbers, so such tensors are kept, or the model has no source when they are large.
    """
    tensors = named_tensors(model)
    match = match_tensors(tensors, headers)
    total_bytes = sum(header.total_bytes for header in headers)
    if match.missing_bytes <= max(_KEPT_BYTES, total_bytes * _KEPT_FRACTION):
        if isinstance(model, torch.nn.Module):  # a pipeline keeps where it is, and could not on ``meta``
            leave_to_files(tensors, match.where)
        sources: list[Source] = [SafetensorsSource(headers, match.where, model_name=spec.name)] if match.where else []
        source = JoinedSource([*sources, KeptSource(match.missing)]) if match.missing else sources[0]
        return source, not _converts(tensors, match)
    return (None if drawn else rebuilding(tensors)), False


def _converts(tensors: Mapping[str, torch.Tensor], match: Match) -> bool:
    return any(torch_dtype(location.entry) != tensors[name].dtype for name, location in match.where.items())


def calling_library(spec: ModelSpec, load: Callable[[], object]) -> object:
    """Run a library's loading function, one in the process at a time; what it raises becomes a `LoaderError`.

    Raises:
        LoaderError: It raised, or returned something without modules.
        WeightsError: As it is.
    """
    try:
        with one_builder:
            model = load()
        modules_of(model)
    except (LoaderError, WeightsError):
        raise
    except Exception as error:  # libraries raise anything; the caller needs to know whose model it was
        raise _error(spec, f"raised {type(error).__name__}: {_first_line(error)}") from error
    return model


def dtype_option(spec: ModelSpec, options: Mapping[str, object]) -> torch.dtype | None:
    """The `dtype` option; `None` when it is not set or ``auto``.

    Raises:
        LoaderError: It names no floating-point dtype.
    """
    value = options.get("dtype")
    if value is None or value == "auto":
        return None
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise _error(spec, f"has the dtype {value!r}, which is not one of auto, float32, float16, bfloat16, float64")
    return dtype


def text_option(spec: ModelSpec, key: str, value: object) -> str:
    """An option that must be a text.

    Raises:
        LoaderError: It is something else.
    """
    if not isinstance(value, str) or not value:
        raise _error(spec, f"has the {key} {value!r}, which must be a text")
    return value


def _folder(spec: ModelSpec, options: Mapping[str, object]) -> Path:
    path = options.get("path")
    if not isinstance(path, (str, Path)) or not str(path):
        raise _error(spec, "needs the option path, the folder of the model")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        problem = "this is a file, not the folder of a model." if folder.exists() else _no_folder(folder)
        raise WeightsError(spec.name, str(folder), problem)
    return folder


def _no_folder(folder: Path) -> str:
    near = "" if not folder.parent.is_dir() else f" {str(folder.parent)!r} exists. {listing(folder.parent)}"
    return f"there is no such folder, and nothing is downloaded: give the folder of a local copy.{near}"


def _model_class(spec: ModelSpec, options: Mapping[str, object], config: Mapping[str, object]) -> Any:
    """The class to build: the operator's choice, else the architecture in the configuration, else ``AutoModel``."""
    import transformers

    wanted = options.get("model")
    if isinstance(wanted, type) and hasattr(wanted, "from_pretrained"):
        return wanted
    if wanted is not None:
        chosen = getattr(transformers, text_option(spec, "model", wanted), None)
        if not hasattr(chosen, "from_pretrained"):
            raise _error(spec, f"has the model {wanted!r}, which is no model class of transformers")
        return chosen
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    named = getattr(transformers, first, None) if isinstance(first, str) and first.isidentifier() else None
    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if is_model else transformers.AutoModel


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["(no message)"])[0][:300]


def _error(spec: ModelSpec, problem: str) -> LoaderError:
    return LoaderError(spec.name, str(spec.loader), problem)
