"""What a model's bytes are: its unique storages, the tensors that read them, and what cannot be moved.

Walks parameters, buffers (persistent or not) and the inner tensors of wrapper subclasses. Tensors whose memory
overlaps belong to one storage, so ties and views of one storage stay together. Reads shapes and addresses only; no
byte is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from modelcache.dataplane.image import View


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor object that must follow its bytes. `name` is for people and for the source."""

    name: str
    tensor: torch.Tensor


@dataclass(slots=True)
class Wrapper:
    """A tensor subclass around other tensors (``__tensor_flatten__``); it has no bytes of its own.

    Attributes:
        name: Full name of the outer tensor.
        outer: The object the module holds.
        inner: Attribute -> the tensor it wraps, plain or again a wrapper.
    """

    name: str
    outer: torch.Tensor
    inner: dict[str, torch.Tensor | Wrapper]

    def refreshed(self) -> torch.Tensor:
        """An outer tensor of the same kind that believes to be where its inner tensors are now."""
        inner = {
            attribute: each.refreshed() if isinstance(each, Wrapper) else each for attribute, each in self.inner.items()
        }
        _, context = self.outer.__tensor_flatten__()  # type: ignore[attr-defined]
        rebuilt = type(self.outer).__tensor_unflatten__(inner, context, self.outer.size(), self.outer.stride())  # type: ignore[attr-defined]
        if isinstance(self.outer, torch.nn.Parameter):
            rebuilt = torch.nn.Parameter(rebuilt, requires_grad=self.outer.requires_grad)
        return rebuilt  # type: ignore[no-any-return]

    def follow(self) -> None:
        """Make the outer tensor believe to be where its inner tensors are; all of them stay the same objects.

        Raises:
            RuntimeError: Somebody holds a weak reference to the outer tensor, so that it cannot be exchanged.
        """
        devices = {each.tensor.device for each in slots_of(self)}
        if self.outer.device in devices:
            return
        for each in self.inner.values():
            if isinstance(each, Wrapper):
                each.follow()
        torch.utils.swap_tensors(self.outer, self.refreshed())  # type: ignore[no-untyped-call]
        for attribute, each in self.inner.items():
            setattr(self.outer, attribute, each.outer if isinstance(each, Wrapper) else each)


def slots_of(wrapper: Wrapper) -> Iterator[Slot]:
    """The plain tensors under a wrapper."""
    for attribute, each in wrapper.inner.items():
        if isinstance(each, Wrapper):
            yield from slots_of(each)
        else:
            yield Slot(f"{wrapper.name}.{attribute}", each)


@dataclass(slots=True)
class Walk:
    """Every tensor of an object, by full name, in registration order.

    Attributes:
        slots: Plain tensors; one tensor object under several names appears once for each.
        wrappers: The wrapper subclasses around some of them.
    """

    slots: list[Slot] = field(default_factory=list)
    wrappers: list[Wrapper] = field(default_factory=list)


@dataclass(slots=True)
class Reader:
    """One tensor object and how it reads its storage."""

    slot: Slot
    view: View


@dataclass(slots=True)
class Found:
    """One storage of a model.

    Attributes:
        size_bytes: Of the storage.
        readers: The tensors over it.
    """

    size_bytes: int
    readers: list[Reader]

    @property
    def is_meta(self) -> bool:
        """Whether there are no bytes yet."""
        return self.readers[0].slot.tensor.is_meta


def walk(modules: Mapping[str, torch.nn.Module]) -> Walk:
    """Every parameter and buffer under the named modules, component by component."""
    found = Walk()
    for component, module in modules.items():
        prefix = f"{component}." if component else ""
        for name, tensor in _named_tensors(module):
            _enter(prefix + name, tensor, found)
    return found


def _named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _enter(name: str, tensor: torch.Tensor, found: Walk) -> None:
    if not hasattr(tensor, "__tensor_flatten__"):
        found.slots.append(Slot(name, tensor))
        return
    wrapper = _wrapper(name, tensor)
    found.wrappers.append(wrapper)
    found.slots.extend(slots_of(wrapper))


