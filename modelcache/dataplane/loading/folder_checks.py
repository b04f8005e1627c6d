"""What is looked at in a model's folder before a library sees it: its configurations, its parts, its weight files.

A folder is data from elsewhere, and libraries do a lot of what it says: import classes, fetch kernels, read weights
from files that it names, fall back to pickles. Whatever could make them run code, or read what was not checked here,
is refused in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from modelcache.errors import WeightsError
from modelcache.headers import Header, model_headers, part_of, read_header, read_json, weight_places

# Keys of model configurations that make libraries import or download code, and may come only from the caller.
_CODE_KEYS = frozenset({"trust_remote_code", "custom_pipelines", "custom_pipeline"})
# The underscored keys that libraries write into configurations. Any other is refused: several were ways to run code.
_PLAIN_KEYS = frozenset(
    {
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_from_model_config",
        "_sliding_window_pattern",
        "_flash_attn_2_enabled",
        "_class_name",
        "_diffusers_version",
        "_module_class",
        "_type",
    }
)
# Keys of the configurations of adapters that name a module to import, or a pickle to read, unless they are null.
_ADAPTER_KEYS = frozenset({"megatron_config", "cache_file", "covariance_file", "prompt_tuning_init_state_dict_path"})
# Tables whose keys are the author's words.
_LABELS = frozenset({"label2id", "id2label"})
_PART_CONFIGS = frozenset({"modules.json", "router_config.json", "config.json", "wordembedding_config.json"})
_MAX_DEPTH = 64
_MAX_PARTS = 256


def checked_headers(model: str, folder: Path) -> tuple[Header, ...]:
    """The headers of the weight files of a folder for transformers, and its smaller files looked at.

    Raises:
        WeightsError: They are missing or damaged, or the folder would run code.
    """
    headers = tuple(
        header for place in weight_places(folder, name=model) for header in model_headers(place, name=model)
    )
    checked_config(model, folder / "config.json")
    if (folder / "generation_config.json").exists():
        checked_config(model, folder / "generation_config.json")
    _check_adapter(model, folder)
    return headers


def checked_parts(model: str, folder: Path) -> tuple[Header, ...]:
    """The headers of the weight files of all parts of a sentence-transformers folder, and the parts looked at.

    Raises:
        WeightsError: They are missing or damaged, or the folder would run code.
    """
    parts = _part_folders(model, folder)
    if not any(any(part.glob("*.safetensors")) for part in parts):
        return model_headers(folder, name=model)  # which says what there is instead
    headers: list[Header] = []
    for part in parts:
        for path in sorted(part.glob("*.json")):
            if path.name in _PART_CONFIGS or path.name.startswith(("config_", "sent")):
                checked_config(model, path)
        _check_adapter(model, part)
        # The library follows an index in parts of some classes only; in all others it takes the pickle beside one.
        if (part / "pytorch_model.bin").exists() and not (part / "model.safetensors").exists():
            raise WeightsError(
                model,
                str(part / "pytorch_model.bin"),
                "this part of the model has a pickle and no model.safetensors. A pickle can run code when loaded; not "
                "loaded. Save the model again with safetensors, or remove the pickle if other files have the weights.",
            )
        if any(part.glob("*.safetensors")):
            headers += model_headers(part, name=model)
    return tuple(headers)


def checked_config(model: str, path: Path) -> Mapping[str, object]:
    """A configuration file that names no code.

    Raises:
        WeightsError: It is missing or damaged, or names some.
    """
    content = read_json(path, name=model)
    _refuse_code(model, path, content)
    return content if isinstance(content, Mapping) else {}


def refuse_changed(model: str, headers: Iterable[Header]) -> None:
    """After a library read the files itself: they are those that were checked before.

    Raises:
        WeightsError: One was replaced, written to or removed in between.
    """
    for header in headers:
        then = header.identity
        try:
            found = header.path.stat()
        except OSError as error:
            raise WeightsError(model, str(header.path), f"changed while it was loaded: {error.strerror}.") from error
        if (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) != (
            then.dev,
            then.ino,
            then.size,
            then.mtime_ns,
        ):
            raise WeightsError(
                model, str(header.path), "changed while it was loaded. Load it again when it is at rest."
            )


def _part_folders(model: str, folder: Path) -> list[Path]:
    """The folder itself, those that its ``modules.json`` names, and those that a router among them names."""
    found: dict[Path, Path] = {}
    waiting = [folder]
    if (folder / "modules.json").exists():
        listed = read_json(folder / "modules.json", name=model)
        parts = [part.get("path") for part in listed if isinstance(part, dict)] if isinstance(listed, list) else []
        waiting += [part_of(folder, part, name=model) for part in parts if isinstance(part, str)]
    while waiting:
        part = waiting.pop(0)
        place = part.resolve()
        if place in found or not part.is_dir():
            continue
        if len(found) == _MAX_PARTS:
            raise WeightsError(model, str(folder), f"has more than {_MAX_PARTS} parts; this is no model.")
        found[place] = part
        for name in ("router_config.json", "config.json"):
            if (part / name).exists():
                content = read_json(part / name, name=model)
                types = content.get("types") if isinstance(content, dict) else None
                types = types if isinstance(types, dict) else {}
                inside = part.relative_to(folder)
                waiting += [part_of(folder, str(inside / key), name=model) for key in types]
    return list(found.values())


def _check_adapter(model: str, folder: Path) -> None:
    """An adapter of peft beside a model is loaded by transformers without being asked."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config.exists():
        return
    checked_config(model, config)
    if not (folder / "config.json").exists():
        problem = "this is an adapter, and names another model to load; register that one, and give it the adapter."
        raise WeightsError(model, str(config), problem)
    if not weights.exists() and (folder / "adapter_model.bin").exists():
        problem = "this adapter is a pickle, which can run code when loaded; not loaded. Save it with safetensors."
        raise WeightsError(model, str(folder / "adapter_model.bin"), problem)
    read_header(weights, name=model)


