"""What saves a model or looks for its ties answers on a cached one as it did before it was cached, wherever it is."""

from __future__ import annotations

import copy
import io
import zipfile
from contextlib import closing

import pytest
import torch
from accelerate.utils import find_tied_parameters
from movers import Odd, Rig, bumped
from safetensors.torch import load_model, save_model

from modelcache import CacheClosedError, LeaseClosedError, ModelCache, ModelNotResidentError
from modelcache.testing import SimulatedDevice

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
PLACES = ["parked", "partial", "ready", "back from disk"]


class Tied(torch.nn.Module):
    """A tied head, two buffers of one storage, a transposed weight, a scalar; larger than several segments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed = torch.nn.Embedding(50, 16)
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(16, 16, dtype=torch.bfloat16) for _ in range(12)))
        self.head = torch.nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.transposed = torch.nn.Parameter(torch.randn(16, 24).t().contiguous())
        self.register_buffer("scale", torch.tensor(2.5))
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool), persistent=False)


def brought(rig: Rig, make, place: str) -> torch.nn.Module:
    """A cached model in some place."""
    (facts,) = rig.load(make).parts
    part, n = facts.part, len(facts.ram_bytes)
    rig.stage(part)
    match place:
        case "partial":
            assert n > 2
            rig.move(part, n // 2, 0)
        case "ready":
            rig.move(part, n, n)  # RAM gives its copy up
        case "back from disk":
            rig.spill(part)
            rig.stage(part)
    return rig.mover.object_of("m")


@pytest.fixture(params=PLACES)
def rigged(tmp_path, request):
    """Caches a model and brings it to a place."""
    with closing(Rig(tmp_path, segment_bytes=2048)) as rig:
        yield lambda make: brought(rig, make, request.param)


@pytest.mark.parametrize("make", [Tied, Odd])
def test_ties_are_found_as_before(rigged, make):
    found = find_tied_parameters(rigged(make))
    assert found == find_tied_parameters(make())
    assert ["embed.weight", "head.weight"] in found


def test_safetensors_saves_the_same_file(rigged, tmp_path):
    save_model(Tied(), tmp_path / "before.safetensors")
    model = rigged(Tied)
    save_model(model, tmp_path / "cached.safetensors")
    assert (tmp_path / "cached.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()
    fresh = Tied()
    bumped(fresh, "transposed")
    load_model(fresh, tmp_path / "cached.safetensors")
    assert torch.equal(fresh.transposed, Tied().transposed)


def test_safetensors_refuses_views_in_the_words_it_had_before(rigged, tmp_path):
    def words_of(model):
        with pytest.raises(RuntimeError) as caught:
            save_model(model, tmp_path / "file.safetensors")
        return str(caught.value)

    assert words_of(rigged(Odd)) == words_of(Odd())


@pytest.mark.parametrize("make", [Tied, Odd])
def test_torch_saves_as_many_bytes_and_ties_as_before(rigged, make):
    def saved(model):
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        return buffer

    before, cached = saved(make()), saved(rigged(make))
    # One storage of the model is one storage of the file, and nothing beside it.
    assert storages_of(cached) == storages_of(before)
    cached.seek(0)
    found, expected = torch.load(cached, map_location="cpu"), make().state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].stride()) == (tensor.dtype, tensor.stride())
        assert torch.equal(bits_of(found[name]), bits_of(tensor)), name
    assert found["embed.weight"].data_ptr() == found["head.weight"].data_ptr()


def test_torch_saves_the_whole_module_so_that_it_runs_where_it_is_loaded(rigged):
    def make():
        torch.manual_seed(6)
        return torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(8)))

    before, cached = io.BytesIO(), io.BytesIO()
    torch.save(make(), before)
    torch.save(rigged(make), cached)
    assert storages_of(cached) == storages_of(before)
    cached.seek(0)
    loaded, x = torch.load(cached, map_location="cpu", weights_only=False), torch.ones(1, 16)
    assert torch.equal(loaded(x), make()(x))


SAVES = pytest.mark.parametrize(
    "save",
    [
        lambda model: model.state_dict(),
        lambda model: save_model(model, "never.safetensors"),
        lambda model: torch.save(model, io.BytesIO()),
        copy.deepcopy,
    ],
    ids=["state_dict", "safetensors", "torch", "copy"],
)


@SAVES
def test_a_model_on_disk_is_not_saved_as_a_model_of_empty_tensors(tmp_path, save):
    with closing(Rig(tmp_path, segment_bytes=2048)) as rig:
        (facts,) = rig.load(Tied).parts
        model = rig.mover.object_of("m")
        rig.stage(facts.part)
        rig.spill(facts.part)
        with pytest.raises(ModelNotResidentError):
            save(model)
        rig.stage(facts.part)
        assert torch.equal(model.state_dict()["scale"], torch.tensor(2.5))


@pytest.mark.parametrize("end", ["close", "unregister"])
@SAVES
def test_a_model_whose_weights_are_gone_is_not_saved_as_a_model_of_empty_tensors(save, end):
    device = SimulatedDevice(1 << 20, link_bytes_per_s=None)
    with ModelCache(device=device, vram=1 << 19, ram=1 << 20, progress=False) as cache:
        cache.register("m", Tied)
        with cache.get("m") as model:
            pass
        if end == "close":
            cache.close()
        else:
            cache.unregister("m")
        with pytest.raises(ModelNotResidentError, match="'m' has no weights any more"):
            save(model)


def bits_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def storages_of(buffer: io.BytesIO) -> dict[str, int]:
    with zipfile.ZipFile(buffer) as file:
        return {entry.filename: entry.file_size for entry in file.infolist() if "/data/" in entry.filename}


READS = pytest.mark.parametrize(
    "read",
    [
        lambda model: [*model.parameters()],
        lambda model: [tensor for _, tensor in model.named_parameters()],
        lambda model: [*model.buffers()],
        lambda model: [tensor for _, tensor in model.named_buffers()],
        lambda model: [model.get_parameter("transposed")],
        lambda model: [model.get_buffer("scale")],
        lambda model: [*model.state_dict().values()],
    ],
    ids=["parameters", "named_parameters", "buffers", "named_buffers", "get_parameter", "get_buffer", "state_dict"],
)


@pytest.fixture
def cold(tmp_path):
    """A handle on a model that is on disk, and its cache."""
    device = SimulatedDevice(1 << 20, link_bytes_per_s=None)
    options = {"vram": 1 << 19, "ram": 1 << 20, "disk": 1 << 20, "image_dir": tmp_path / "images", "progress": False}
    with ModelCache(device=device, **options) as cache:
        cache.register("m", Tied)
        handle = cache.get("m")
        with handle:
            pass
        cache.evict("m")
        yield handle, cache
        del handle


@READS
def test_reading_the_weights_of_a_model_on_disk_brings_it_up(cold, read):
    handle, cache = cold
    found, expected = read(handle), read(Tied())
    assert all(torch.equal(tensor.cpu(), other) for tensor, other in zip(found, expected, strict=True))
    assert cache.info("m").num_leases == 0


def test_a_write_through_the_parameters_of_a_model_on_disk_is_kept(cold):
    handle, cache = cold
    for parameter in handle.parameters():
        parameter.data.mul_(0.5)
    cache.evict("m")
    with cache.get("m") as model:
        assert torch.equal(model.transposed.cpu(), Tied().transposed * 0.5)


def test_a_model_on_disk_is_kept_in_place_while_its_parameters_are_gone_through(cold):
    handle, cache = cold
    parameters = handle.parameters()
    next(parameters)
    assert cache.info("m").num_leases == 1
    del parameters
    assert cache.info("m").num_leases == 0


@READS
def test_reading_the_weights_of_a_closed_cache_is_refused(cold, read):
    handle, cache = cold
    cache.close()
    with pytest.raises(CacheClosedError):
        read(handle)


@READS
def test_reading_the_weights_of_a_name_that_is_another_models_now_is_refused(cold, read):
    handle, cache = cold
    cache.unregister("m")
    cache.register("m", Tied)
    with cache.get("m"), pytest.raises(LeaseClosedError):
        read(handle)


@pytest.mark.parametrize("away", ["nowhere", "park", "evict", "back"])
def test_a_handle_can_be_saved(tmp_path, away):
    save_model(Tied(), tmp_path / "before.safetensors")
    device = SimulatedDevice(1 << 20, link_bytes_per_s=None)
    with ModelCache(
        device=device, vram=1 << 19, ram=1 << 20, disk=1 << 20, image_dir=tmp_path / "images", progress=False
    ) as cache:
        cache.register("m", Tied)
        handle = cache.get("m")
        with handle:
            pass
        if away == "park":
            cache.park("m")
        elif away != "nowhere":
            cache.evict("m")
            if away == "back":
                cache.prefetch("m").result()
        save_model(handle, tmp_path / "cached.safetensors")
        assert find_tied_parameters(handle) == [["embed.weight", "head.weight"]]
        del handle
    assert (tmp_path / "cached.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()
