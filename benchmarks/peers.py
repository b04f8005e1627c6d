"""The cache and what people use in its place, each behind the same few words, for `workloads.py`.

Every method is given the same files, the same budget on the device and the same requests. It must answer with a model
that runs on the device; how it makes room is its own affair.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from stage import ACTIVATIONS_BYTES, Books, Net, empty_net, size_of
from traces import Workload

from modelcache import ModelCache


class CannotRunError(Exception):
    """Why a method has no part in a workload, in words."""


class Method(ABC):
    """One way to serve the requests. `moved_bytes` is what it has put on the link, by its own account."""

    label: ClassVar[str]
    note: ClassVar[str]

    def __init__(self, workload: Workload, files: dict[str, Path], books: Books) -> None:
        self.workload, self.files, self.books = workload, files, books
        self.place = books.torch_device
        self.moved_bytes = 0

    @abstractmethod
    def serve(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Bring the model to the device and call it."""

    @abstractmethod
    def is_ready(self, name: str) -> bool:
        """All of it is on the device now."""

    @abstractmethod
    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Where they are now."""

    def after(self) -> None:  # noqa: B027 (only one needs it)
        """Note what a request has moved, where that shows only afterwards; not timed."""

    def rest(self) -> None:  # noqa: B027 (most have nothing to do between their turns)
        """Finish what runs behind its back, so that it does not run in another's turn."""

    def close(self) -> None:  # noqa: B027
        """Let everything go."""


class Cache(Method):
    label = "modelcache"
    note = "`with cache.get(name)`; writes are kept, so a victim is looked at before it is dropped"
    on_write: ClassVar[str] = "writeback"

    def __init__(self, workload: Workload, files: dict[str, Path], books: Books) -> None:
        super().__init__(workload, files, books)
        self.cache = ModelCache(
            device=books.device,
            vram=books.budget_bytes,
            # Each part is rounded to 512 bytes a tensor.
            ram=workload.size_bytes
            + sum(shape.num_tensors for shape in workload.models.values()) * 512 * 2
            + (64 << 20),
            segment=workload.segment_bytes,
            progress=False,
        )
        self._seen = 0
        for name, shape in workload.models.items():
            self.cache.register(
                name, model=lambda shape=shape: empty_net(shape), weights=str(files[name]), on_write=self.on_write
            )

    def serve(self, name: str, x: torch.Tensor) -> torch.Tensor:
        with self.cache.get(name) as model:
            return model(x)

    def is_ready(self, name: str) -> bool:
        return self.cache.info(name).state == "ready"

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        with self.cache.get(name) as model:
            return model.state_dict()

    def rest(self) -> None:
        fresh = [event for event in self.cache.events() if event.seq > self._seen]
        self._seen += len(fresh)
        self.moved_bytes += sum(event.copied_bytes for event in fresh if event.kind.value in ("promote", "trim"))

    def close(self) -> None:
        self.cache.close()


class CacheThatDiscards(Cache):
    label = "modelcache, on_write: discard"
    note = "the same; writes on the device are dropped with it, as with the two last of the peers"
    on_write = "discard"


class _Held(Method):
    """All models are in RAM, and some of them on the device, the longest unused first in `on_device`."""

    def __init__(self, workload: Workload, files: dict[str, Path], books: Books) -> None:
        super().__init__(workload, files, books)
        self.models: dict[str, Net] = {}
        for name, shape in workload.models.items():
            model = empty_net(shape)
            # Cloned: what safetensors gives is a mapping of the file, which is slower to copy from.
            model.load_state_dict({key: value.clone() for key, value in load_file(files[name]).items()}, assign=True)
            self.models[name] = model.requires_grad_(False).eval()
        self.sizes = {name: size_of(model) for name, model in self.models.items()}
        self.on_device: OrderedDict[str, None] = OrderedDict()

    def is_ready(self, name: str) -> bool:
        return self.models[name].device == self.place

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return self.models[name].state_dict()

    def victims(self, name: str) -> list[str]:
        """The longest unused ones that must go for a model."""
        room = self.books.budget_bytes - sum(self.sizes[held] for held in self.on_device)
        found = []
        for held in self.on_device:
            if room >= self.sizes[name]:
                break
            found.append(held)
            room += self.sizes[held]
        return found