def _refuse_code(model: str, path: Path, value: object, depth: int = 0) -> None:
    if depth > _MAX_DEPTH:
        raise WeightsError(model, str(path), f"nested deeper than {_MAX_DEPTH} levels; this is no configuration.")
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        reason = _reason_to_refuse(path, key, each) if isinstance(key, str) else None
        if reason is not None:
            raise WeightsError(
                model,
                str(path),
                f"sets {key!r} to {str(each)[:60]!r}, which {reason}; not loaded. "
                "Remove the key, or load the folder in a loader of your own if you trust its author.",
            )
        if key not in _LABELS:
            _refuse_code(model, path, each, depth + 1)


def _reason_to_refuse(path: Path, key: str, value: object) -> str | None:
    """What this key and value could do; `None` if nothing."""
    if key == "transformers_weights":
        # The library reads this file instead of those that it would find, a pickle too.
        found = "model.safetensors" if (path.parent / "model.safetensors").exists() else "model.safetensors.index.json"
        return None if value == found else "names a file of weights other than the one that is checked"
    if path.name == "adapter_config.json" and key in _ADAPTER_KEYS and value is not None:
        return "can make a library import a module or read a pickle"
    return "can make a library run code from elsewhere" if _can_run_code(path, key, value) else None


def _can_run_code(path: Path, key: str, value: object) -> bool:
    if key in _CODE_KEYS or (key.startswith("_") and not key.startswith("__") and key not in _PLAIN_KEYS):
        return True
    if key in {"_attn_implementation", "attn_implementation"}:
        return "/" in str(value)  # a repository of kernels, fetched and run
    # These name the classes that sentence-transformers imports for the parts of a model.
    if (path.name, key) in {("modules.json", "type"), ("wordembedding_config.json", "tokenizer_class")}:
        return _is_foreign(value)
    if key == "types" and path.name in {"router_config.json", "config.json"} and isinstance(value, Mapping):
        return any(_is_foreign(each) for each in value.values())
    return False


def _is_foreign(name: object) -> bool:
    return not (isinstance(name, str) and name.startswith("sentence_transformers."))
