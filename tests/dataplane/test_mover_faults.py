"""A move that fails has changed nothing: every failure point, every byte, every figure."""

import gc
import os
import resource
import signal
from contextlib import closing

import pytest
import torch
from movers import Odd, Rig, bits, bumped, same_bits

from modelcache.errors import DeviceMemoryError, DevicePoisonedError, LoaderError, MoveError, WeightsError
from modelcache.move import KeptWritten, Residency


@pytest.fixture
def rig(tmp_path):
    with closing(Rig(tmp_path)) as rig:
        yield rig


def loaded(rig, **options):
    (part,) = rig.load(Odd, **options).parts
    return part.part, rig.n(part.part), rig.mover.object_of("m")


def test_the_device_refuses_each_segment_of_a_promotion(rig):
    part, n, model = loaded(rig)
    rig.stage(part)
    for k in range(1, n + 1):
        rig.faults.fail("allocate", nth=k, failure="out_of_memory")
        with pytest.raises(DeviceMemoryError) as caught:
            rig.promote(part)
        # The error is still held here, and holds no memory of the device.
        assert rig.device.allocated_bytes() == 0
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
        assert caught.value.needed_bytes == sum(rig.facts[part].vram_bytes)
        assert same_bits(model, bits(Odd()))
    rig.promote(part)
    assert same_bits(model, bits(Odd()))


def test_a_device_that_is_full_refuses_and_keeps_nothing(tmp_path):
    with closing(Rig(tmp_path, capacity=3 * 4096)) as rig:
        part, _, model = loaded(rig)
        rig.stage(part)
        with pytest.raises(DeviceMemoryError, match="sim:0 refused"):
            rig.promote(part)
        assert rig.device.allocated_bytes() == 0
        assert same_bits(model, bits(Odd()))


@pytest.mark.parametrize("failure", ["transient", "out_of_memory"])
def test_each_copy_of_a_promotion_fails(rig, failure):
    part, n, model = loaded(rig)
    rig.stage(part)
    for k in range(1, n + 1):
        rig.faults.fail("copy_in", nth=k, failure=failure)
        with pytest.raises(MoveError) as caught:
            rig.promote(part)
        assert rig.device.allocated_bytes() == 0
        assert caught.value.name == "m"
        assert same_bits(model, bits(Odd()))
    rig.promote(part)


def test_each_copy_of_a_written_trim_fails_and_the_writes_survive(rig):
    part, n, model = loaded(rig)
    rig.stage(part)
    rig.promote(part)
    for name in ("embed.weight", "q", "transposed", "large"):
        bumped(model, name)
    expected = bits(model)
    for k in range(1, 4):
        rig.faults.fail("copy_out", nth=k)
        with pytest.raises(MoveError):
            rig.park(part)
        assert same_bits(model, expected)
        assert rig.mover.residency(part) == Residency(n, 0)
    assert rig.park(part).written
    assert same_bits(model, expected)


def test_a_torn_write_back_is_repeated_even_when_the_write_was_undone(rig):
    part, _, model = loaded(rig)
    original = bits(model)
    rig.stage(part)
    rig.promote(part)
    embed = model.embed.weight.detach().cpu()
    bumped(model, "embed.weight")
    rig.faults.corrupt("copy_out", nth=1, byte=3)
    rig.faults.fail("copy_out", nth=1)
    with pytest.raises(MoveError):
        rig.park(part)
    model.embed.weight.data.copy_(embed)
    assert rig.park(part).copied_bytes in rig.facts[part].vram_bytes
    assert same_bits(model, original)


def test_a_trim_that_ram_cannot_take_leaves_the_model_on_the_device(rig, monkeypatch):
    part, n, model = loaded(rig)
    rig.stage(part)
    rig.promote(part)
    rig.move(part, n, n)
    calls = iter(range(100))
    allocate = rig.mover._tiers.blocks.allocate

    def refusing(size):
        if next(calls) == 2:
            raise MemoryError("no memory")
        return allocate(size)

    monkeypatch.setattr(rig.mover._tiers.blocks, "allocate", refusing)
    with pytest.raises(MoveError, match="no memory"):
        rig.park(part)
    assert rig.mover.live_ram_bytes == 0
    assert {tensor.device.type for tensor in model.parameters()} == {"sim"}
    rig.park(part)
    assert same_bits(model, bits(Odd()))


class Stop(BaseException):
    """Like a Ctrl-C in a notebook."""