def _wrapper(name: str, tensor: torch.Tensor) -> Wrapper:
    attributes, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner: dict[str, torch.Tensor | Wrapper] = {}
    for attribute in attributes:
        each = getattr(tensor, attribute)
        nested = hasattr(each, "__tensor_flatten__")
        inner[attribute] = _wrapper(f"{name}.{attribute}", each) if nested else each
    return Wrapper(name, tensor, inner)


def refusal_of(slot: Slot) -> str | None:
    """Why this tensor cannot be moved as bytes, in words; `None` when it can."""
    tensor, kind = slot.tensor, None
    if torch.nn.parameter.is_lazy(tensor):
        kind = "is not initialized; run the model once in the loader"
    elif tensor.layout != torch.strided:
        kind = f"has the layout {tensor.layout}; only strided tensors can be moved: call .to_dense() in the loader"
    elif tensor.is_quantized:
        kind = f"has the quantized type {tensor.dtype}; use a quantizer that keeps plain integer tensors"
    elif tensor.is_conj() or tensor.is_neg():
        kind = "is a lazy conjugate or negative; call .resolve_conj().resolve_neg() in the loader"
    elif tensor.is_inference():
        kind = "was made inside torch.inference_mode(); load under torch.no_grad() instead"
    return None if kind is None else f"tensor {slot.name!r} {kind}"


def group(slots: list[Slot]) -> list[Found]:
    """The storages under these slots, in the order of their first slot. Empty tensors belong to none.

    Raises:
        ValueError: Two tensors overlap in memory in a way that no storage can hold.
    """
    owners: dict[int, list[Slot]] = {}
    for slot in slots:
        if slot.tensor.numel():
            owners.setdefault(storage_key(slot.tensor), []).append(slot)
    found: list[Found] = []
    for members in _overlapping(list(owners.values())):
        start = min(address_range(slot.tensor)[0] for slot in members)
        stop = max(address_range(slot.tensor)[1] for slot in members)
        readers = [Reader(slot, view_from(slot, start)) for slot in members]
        found.append(Found(stop - start, readers))
    order = {id(slot): i for i, slot in enumerate(slots)}
    return sorted(found, key=lambda storage: min(order[id(reader.slot)] for reader in storage.readers))


def view_from(slot: Slot, start: int) -> View:
    """How a slot reads a storage that starts at address `start`.

    Raises:
        ValueError: Its offset there is no multiple of its element size.
    """
    tensor = slot.tensor
    offset = address_range(tensor)[0] - start + int(tensor.storage_offset()) * tensor.dtype.itemsize
    if offset % tensor.dtype.itemsize:
        raise ValueError(f"tensor {slot.name!r} overlaps another one at {offset} bytes, inside one of its elements")
    return View.of(tensor, offset)


def storage_key(tensor: torch.Tensor) -> int:
    """The identity of a tensor's storage while the tensor lives."""
    return int(tensor.untyped_storage()._cdata)


def address_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the tensor's storage lies, ``[start, stop)``; on ``meta`` from 0."""
    storage = tensor.untyped_storage()
    start = 0 if tensor.is_meta else storage.data_ptr()
    return start, start + storage.nbytes()


def _overlapping(groups: list[list[Slot]]) -> list[list[Slot]]:
    """Join groups whose storages overlap in memory (the same memory through different torch storages)."""
    placed = sorted(
        (group for group in groups if not group[0].tensor.is_meta),
        key=lambda group: (str(group[0].tensor.device), address_range(group[0].tensor)),
    )
    joined = [group for group in groups if group[0].tensor.is_meta]
    last_device, last_stop = None, 0
    for each in placed:
        device, (start, stop) = each[0].tensor.device, address_range(each[0].tensor)
        if device == last_device and start < last_stop:
            joined[-1] = joined[-1] + each
            last_stop = max(last_stop, stop)
        else:
            joined.append(list(each))
            last_device, last_stop = device, stop
    return joined


def flat_bytes(slots: list[Slot]) -> torch.Tensor:
    """All bytes of the one torch storage that these tensors share, as a flat uint8 tensor where they are.

    Bytes behind the last whole element of the smallest element type are not part of any of them, and left out.
    """
    tensor = min((slot.tensor for slot in slots), key=lambda each: each.dtype.itemsize)
    count = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
    return tensor.detach().as_strided((count,), (1,), 0).view(torch.uint8)
