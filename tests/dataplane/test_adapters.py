"""Objects as loaders return them: where their modules are, what they believe, and what is refused in words."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from modelcache.dataplane.loading.adapters import (
    default_concurrency,
    handle_in,
    modules_of,
    named_tensors,
    point_at,
    refusal,
    remember,
    restore,
    type_name,
)

META = torch.device("meta")


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    return transformers.BertModel(config).eval()


class Tool:
    """An object of the user's own that drives two modules."""

    def __init__(self) -> None:
        self.encoder = nn.Linear(2, 3)
        self.decoder = nn.Linear(3, 2)
        self.same = self.encoder
        self.device = torch.device("cpu")
        self.words = ["a"]


# ------------------------------------------------------------------------------------------------------- refusals


def test_an_object_without_modules_is_a_type_error_that_names_it() -> None:
    for thing in (3, "model", object(), Tool, lambda: None, {"a": 1}, ()):
        with pytest.raises(TypeError, match="is no torch module and holds none as an attribute"):
            modules_of(thing)
    with pytest.raises(TypeError, match="int is no torch module"):
        modules_of(3)


def test_a_lazy_module_is_refused_until_it_ran_once() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    assert refusal(model) == "0.weight has no shape yet (a lazy module); run it once in the loader"
    model(torch.ones(1, 2))
    assert refusal(model) is None


def test_parameters_in_an_offload_cache_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].__dict__["_parameters"] = UserDict(model[0]._parameters)
    assert "0 (torch.nn.modules.linear.Linear) keeps its parameters in an offload cache" in str(refusal(model))


def test_a_module_in_a_parallel_wrapper_is_refused_naming_what_to_register() -> None:
    assert refusal(nn.DataParallel(nn.Linear(1, 1))) == (
        "the model is wrapped in DataParallel; register the model inside it, its .module"
    )


def test_a_bitsandbytes_parameter_is_refused() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64))
    assert "0.weight is quantized with bitsandbytes (Params4bit)" in str(refusal(model))


def test_a_torchao_tensor_is_listed_by_what_is_inside() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(version=2))
    assert refusal(model) is None
    names = set(named_tensors(model))
    assert {"0.bias", "0.weight.qdata", "0.weight.scale"} <= names
    assert "0.weight" not in names


def test_a_model_spread_over_accelerators_is_refused_naming_both() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_buffer("unloaded", torch.ones(2, device=META))
    assert refusal(model) is None
    with FakeTensorMode(allow_non_fake_inputs=True):  # tensors that say they are on a device that is not there
        model.register_buffer("scale", torch.empty((), device="cuda:0"))
        assert refusal(model) is None  # torch lets scalars be anywhere
        model[1].register_buffer("mask", torch.empty(2, device="cuda:0"))
        assert refusal(model) is None  # what another cached model shares may be on the device, the rest on the CPU
        model[0].register_buffer("other", torch.empty(2, device="cuda:1"))
        assert str(refusal(model)) == (
            "its tensors are on several devices (0.other on cuda:1, 1.mask on cuda:0); load all of it on the CPU, the "
            "cache moves it"
        )


def test_a_diffusers_pipeline_that_offloads_itself_is_refused() -> None:
    pipe = tiny_pipeline()
    pipe.enable_sequential_cpu_offload(device="cpu")
    pipe._all_hooks = pipe._all_hooks or [object()]
    assert "the pipeline offloads itself" in str(refusal(pipe))


def test_group_offloading_of_diffusers_is_refused() -> None:
    pipe = tiny_pipeline()
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert "offloads itself in groups (enable_group_offload)" in str(refusal(pipe))


# --------------------------------------------------------------------------------------------------------- kinds


def test_a_module_is_one_component_without_a_name() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert modules_of(model) == {"": model}
    assert set(named_tensors(model)) == set(model.state_dict())
    assert (type_name(model), default_concurrency(model), refusal(model)) == ("Sequential", 0, None)


def test_tied_tensors_and_computed_buffers_appear_under_all_their_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    model.register_buffer("mask", torch.ones(2), persistent=False)
    model.register_buffer("absent", None)
    tensors = named_tensors(model)
    assert set(tensors) == {"a.weight", "a.bias", "b.weight", "b.bias", "mask"}
    assert tensors["a.weight"] is tensors["b.weight"]


