"""Parts whose bytes are kept for later processes, and parts that begin in an image that an earlier one kept."""

import logging
import os
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from movers import Rig, TensorSource, bits, bumped, same_bits

from modelcache.dataplane.image import View, lay_out
from modelcache.dataplane.images.format import Contents, Sums
from modelcache.dataplane.images.keeping import Keeper
from modelcache.dataplane.images.kept import KeptImages
from modelcache.dataplane.images.origin import Origin
from modelcache.dataplane.loading.adapters import named_tensors
from modelcache.dataplane.loading.skeletons import UnlikeError, take_layout
from modelcache.dataplane.loading.source import Built, Keepable
from modelcache.spec import ModelSpec

SEGMENT = 4096
BUDGET = 1 << 20


class Net(torch.nn.Module):
    """Ties, a row of layers, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(30, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(12))
        self.head = torch.nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.arange(40) % 3 == 0, persistent=False)


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


class Folder:
    """A loader whose source is slow: a file of its own, and the images of one folder."""

    def __init__(self, tmp_path) -> None:
        self.path = tmp_path / "model.bin"
        self.path.write_bytes(b"weights")
        torch.manual_seed(0)
        self.model = Net()
        self.expected = bits(self.model)
        self.source = TensorSource(named_tensors(self.model))
        self.kept = KeptImages(tmp_path / "images", BUDGET, SEGMENT)
        self.loads = 0

    def origin(self) -> Origin:
        return Origin.of({}, [self.path])

    def rebuild(self, image, views) -> Net:
        model = on_meta()
        take_layout(model, image, views)
        return model

    def build(self, spec: ModelSpec) -> Built:
        origin = self.origin()
        found = self.kept.find(origin)
        if found is not None:
            model = self.rebuild(found.image, found.views)
        else:
            self.loads += 1
            model = Net()
            model.load_state_dict(self.model.state_dict())
        return Built(model, self.source, Keepable(origin, {}, self.rebuild, found))


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def start(tmp_path, folder, no_thread_is_left, no_file_is_left_open):
    rigs = []

    def started(build: Callable[[ModelSpec], Built] | None = None, **options) -> Rig:
        rigs.append(Rig(tmp_path, build=build or folder.build, disk_bytes=BUDGET, segment_bytes=SEGMENT, **options))
        return rigs[-1]

    yield started
    for rig in rigs:
        rig.mover.close()


def load(rig: Rig) -> str:
    return rig.load(Net).parts[0].part


def wait_until_kept(rig: Rig) -> None:
    """What the background has begun, it ends."""
    while (thread := rig.mover._keeper._thread) is not None:
        thread.join()


def images(tmp_path) -> list:
    return sorted((tmp_path / "images").rglob("*.image"))


def test_a_part_is_kept_after_it_was_staged_and_the_next_process_begins_in_it(start, folder, tmp_path):
    first = start()
    part = load(first)
    assert images(tmp_path) == []
    first.stage(part)
    wait_until_kept(first)
    assert len(images(tmp_path)) == 1
    first.mover.close()

    second = start()
    part = load(second)
    assert folder.loads == 1
    model = second.mover.object_of("m")
    assert all(tensor.numel() == 0 for tensor in named_tensors(model).values())
    assert second.mover.held_bytes(part).image == 0
    second.stage(part)
    assert folder.source.fills == 0
    assert same_bits(model, folder.expected)
    assert model.head.weight is model.embed.weight
    second.promote(part)
    second.park(part)
    assert same_bits(model, folder.expected)


def test_a_clean_eviction_leaves_the_bytes_to_the_kept_image(start, folder, tmp_path):
    rig = start()
    part = load(rig)
    rig.stage(part)
    wait_until_kept(rig)
    assert rig.drop(part).copied_bytes == 0
    rig.stage(part)
    assert folder.source.fills == 0
    assert rig.spill(part).copied_bytes == 0
    assert len(images(tmp_path)) == 1
    rig.stage(part)
    assert folder.source.fills == 0
    assert same_bits(rig.mover.object_of("m"), folder.expected)


def test_writes_are_spilled_to_a_file_of_this_process_and_the_kept_one_stays_as_it_is(start, folder, tmp_path):
    rig = start()
    part = load(rig)
    rig.stage(part)
    wait_until_kept(rig)
    (kept,) = images(tmp_path)
    before = kept.read_bytes()
    model = rig.mover.object_of("m")
    bumped(model, "layers.3.weight")
    written = bits(model)
    assert rig.spill(part).written
    assert len(images(tmp_path)) == 2
    assert kept.read_bytes() == before
    rig.stage(part)
    assert same_bits(model, written)
    # The bytes of old again: a file that others may delete is not the last to hold what was written once.
    bumped(model, "layers.3.weight", -1.0)
    restored = bits(model)
    rig.spill(part)
    rig.stage(part)
    assert same_bits(model, restored)
    rig.mover.close()
    assert images(tmp_path) == [kept]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_image_is_replaced_by_the_source_with_one_warning(start, folder, tmp_path, caplog, damage):
    first = start()
    first.stage(load(first))
    wait_until_kept(first)
    first.mover.close()
    (image,) = images(tmp_path)

    second = start()
    part = load(second)
    if damage == "flipped":
        raw = bytearray(image.read_bytes())
        raw[-1000] ^= 1
        image.write_bytes(raw)
    elif damage == "cut":
        image.write_bytes(image.read_bytes()[:-1000])
    else:
        image.unlink()
    with caplog.at_level(logging.WARNING):
        second.stage(part)
    assert len(caplog.records) == 1
    assert "reading model=m again from its source" in caplog.text
    assert folder.source.fills == 1
    assert same_bits(second.mover.object_of("m"), folder.expected)
    wait_until_kept(second)
    second.mover.close()

    third = start()  # it was kept anew
    third.stage(load(third))
    assert folder.loads == 1
    assert folder.source.fills == 1


def test_a_part_that_was_written_to_is_not_kept(start, folder, tmp_path):
    rig = start(build=lambda spec: folder_with(folder, rebuild=hold))
    reached, go_on = threading.Event(), threading.Event()

    def hold(image, views):
        reached.set()
        go_on.wait()
        return folder.rebuild(image, views)

    part = load(rig)
    rig.stage(part)
    reached.wait()
    bumped(rig.mover.object_of("m"), "layers.11.weight")
    go_on.set()
    wait_until_kept(rig)
    assert [path for path in (tmp_path / "images").rglob("*") if path.is_file()] == []


def test_a_part_that_moves_away_meanwhile_is_not_kept(start, folder, tmp_path):
    reached, go_on = threading.Event(), threading.Event()

    def hold(image, views):
        reached.set()
        go_on.wait()

    rig = start(build=lambda spec: folder_with(folder, rebuild=hold))
    part = load(rig)
    rig.stage(part)
    reached.wait()
    rig.drop(part)
    go_on.set()
    wait_until_kept(rig)
    assert images(tmp_path) == []
    rig.stage(part)  # and kept after all the next time
    wait_until_kept(rig)
    assert len(images(tmp_path)) == 1


def test_what_could_not_be_built_around_an_image_is_not_kept(start, folder, tmp_path):
    def unlike(image, views):
        raise UnlikeError("no")

    rig = start(build=lambda spec: folder_with(folder, rebuild=unlike))
    rig.stage(load(rig))
    wait_until_kept(rig)
    assert images(tmp_path) == []


def test_a_surprise_in_the_background_is_a_warning_and_no_more(start, folder, tmp_path, caplog):
    def broken(image, views):
        raise RuntimeError("who would have thought")

    rig = start(build=lambda spec: folder_with(folder, rebuild=broken))
    part = load(rig)
    with caplog.at_level(logging.WARNING):
        rig.stage(part)
        wait_until_kept(rig)
    assert "not kept model=m: RuntimeError: who would have thought" in caplog.text
    rig.drop(part)


def test_closing_ends_the_writing_and_leaves_nothing_half(start, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("modelcache.dataplane.images.keeping._PATIENCE_S", 0.0)
    reached, go_on = threading.Event(), threading.Event()
    write = KeptImages.write

    def slowly(self, origin, contents, about, fill, *more):
        def filled(take):
            reached.set()
            go_on.wait()
            return fill(take)

        return write(self, origin, contents, about, filled, *more)

    monkeypatch.setattr(KeptImages, "write", slowly)
    rig = start()
    rig.stage(load(rig))
    reached.wait()
    assert [path.suffix for path in (tmp_path / "images").rglob("*") if path.is_file()] == [".tmp"]
    closing = threading.Thread(target=rig.mover.close)
    closing.start()
    rig.mover._keeper._cancelled.wait()
    go_on.set()
    closing.join()
    assert [path for path in (tmp_path / "images").rglob("*") if path.is_file()] == []


def test_a_closed_keeper_keeps_nothing_more(folder, start):
    keeper = Keeper(folder.kept)
    keeper.close()
    keeper.close()
    rig = start()
    part = load(rig)
    rig.stage(part)
    wait_until_kept(rig)
    keeper.staged(rig.mover._parts[part])
    assert keeper._thread is None


def test_spills_have_the_budget_before_kept_images(start, folder, tmp_path):
    rig = start(build=lambda spec: folder.build(spec) if spec.name == "m" else Built(spec.loader.call(), None))
    part = load(rig)
    rig.stage(part)
    wait_until_kept(rig)
    (kept,) = images(tmp_path)
    large = rig.load(partial(torch.nn.Linear, 508, 508, bias=False), "large").parts[0]
    rig.stage(large.part)
    assert BUDGET - kept.stat().st_size < large.image_bytes < BUDGET
    rig.spill(large.part)
    assert not kept.exists()
    rig.drop(part)
    rig.stage(part)  # from its source then
    assert folder.source.fills == 1
    assert same_bits(rig.mover.object_of("m"), folder.expected)


def test_nothing_is_kept_without_a_folder_or_a_budget(tmp_path, folder):
    for options in ({"files": False, "disk_bytes": BUDGET}, {"files": True}):
        rig = Rig(tmp_path, build=folder.build, segment_bytes=SEGMENT, **options)
        rig.stage(load(rig))
        rig.close()
        assert images(tmp_path) == []


def test_a_model_that_shares_tensors_with_another_one_is_not_kept(start, folder, tmp_path):
    shared = Net()

    def build(spec: ModelSpec) -> Built:
        if spec.name == "base":
            return Built(shared, None)
        model = torch.nn.ModuleDict({"base": shared, "more": torch.nn.Linear(4, 4)})
        return Built(model, None, Keepable(folder.origin(), {}, lambda image, views: None))

    rig = start(build=build)
    rig.load(Net, "base")
    for facts in rig.load(Net, "m").parts:
        rig.stage(facts.part)
    wait_until_kept(rig)
    assert images(tmp_path) == []


def folder_with(folder: Folder, rebuild) -> Built:
    built = folder.build(None)
    return Built(built.model, built.source, Keepable(built.keepable.origin, {}, rebuild, built.keepable.found))


@pytest.mark.parametrize("change", ["another tie", "another shape", "one more", "one less", "real"])
def test_a_skeleton_that_differs_from_the_image_is_refused(start, folder, tmp_path, change):
    rig = start()
    rig.stage(load(rig))
    wait_until_kept(rig)
    found = folder.kept.find(folder.origin())
    model = on_meta()
    take_layout(model, found.image, found.views)
    model = on_meta()
    if change == "another tie":
        model.head.weight = torch.nn.Parameter(torch.empty(30, 16, device="meta"))
    elif change == "another shape":
        model.layers[2].bias = torch.nn.Parameter(torch.empty(17, device="meta"))
    elif change == "one more":
        model.register_buffer("more", torch.empty(3, device="meta"))
    elif change == "one less":
        del model.layers[11]
    else:
        model.count = torch.tensor(7)
    with pytest.raises(UnlikeError):
        take_layout(model, found.image, found.views)


def test_what_nobody_can_use_any_more_is_swept_in_the_background(start, folder, tmp_path):
    first = start()
    first.stage(load(first))
    wait_until_kept(first)
    first.mover.close()
    (current,) = images(tmp_path)
    gone = tmp_path / "gone.bin"
    gone.write_bytes(b"gone")
    left = folder.kept.write(Origin.of({}, [gone]), *_EMPTY)
    assert len(images(tmp_path)) == 2
    gone.unlink()
    second = start()  # it writes nothing: its image is there
    second.stage(load(second))
    wait_until_kept(second)
    assert images(tmp_path) == [current]
    assert not left.path.exists()


def test_a_disk_that_hangs_does_not_hold_the_end_up(start, tmp_path, monkeypatch):
    monkeypatch.setattr("modelcache.dataplane.images.keeping._PATIENCE_S", 0.0)
    monkeypatch.setattr("modelcache.dataplane.images.keeping._LAST_WAIT_S", 0.0)
    reached, go_on = threading.Event(), threading.Event()
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (reached.set(), go_on.wait(), sync(descriptor)))
    rig = start()
    rig.stage(load(rig))
    reached.wait()
    thread = rig.mover._keeper._thread
    rig.mover.close()
    assert thread.is_alive()
    go_on.set()
    thread.join()
    assert [path for path in (tmp_path / "images").rglob("*") if path.is_file()] == []


_EMPTY = (
    Contents("", "m", lay_out((4,), SEGMENT), ({"t": View(torch.uint8, (4,), (1,), 0)},)),
    {},
    lambda write: (write(memoryview(bytes(lay_out((4,), SEGMENT).size_bytes))), ([0], Sums(lay_out((4,), SEGMENT))))[1],
)
