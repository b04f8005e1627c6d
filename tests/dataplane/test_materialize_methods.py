"""The methods of one model: on it and on its copies, and on nothing else."""

import copy
import gc
import io
import itertools
import pickle
import weakref

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from dispatched import SPLIT, Tiny, X, assert_moves, assert_stuck, assert_whole, meta_names, portrait, state
from torch import nn

import modelcache
from modelcache import add_materialize_methods, restore_dispatch
from modelcache.dataplane.materialize import entry_points as materialize
from modelcache.dataplane.materialize.methods import ModelMethod
from modelcache.errors import MaterializeError, MaterializeMemoryError

NAMES = ("materialize", "materialize_all", "materialized")


@pytest.fixture
def model(tmp_path):
    """Dispatched by accelerate itself, then given the methods."""
    return add_materialize_methods(dispatch_model(Tiny().eval(), SPLIT, offload_dir=tmp_path))


class Pipeline:
    """Drives two models and is none."""

    def __init__(self, folder):
        self.first = dispatch_model(Tiny().eval(), SPLIT, offload_dir=folder / "first")
        self.second = disk_offload(Tiny().eval(), folder / "second", torch.device("cpu"))


@pytest.mark.parametrize("call", [lambda m: m.materialize(), lambda m: m.materialize_all(device="cpu")])
def test_a_method_makes_its_model_whole_and_returns_it(model, call):
    assert_stuck(model)
    assert call(model) is model
    assert_whole(model, state(Tiny()))
    assert restore_dispatch(model) is model
    assert_stuck(model)
    assert_whole(model.materialize(), state(Tiny()))
    assert_moves(model)


def test_a_block_has_a_whole_model_and_leaves_a_dispatched_one(model):
    output = model(X)
    before = portrait(model)  # a forward leaves placeholders of its own
    with model.materialized() as whole:
        assert whole is model
        assert_whole(model, state(Tiny()))
        assert model.cpu() is model
        assert torch.allclose(model(X), output, atol=1e-6)
    assert portrait(model) == before
    assert torch.allclose(model(X), output, atol=1e-6)


def test_a_block_that_raises_leaves_a_dispatched_model(model):
    before = portrait(model)
    with pytest.raises(ZeroDivisionError), model.materialized():
        raise ZeroDivisionError
    assert portrait(model) == before


def test_a_change_in_a_block_is_discarded_or_stays(model):
    with model.materialized(on_modified="discard"), torch.no_grad():
        model.linear2.weight.add_(1)
    with model.materialized(), torch.no_grad():
        assert torch.equal(model.linear2.weight, Tiny().linear2.weight)
        model.linear2.weight.add_(1)
    with model.materialized():
        assert torch.equal(model.linear2.weight, Tiny().linear2.weight + 1)