def test_a_compiled_module_stands_for_its_original() -> None:
    inner = nn.Linear(2, 2)
    compiled = torch.compile(inner, backend="eager")
    assert modules_of(compiled) == {"": inner}
    assert set(named_tensors(compiled)) == {"weight", "bias"}
    assert type_name(compiled) == "Linear"
    assert modules_of({"m": compiled}) == {"m": inner}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_module_is_a_module() -> None:
    model = torch.jit.script(nn.Linear(2, 2))
    assert refusal(model) is None
    assert set(named_tensors(model)) == {"weight", "bias"}


def test_the_modules_of_any_object_are_its_components_each_once() -> None:
    tool = Tool()
    assert modules_of(tool) == {"encoder": tool.encoder, "decoder": tool.decoder}
    assert "decoder.weight" in named_tensors(tool)
    assert (type_name(tool), default_concurrency(tool)) == ("Tool", 1)


def test_modules_in_containers_are_components() -> None:
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    assert modules_of((one, "tokenizer", two)) == {"0": one, "2": two}
    assert modules_of({"text": one, "image": two, "n": 3}) == {"text": one, "image": two}

    @dataclass
    class Pair:
        left: nn.Module
        right: nn.Module

    assert modules_of(Pair(one, two)) == {"left": one, "right": two}


def test_a_transformers_pipeline_is_its_model_and_believes_in_a_device() -> None:
    transformers = pytest.importorskip("transformers")
    pipe = transformers.FeatureExtractionPipeline(model=bert(), tokenizer=None, device="cpu")
    assert modules_of(pipe) == {"model": pipe.model}
    assert "model.embeddings.word_embeddings.weight" in named_tensors(pipe)
    assert (type_name(pipe), default_concurrency(pipe), refusal(pipe)) == ("FeatureExtractionPipeline", 1, None)
    idea = remember(pipe)
    point_at(pipe, META)
    assert pipe.device == META
    restore(pipe, idea)
    assert pipe.device == torch.device("cpu")


def tiny_pipeline():
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())


def test_a_diffusers_pipeline_is_its_components() -> None:
    pipe = tiny_pipeline()
    assert modules_of(pipe) == {"unet": pipe.unet}
    assert (type_name(pipe), default_concurrency(pipe), refusal(pipe)) == ("DDPMPipeline", 1, None)
    point_at(pipe, META)
    assert pipe.device == torch.device("cpu")  # it follows the tensors by itself


# ---------------------------------------------------------------------------------------------------- device ideas


def test_stored_devices_are_set_and_put_back_wherever_they_are() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(2))
            self.device = "cpu"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._device = torch.device("cpu")
            self.target_device = "not a device"
            self.inner = Positions()

    model = Model()
    idea = remember(model)
    point_at(model, META)
    assert (model._device, model.inner.device, model.target_device) == (META, "meta", "not a device")
    restore(model, idea)
    assert (model._device, model.inner.device) == (torch.device("cpu"), "cpu")


def test_devices_that_are_derived_from_tensors_are_left_alone() -> None:
    model = bert()
    assert remember(model).stored == ()
    point_at(model, META)
    assert model.device == torch.device("cpu")


# -------------------------------------------------------------------------------------------------------- handles


class ModelHandle:
    """Passes for a module, as the real handle does."""

    __module__ = "modelcache.handle"

    def __init__(self, model: nn.Module) -> None:
        self.__dict__["wrapped"] = model

    @property
    def __class__(self):
        return type(self.__dict__["wrapped"])

    def __getattr__(self, name: str):
        return getattr(self.__dict__["wrapped"], name)


def test_a_handle_is_found_in_an_object_although_it_passes_for_a_module() -> None:
    handle = ModelHandle(nn.Linear(1, 1))
    assert isinstance(handle, nn.Module)
    tool = Tool()
    assert handle_in(tool) is None
    assert handle_in(nn.Linear(1, 1)) is None
    tool.decoder = handle
    assert handle_in(tool) == "decoder"
    assert handle_in(handle) == ""
    assert handle_in((1, handle)) == "1"
    parent = nn.Sequential(nn.ModuleDict())
    parent[0]._modules["child"] = handle
    assert handle_in(parent) == "0.child"