def test_an_interrupt_at_every_progress_report_changes_nothing(rig):
    part, n, model = loaded(rig, readable=True)
    expected = bits(Odd())

    def interrupted(vram, ram, **options):
        """Interrupt a move at each of its reports, then let it pass; returns how often."""
        for i in range(100):
            reports = iter(range(100))

            def tell(name, done, total, reports=reports, i=i):
                if next(reports) == i:
                    raise Stop

            try:
                rig.move(part, vram, ram, progress=tell, **options)
            except Stop:
                before = rig.mover.residency(part)
                if before != Residency(0, n) or i == 0:
                    assert same_bits(model, expected) or model.large.numel() == 0
                assert rig.device.allocated_bytes() == sum(rig.facts[part].vram_bytes[: before.vram])
            else:
                return i
        return None

    assert interrupted(0, 0) > 3  # from the loader
    assert same_bits(model, expected)
    gc.collect()
    assert rig.mover.live_ram_bytes == rig.ram_bytes
    assert interrupted(n, 0) == n
    rig.move(part, n, n)
    assert interrupted(0, 0) == n
    assert interrupted(0, n, write_image=True) == n
    assert interrupted(0, 0) >= n  # from the file
    rig.mover.drop_image(part)
    rig.drop(part)
    assert interrupted(0, 0) > 3  # from the source
    assert same_bits(model, expected)


def test_an_interrupted_first_staging_keeps_the_bytes_with_the_model(rig):
    part, _, model = loaded(rig)
    reports = iter(range(100))

    def tell(name, done, total):
        if next(reports) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rig.move(part, 0, 0, progress=tell)
    assert rig.ram_bytes == 0
    assert same_bits(model, bits(Odd()))
    rig.mover.forget("m")
    assert same_bits(model, bits(Odd()))
    del model


def test_a_failing_re_pointing_is_undone(rig, monkeypatch):
    part, _, model = loaded(rig)
    rig.stage(part)
    import modelcache.dataplane.loaded as loaded_module

    def broken(model, device):
        raise RuntimeError("no such attribute")

    with monkeypatch.context() as patch:
        patch.setattr(loaded_module.adapters, "point_at", broken)
        with pytest.raises(MoveError, match="no such attribute"):
            rig.promote(part)
    assert rig.device.allocated_bytes() == 0
    assert same_bits(model, bits(Odd()))
    assert {tensor.device.type for tensor in model.parameters()} == {"cpu"}
    rig.promote(part)
    model(torch.tensor([[1]], device="sim:0"))


def test_a_sticky_error_poisons_the_device_and_leaves_ram_intact(tmp_path):
    rig = Rig(tmp_path)
    part, _, model = loaded(rig)
    rig.stage(part)
    rig.faults.fail("copy_in", nth=2, failure="sticky")
    with pytest.raises(MoveError):
        rig.promote(part)
    assert same_bits(model, bits(Odd()))
    with pytest.raises(DevicePoisonedError):
        rig.promote(part)
    assert same_bits(model, bits(Odd()))
    rig.mover.close()


def test_a_full_disk_is_named_and_leaves_no_file(rig):
    part, _, model = loaded(rig)
    rig.stage(part)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    for limit in (0, 5000, 12000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(MoveError, match="needs .* free; free disk space") as caught:
                rig.spill(part)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(rig.directory) in str(caught.value)
        assert not list(rig.directory.glob("*/*"))
        assert same_bits(model, bits(Odd()))
    rig.spill(part)


def test_a_failed_spill_keeps_the_earlier_file(rig):
    part, _, model = loaded(rig)
    rig.stage(part)
    rig.spill(part)
    rig.stage(part)
    (file,) = rig.directory.glob("*/*.image")
    before = file.read_bytes()
    bumped(model, "large")
    expected = bits(model)

    def stop(name, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rig.spill(part, progress=stop)
    assert [each.read_bytes() for each in rig.directory.glob("*/*")] == [before]
    assert same_bits(model, expected)
    assert rig.spill(part).written
    rig.stage(part)
    assert same_bits(model, expected)


def test_a_spill_without_a_directory_is_refused_in_words(tmp_path):
    with closing(Rig(tmp_path, files=False)) as rig:
        part, _, model = loaded(rig)
        rig.stage(part)
        with pytest.raises(MoveError, match="no directory for image files"):
            rig.spill(part)
        assert isinstance(rig.drop(part), KeptWritten)
        assert same_bits(model, bits(Odd()))


def damaged(rig, how):
    (file,) = rig.directory.glob("*/*.image")
    how(file)
    return file


def flip(file):
    with file.open("r+b") as handle:
        handle.seek(-1000, os.SEEK_END)
        byte = handle.read(1)
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte[0] ^ 1]))