def test_further_arguments_are_those_of_the_function(model):
    seen = []
    model.materialize(copy="always", keep_dispatch=False, progress=lambda *report: seen.append(report))
    assert {name for _, _, name in seen} == {"linear2.weight", "linear2.bias"}
    with pytest.raises(MaterializeError, match="no dispatch to restore"):
        restore_dispatch(model)
    with pytest.raises(TypeError, match="nonsense"):
        model.materialize(nonsense=1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize("name", ["materialize", "materialize_all"])
def test_an_interrupt_at_any_tensor_leaves_the_model_as_it_was(tmp_path, name, position, error):
    model = add_materialize_methods(disk_offload(Tiny().eval(), tmp_path, torch.device("cpu")))
    calls = itertools.count()
    output = model(X)
    before = portrait(model)

    def stop(done, total, tensor):
        if next(calls) == position:
            raise error

    with pytest.raises(error):
        getattr(model, name)(progress=stop)
    assert next(calls) == position + 1
    assert portrait(model) == before
    assert torch.allclose(model(X), output, atol=1e-6)
    assert_whole(model.materialize(), state(Tiny()))


def test_an_interrupt_before_a_block_begins_leaves_the_model_as_it_was(model):
    before = portrait(model)

    def stop(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.materialized(progress=stop):
        pytest.fail("the block began")
    assert portrait(model) == before


def test_too_little_memory_is_said_in_bytes_before_anything_is_read(model, tmp_path, monkeypatch):
    files = sorted(tmp_path.glob("*.dat"))
    hidden = [path.with_suffix(".hidden") for path in files]

    def hide_everything(device):
        for path, other in zip(files, hidden, strict=True):
            path.rename(other)  # whoever read now would say so
        return 64

    monkeypatch.setattr(materialize, "available_bytes", hide_everything)
    before = portrait(model)
    with pytest.raises(MaterializeMemoryError, match="needs 100 B on cpu, but 63 B are available") as caught:
        model.materialize()
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, MaterializeError)
    assert (caught.value.needed_bytes, caught.value.available_bytes) == (100, 63)
    assert caught.value.names == ("linear2.weight", "linear2.bias")
    assert portrait(model) == before
    monkeypatch.undo()
    for path, other in zip(files, hidden, strict=True):
        other.rename(path)
    assert_whole(model.materialize(), state(Tiny()))


def test_the_methods_are_on_this_object_only(model):
    assert not any(hasattr(Tiny, name) for name in NAMES)
    assert not any(hasattr(Tiny(), name) for name in NAMES)
    assert not any(hasattr(model.linear1, name) for name in NAMES)
    assert type(model) is Tiny


def test_the_model_has_the_same_modules_and_tensors_as_without():
    plain, model = Tiny(), add_materialize_methods(Tiny())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert repr(model) == repr(plain)
    assert model.load_state_dict(plain.state_dict()) is not None


def test_adding_them_twice_does_nothing(model):
    before = portrait(model)
    assert add_materialize_methods(model) is model
    assert portrait(model) == before


def test_a_method_says_what_it_is(model):
    assert repr(model.materialize_all) == "<materialize_all of Tiny>"
    assert "meta tensor" in model.materialize.__doc__


def test_a_deep_copy_acts_on_itself_and_not_on_the_original(model):
    output = model(X)
    before = portrait(model)  # a forward leaves placeholders of its own
    twin = copy.deepcopy(model)
    assert twin.materialize() is twin
    assert_whole(twin, state(Tiny()))
    assert portrait(model) == before
    assert meta_names(model)
    assert_moves(twin)
    assert torch.allclose(model(X), output, atol=1e-6)
    with copy.deepcopy(model).materialized() as other:
        assert other is not model
        assert meta_names(model)
    assert_whole(model.materialize_all(), state(Tiny()))


def test_a_deep_copy_of_something_above_takes_the_methods_along(model):
    above = nn.ModuleList([model, nn.Linear(2, 2)])
    twin = copy.deepcopy(above)
    assert twin[0].materialize() is twin[0]
    assert meta_names(model)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


PICKLES = {"pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("again", PICKLES.values(), ids=PICKLES)
def test_a_pickled_model_acts_on_itself(model, again):
    twin = again(model.materialize())
    assert type(twin) is Tiny
    assert_whole(twin, state(Tiny()))
    cpu_offload(twin, torch.device("cpu"))
    assert meta_names(twin)
    assert twin.materialize() is twin
    assert_whole(twin, state(Tiny()))
    with twin.materialized() as whole:
        assert whole is twin


def test_a_shallow_copy_can_be_given_methods_of_its_own(model):
    twin = copy.copy(model)
    add_materialize_methods(twin)
    assert twin.materialize.model is twin
    assert model.materialize.model is model


def test_a_traced_model_is_copied_without_them_and_pickled_with_them():
    traced = add_materialize_methods(torch.fx.symbolic_trace(Tiny().eval()))
    assert not hasattr(copy.deepcopy(traced), "materialize")  # tracing keeps no attribute it does not know
    twin = pickle.loads(pickle.dumps(traced))
    assert twin.materialize() is twin


def test_a_compiled_model_has_them_through_its_wrapper(model):
    compiled = torch.compile(model, backend="eager")
    assert compiled.materialize() is model
    assert_whole(model, state(Tiny()))
    restore_dispatch(model)
    assert add_materialize_methods(compiled) is compiled
    assert compiled.materialize() is compiled
    assert_whole(model, state(Tiny()))


class Named(nn.Module):
    """Has each of the names already, in one of the ways a module can."""

    materialized = property(lambda self: None)

    def materialize(self):
        return "mine"


class Numbered(nn.Module):
    def __init__(self):
        super().__init__()
        self.materialize_all = nn.Linear(2, 2)


@pytest.mark.parametrize(("kind", "name"), [(Named, "materialize"), (Numbered, "materialize_all")])
def test_an_attribute_of_that_name_is_not_replaced(kind, name):
    model = kind()
    before = portrait(model)
    with pytest.raises(ValueError, match=f"{kind.__name__} already has an attribute '{name}'"):
        add_materialize_methods(model)
    assert portrait(model) == before


def test_a_dispatch_of_a_model_with_such_an_attribute_is_refused_before_it_begins(tmp_path):
    model = Numbered()
    before = portrait(model)
    with pytest.raises(ValueError, match="'materialize_all'"):
        modelcache.dispatch_model(model, {"materialize_all": "disk"}, offload_dir=tmp_path)
    assert portrait(model) == before
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_has_them_for_all_its_modules(tmp_path):
    pipeline = add_materialize_methods(Pipeline(tmp_path))
    assert pipeline.materialize() is pipeline
    for model in (pipeline.first, pipeline.second):
        assert_whole(model, state(Tiny()))
    restore_dispatch(pipeline)
    with pipeline.materialized() as whole:
        assert whole is pipeline
        assert meta_names(pipeline.first) == meta_names(pipeline.second) == []
    twin = copy.deepcopy(pipeline)
    assert twin.materialize_all() is twin
    assert meta_names(pipeline.first)
    assert not hasattr(Pipeline, "materialize")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_pipeline_of_diffusers_has_them_and_is_saved_without_them(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), add_attention=False,
    ).eval()  # fmt: skip
    expected = state(unet)
    pipeline = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler(num_train_timesteps=4))
    parts = {*pipeline.components, *pipeline.config}
    assert add_materialize_methods(pipeline) is pipeline
    pipeline.enable_sequential_cpu_offload(device="cpu")
    with pipeline.materialized():
        assert_whole(unet, expected)
    assert meta_names(unet)
    pipeline.materialize_all()
    assert {*pipeline.components, *pipeline.config} == parts
    pipeline.save_pretrained(tmp_path)
    assert not hasattr(diffusers.DDPMPipeline.from_pretrained(tmp_path), "materialize")
    assert copy.deepcopy(pipeline).materialize.model is not pipeline


@pytest.mark.parametrize("thing", [{"a": nn.Linear(2, 2)}, [nn.Linear(2, 2)]])
def test_a_container_that_takes_no_attributes_is_refused(thing):
    with pytest.raises(TypeError, match="takes no attributes; call modelcache.materialize_meta_tensors"):
        add_materialize_methods(thing)


def test_an_object_without_modules_is_refused():
    with pytest.raises(TypeError, match="no torch module"):
        add_materialize_methods("model")


def test_a_model_with_methods_can_be_collected():
    model = add_materialize_methods(Tiny())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_method_holds_on_to_its_model():
    assert isinstance(add_materialize_methods(Tiny()).materialize(), Tiny)


def test_every_name_is_a_method(model):
    assert all(isinstance(vars(model)[name], ModelMethod) for name in NAMES)
