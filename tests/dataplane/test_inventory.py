"""What an inventory finds: each storage once, every tensor over it, and what cannot be moved."""

import pytest
import torch
from movers import Odd

from modelcache.dataplane.inventory import Slot, address_range, flat_bytes, group, refusal_of, walk


def found(model):
    return group(walk({"": model}).slots)


def test_tied_and_viewed_tensors_are_one_storage():
    model = Odd()
    names = [{reader.slot.name for reader in storage.readers} for storage in found(model)]
    assert {"embed.weight", "head.weight"} in names
    assert {"q", "k", "v"} in names
    assert len(names) == len({frozenset(group) for group in names})
    assert sum(storage.size_bytes for storage in found(model)) == sum(
        {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in [*model.parameters(), *model.buffers()]
        }.values()
    )


def test_storages_come_in_registration_order_by_component():
    modules = {"b": torch.nn.Linear(2, 3), "a": torch.nn.Linear(3, 2)}
    names = [storage.readers[0].slot.name for storage in group(walk(modules).slots)]
    assert names == ["b.weight", "b.bias", "a.weight", "a.bias"]


def test_buffers_that_are_not_persistent_are_found():
    assert {"mask", "complex", "count"} <= {slot.name for slot in walk({"": Odd()}).slots}


def test_empty_tensors_have_no_storage():
    assert not any(reader.slot.name == "nothing" for storage in found(Odd()) for reader in storage.readers)


def test_offsets_count_from_the_start_of_the_storage():
    readers = {reader.slot.name: reader.view for storage in found(Odd()) for reader in storage.readers}
    assert [readers[name].offset_bytes for name in "qkv"] == [0, 1024, 2048]


def test_the_same_memory_under_two_torch_storages_is_one_storage():
    raw = torch.arange(100, dtype=torch.uint8).numpy()
    model = torch.nn.Module()
    model.register_buffer("late", torch.from_numpy(raw[40:80]))
    model.register_buffer("early", torch.from_numpy(raw[:60]))
    model.register_buffer("other", torch.ones(3))
    one, two = found(model)
    assert one.size_bytes == 80
    assert {reader.slot.name: reader.view.offset_bytes for reader in one.readers} == {"late": 40, "early": 0}
    assert two.readers[0].slot.name == "other"


def test_tensors_on_meta_are_grouped_by_their_storage():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(2, 3))
    model[1].weight = model[0].weight
    storages = found(model)
    assert [len(storage.readers) for storage in storages] == [2, 1, 1]
    assert all(storage.is_meta for storage in storages)


def test_flat_bytes_are_all_bytes_of_the_storage():
    base = torch.arange(10, dtype=torch.float32)
    flat = flat_bytes([Slot("a", base[3:5]), Slot("b", base.view(torch.uint8)[39:])])
    assert flat.numel() == 40
    assert flat.data_ptr() == base.data_ptr()
    assert address_range(base) == (base.data_ptr(), base.data_ptr() + 40)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized type torch.qint8"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "lazy conjugate"),
        (lambda: torch.nn.UninitializedParameter(), "not initialized"),
    ],
    ids=["sparse", "quantized", "conjugate", "lazy"],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_moved_is_refused_by_name(make, words):
    tensor = make()
    assert words in refusal_of(Slot("layer.weight", tensor))
    assert "'layer.weight'" in refusal_of(Slot("layer.weight", tensor))


def test_ordinary_tensors_are_not_refused():
    assert [refusal_of(slot) for slot in walk({"": Odd()}).slots if refusal_of(slot)] == []