class Shuffle(_Held):
    label = "`.to()` shuffle"
    note = 'the longest unused models go back by `.to("cpu")` until there is room, then `.to(device)`'

    def serve(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in self.on_device:
            for victim in self.victims(name):
                self.models[victim].to("cpu")
                del self.on_device[victim]
                self.moved_bytes += self.sizes[victim]
            self.models[name].to(self.place)
            self.on_device[name] = None
            self.moved_bytes += self.sizes[name]
        self.on_device.move_to_end(name)
        return self.models[name](x)


class Accelerate(_Held):
    label = "accelerate cpu_offload_with_hook"
    note = "one model at a time: each call sends the one before back to RAM"

    def __init__(self, workload: Workload, files: dict[str, Path], books: Books) -> None:
        super().__init__(workload, files, books)
        try:
            from accelerate import cpu_offload_with_hook
        except ImportError as error:
            raise CannotRunError("not installed") from error
        self.hooks = {name: cpu_offload_with_hook(model, self.place)[1] for name, model in self.models.items()}
        self.last: str | None = None

    def serve(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name != self.last:
            # The hook before this one is fixed where the order is; here it is whoever was called last.
            self.hooks[name].hook.prev_module_hook = None if self.last is None else self.hooks[self.last]
            self.moved_bytes += self.sizes[name] + (0 if self.last is None else self.sizes[self.last])
            self.last = name
        return self.models[name](x)


class Diffusers(_Held):
    label = "diffusers ComponentsManager strategy"
    note = (
        "its offload hook and its choice: the combination of models on the device that comes closest to what is needed"
    )
    most_on_device: ClassVar[int] = 14

    def __init__(self, workload: Workload, files: dict[str, Path], books: Books) -> None:
        at_once = books.budget_bytes // min(shape.size_bytes for shape in workload.models.values())
        if at_once > self.most_on_device:
            raise CannotRunError(f"not run: {at_once} models on the device, of which it tries every combination")
        super().__init__(workload, files, books)
        try:
            from diffusers.modular_pipelines.components_manager import AutoOffloadStrategy, custom_offload_with_hook
        except ImportError as error:
            raise CannotRunError("not installed") from error
        margin = ACTIVATIONS_BYTES
        if self.place.type == "cuda":
            # It takes what is free on the device for its own: what is beyond its budget is put out of its reach.
            margin = torch.cuda.mem_get_info(self.place)[0] - books.budget_bytes
        strategy = AutoOffloadStrategy("0GB")
        strategy.memory_reserve_margin = margin
        hooks = [custom_offload_with_hook(name, each, self.place, strategy) for name, each in self.models.items()]
        for hook in hooks:
            for other in hooks:
                if other is not hook:
                    hook.add_other_hook(other)

    def serve(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.models[name](x)

    def after(self) -> None:
        for name, model in self.models.items():
            if (model.device == self.place) != (name in self.on_device):
                self.moved_bytes += self.sizes[name]
                if name in self.on_device:
                    del self.on_device[name]
                else:
                    self.on_device[name] = None


class KeptStateDict(_Held):
    label = "InvokeAI's pattern"
    note = "reproduced: a state dict kept in RAM, copied tensor by tensor and assigned; writes on the device are lost"

    def __init__(self, workload: Workload, files: dict[str, Path], books: Books) -> None:
        super().__init__(workload, files, books)
        self.kept = {name: model.state_dict() for name, model in self.models.items()}

    def serve(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in self.on_device:
            for victim in self.victims(name):
                self.models[victim].load_state_dict(self.kept[victim], assign=True)
                self.models[victim].to("cpu")
                del self.on_device[victim]
            copied = {key: value.to(self.place, copy=True) for key, value in self.kept[name].items()}
            self.models[name].load_state_dict(copied, assign=True)
            self.models[name].to(self.place)
            self.on_device[name] = None
            self.moved_bytes += self.sizes[name]
        self.on_device.move_to_end(name)
        return self.models[name](x)


class Reload(Method):
    label = "delete and reload"
    note = "one model at a time; load_file from a file that is in the page cache, then `.to(device)`"

    def __init__(self, workload: Workload, files: dict[str, Path], books: Books) -> None:
        super().__init__(workload, files, books)
        self.name, self.model = "", None

    def serve(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name != self.name:
            self.name, self.model = "", None
            model = empty_net(self.workload.models[name])
            model.load_state_dict(load_file(self.files[name]), assign=True)
            self.model, self.name = model.to(self.place), name
            self.moved_bytes += size_of(model)
        assert self.model is not None
        return self.model(x)

    def is_ready(self, name: str) -> bool:
        return name == self.name

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def close(self) -> None:
        self.model = None
        gc.collect()


METHODS: tuple[type[Method], ...] = (Cache, CacheThatDiscards, Shuffle, Accelerate, Diffusers, KeptStateDict, Reload)


def version_of(distribution: str) -> str:
    try:
        return version(distribution)
    except Exception:  # noqa: BLE001 (a missing or broken package is a word in a table)
        return "not installed"


def as_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