DAMAGE = {
    "is damaged": flip,
    "is truncated": lambda file: os.truncate(file, file.stat().st_size - 5000),
    "cannot be opened": lambda file: file.unlink(),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_image_file_is_named_and_the_part_stays_on_disk(rig, words):
    part, n, _ = loaded(rig)
    rig.stage(part)
    rig.spill(part)
    file = damaged(rig, DAMAGE[words])
    with pytest.raises(WeightsError, match=words) as caught:
        rig.stage(part)
    assert caught.value.path == str(file)
    assert rig.mover.residency(part) == Residency(0, n)
    assert rig.mover.live_ram_bytes == 0
    if words == "is damaged":
        assert caught.value.tensor == "complex"


def test_a_damaged_image_file_of_a_readable_part_is_replaced_by_its_source(rig, caplog):
    part, _, model = loaded(rig, readable=True)
    rig.stage(part)
    rig.spill(part)
    damaged(rig, flip)
    rig.stage(part)
    assert same_bits(model, bits(Odd()))
    assert "is damaged" in caplog.text
    assert rig.sources["m"].fills == 1
    assert not list(rig.directory.glob("*/*"))


def test_a_source_that_fails_leaves_the_part_on_disk(rig):
    part, _, model = loaded(rig, readable=True)
    rig.stage(part)
    rig.drop(part)
    kept = rig.sources["m"].tensors.pop("large")
    with pytest.raises(MoveError, match="KeyError"):
        rig.stage(part)
    assert rig.mover.live_ram_bytes == 0
    rig.sources["m"].tensors["large"] = kept
    rig.stage(part)
    assert same_bits(model, bits(Odd()))


def test_what_a_loader_raises_is_told_with_its_cause_and_nothing_stays(rig):
    def broken():
        raise ValueError("no weights here")

    with pytest.raises(LoaderError, match="raised ValueError: no weights here") as caught:
        rig.load(broken)
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(LoaderError, match="holds none as an attribute"):
        rig.load(lambda: 7)
    rig.load(Odd)


def test_errors_of_ours_pass_through_a_load(rig):
    def missing():
        raise WeightsError("m", "x.safetensors", "is missing")

    with pytest.raises(WeightsError, match="is missing"):
        rig.load(missing)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.nn.ParameterList([torch.nn.Parameter(torch.eye(3).to_sparse())]), "layout torch.sparse_coo"),
        (lambda: torch.nn.LazyLinear(3), "lazy module"),
    ],
)
def test_what_cannot_be_moved_is_refused_when_it_is_loaded(rig, make, words):
    with pytest.raises(LoaderError, match=words):
        rig.load(make)


def test_inference_tensors_are_refused_when_they_are_loaded(rig):
    def make():
        with torch.inference_mode():
            return torch.nn.Linear(2, 2)

    with pytest.raises(LoaderError, match=r"inside torch.inference_mode\(\); load under torch.no_grad"):
        rig.load(make)


def test_a_check_on_a_full_device_happens_in_ram(tmp_path):
    with closing(Rig(tmp_path)) as rig:
        part, _, model = loaded(rig)
        rig.stage(part)
        rig.promote(part)
        bumped(model, "large")
        expected = bits(model)
        ballast = rig.device.allocate(rig.device.free_bytes() - 100)
        before = rig.device.allocated_bytes()
        moved = rig.mover.move(
            __import__("modelcache.move", fromlist=["Move"]).Move(
                part, 1, rig.mover.residency(part), Residency(0, 0), rig.n(part)
            )
        )
        assert moved.written
        assert moved.freed_bytes == before - ballast.numel() == sum(rig.facts[part].vram_bytes)
        del ballast
        assert same_bits(model, expected)


def test_unregistering_gives_up_even_what_changed_beyond_recognition(rig):
    part, n, model = loaded(rig)
    rig.stage(part)
    rig.promote(part)
    bumped(model, "large")
    model.extra = torch.nn.Parameter(torch.ones(2))
    assert not isinstance(rig.drop(part, check=False), KeptWritten)
    rig.mover.forget("m")
