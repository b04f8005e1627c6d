"""How the mover takes a dispatched model over: what it reads and when, what it keeps, what it refuses."""

from collections import UserDict
from contextlib import closing
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import attach_align_device_hook
from dispatched import IDS, OwnParameter, Tied, Tiny, X, assert_same, can_offload_torchao, portrait, state
from movers import Rig
from torch import nn

import modelcache
from modelcache.dataplane.loading.loaders import build
from modelcache.errors import LoaderError, MaterializeError, WeightsError
from modelcache.spec import LoaderSpec, ModelSpec

SPLIT = {"linear1": "sim:0", "batchnorm": "cpu", "linear2": "disk"}


@pytest.fixture
def rig(tmp_path):
    with closing(Rig(tmp_path / "rig", segment_bytes=16 << 10)) as rig:
        yield rig


def split(folder):
    return dispatch_model(Tiny().eval(), SPLIT, offload_dir=folder)


def by_place(facts):
    """The part on the device and the one off it."""
    (on,) = (part.part for part in facts.parts if not part.offloaded)
    (off,) = (part.part for part in facts.parts if part.offloaded)
    return on, off


def stage(rig, facts):
    """Everything into RAM; what the loader put on the device leaves it first."""
    for part in sorted(facts.parts, key=lambda part: part.offloaded):
        rig.stage(part.part)


def device_names(model):
    return {name: tensor.device.type for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


# --- failures first ---------------------------------------------------------------------------------------------------


def test_weights_that_are_nowhere_are_named_and_the_model_is_as_it_was(rig, tmp_path):
    model = split(tmp_path)
    model.linear2._parameters["weight"] = nn.Parameter(torch.empty(7, 4, device="meta"))
    before = portrait(model)
    with pytest.raises(MaterializeError, match=r"linear2\.weight"):
        rig.load(lambda: model)
    assert portrait(model) == before


def test_a_file_that_changed_after_the_load_is_named_and_nothing_is_taken(rig, tmp_path):
    on, off = by_place(rig.load(lambda: split(tmp_path)))
    rig.stage(on)
    file = tmp_path / "linear2.weight.dat"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(WeightsError) as caught:
        rig.stage(off)
    assert rig.mover.held_bytes(off).ram == 0
    remedy = "Restore the file, or load the model again, into an offload folder of its own, and register it anew."
    assert str(caught.value) == (
        f"{file}: tensor 'linear2.weight': the file changed since the model was first read: it had 80 bytes and has 76. "
        f"{remedy}"
    )
    file.unlink()
    with pytest.raises(WeightsError, match=r"tensor 'linear2\.weight': no file 'linear2\.weight\.dat'\.") as caught:
        rig.stage(off)
    assert str(caught.value).endswith(remedy)
    assert caught.value.path == str(tmp_path)
    file.write_bytes(whole)
    with pytest.raises(WeightsError, match="it was (written to|replaced by another file)"):
        rig.stage(off)


def test_weights_that_were_replaced_since_the_dispatch_are_told_from_the_model(rig, tmp_path):
    on, off = by_place(rig.load(lambda: modelcache.dispatch_model(Tiny().eval(), SPLIT, offload_dir=tmp_path)))
    (tmp_path / "linear2.weight.dat").write_bytes(torch.zeros(5, 4).numpy().tobytes())
    rig.stage(on)
    with pytest.raises(WeightsError, match=r"linear2\.weight"):
        rig.stage(off)


def test_memory_that_a_dispatch_keeps_off_the_device_cannot_be_shared(rig):
    body = nn.Linear(4, 4)
    one = nn.Sequential(body, nn.Linear(4, 2))
    cpu_offload(one, torch.device("sim:0"), state_dict=one.state_dict())
    rig.load(lambda: one, "one")
    with pytest.raises(LoaderError, match="that 'one' keeps off the device by its dispatch"):
        rig.load(lambda: nn.Sequential(one[0], nn.Linear(4, 3)), "two")


# --- what is read, and when -------------------------------------------------------------------------------------------


def read_chars():
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_load_reads_no_weights_and_staging_reads_them_once(rig, tmp_path):
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    expected = state(model)
    disk_offload(model, tmp_path, torch.device("sim:0"))
    before = read_chars()
    facts = rig.load(lambda: model)
    loaded = read_chars()
    stage(rig, facts)
    staged = read_chars()
    size = sum(each.numel() * 4 for each in expected.values())
    assert loaded - before < size // 10
    assert size <= staged - loaded < size * 1.1
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_every_tensor_is_read_into_the_memory_of_its_part(rig, tmp_path):
    model = split(tmp_path)
    stage(rig, rig.load(lambda: model))
    pieces = [
        (copy.memory.data_ptr(), copy.memory.data_ptr() + copy.memory.numel())
        for part in rig.mover._parts.values()
        for copy in part.ram
    ]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert any(start <= tensor.data_ptr() < stop for start, stop in pieces), name


def test_a_saved_llama_split_by_its_device_map_is_dropped_and_read_from_its_own_files(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    source = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    source.save_pretrained(tmp_path / "m", max_shard_size="30KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "disk")
    places |= {f"model.layers.{i}": "disk" for i in range(3)} | {"model.rotary_emb": "sim:0"}

    def load():
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "m", device_map=places, offload_folder=tmp_path / "o", dtype=torch.bfloat16
        )

    with closing(Rig(tmp_path / "rig", files=False)) as rig:
        facts = rig.load(load)
        assert all(part.readable for part in facts.parts)
        for _ in range(2):
            stage(rig, facts)
            assert_same(rig.mover.object_of("m").state_dict(), source.state_dict())
            rig.promote(by_place(facts)[0])
            with torch.no_grad():
                got = rig.mover.object_of("m")(IDS.to("sim:0")).logits.cpu()
                assert torch.allclose(got, source(IDS).logits, atol=1e-2)
            for part in facts.parts:
                rig.drop(part.part)


def test_with_nothing_on_the_device_its_smallest_tensor_tells_whether_it_runs(rig, tmp_path):
    def load():
        model = Tiny().eval()
        disk_offload(model, tmp_path, torch.device("sim:0"), offload_buffers=True)
        return model

    facts = rig.load(load)
    on, _ = by_place(facts)
    assert sum(next(part.ram_bytes for part in facts.parts if part.part == on)) <= 4096
    stage(rig, facts)
    model = rig.mover.object_of("m")
    assert set(device_names(model).values()) == {"cpu"}
    rig.promote(on)
    assert set(device_names(model).values()) == {"meta"}
    with torch.no_grad():
        assert torch.allclose(model(X.to("sim:0")).cpu(), Tiny().eval()(X), atol=1e-6)
    rig.park_quietly(on)
    assert all(torch.equal(t, Tiny().state_dict()[n]) for n, t in model.state_dict().items())


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_it_runs_only_while_one_part_is_on_the_device_and_the_other_in_ram_alone(rig, tmp_path):
    facts = rig.load(lambda: split(tmp_path))
    on, off = by_place(facts)
    model = rig.mover.object_of("m")
    expected = Tiny().eval()(X)
    rig.stage(on)
    rig.stage(off)
    assert "meta" not in device_names(model).values()
    rig.promote(on)
    assert device_names(model)["linear2.weight"] == "meta"
    with torch.no_grad():
        assert torch.allclose(model(X.to("sim:0")).cpu(), expected, atol=1e-6)
    rig.promote(off)
    assert set(device_names(model).values()) == {"sim"}
    assert "hf_device_map" not in vars(model)
    with torch.no_grad():
        assert torch.allclose(model(X.to("sim:0")).cpu(), expected, atol=1e-6)
    rig.park(off)
    assert device_names(model)["linear2.weight"] == "meta"
    rig.park(on)
    assert set(device_names(model).values()) == {"cpu"}
    assert all(torch.equal(t, Tiny().state_dict()[n]) for n, t in model.state_dict().items())


def test_the_largest_set_brought_in_at_a_time_counts_nested_and_preloaded_modules(rig):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(100))
            self.small, self.large = nn.Linear(10, 10), nn.Sequential(nn.Linear(20, 20), nn.Linear(30, 30))

    def charge(*floats):
        return sum(rig.device.charge_bytes(4 * n) for n in floats)

    nested = Outer()
    cpu_offload(nested, torch.device("sim:0"))
    assert rig.load(lambda: nested, "nested").onload_bytes == charge(100, 900, 30)
    preloaded = Outer()
    cpu_offload(preloaded, torch.device("sim:0"), preload_module_classes=["Sequential"])
    assert rig.load(lambda: preloaded, "preloaded").onload_bytes == charge(100, 400, 20, 900, 30)


@pytest.mark.parametrize(
    "where", [("cpu", "disk"), ("disk", "disk"), ("cpu", "cpu"), ("sim:0", "disk"), ("sim:0", "cpu")]
)
@pytest.mark.parametrize("forwards", [0, 1])
def test_ties_are_one_storage_wherever_their_halves_were(rig, tmp_path, where, forwards):
    def load():
        model = Tied().eval()
        places = {"embed": where[0], "mid": "sim:0", "head": where[1]}
        dispatch_model(model, places, main_device="sim:0", offload_dir=tmp_path)
        for _ in range(forwards):
            model(IDS.to("sim:0"))
        return model

    facts = rig.load(load)
    model = rig.mover.object_of("m")
    stage(rig, facts)
    assert model.embed.weight is model.head.weight
    assert torch.equal(model.embed.weight, Tied().embed.weight)
    rig.promote_quietly(next(part.part for part in facts.parts if not part.offloaded))
    with torch.no_grad():
        assert torch.allclose(model(IDS.to("sim:0")).cpu(), Tied()(IDS), atol=1e-6)


def test_class_flag_dtype_and_strides_follow_the_placeholder(rig, tmp_path):
    expected = []

    def load():
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4)).to(memory_format=torch.channels_last)
        model[1].weight = OwnParameter(model[1].weight.data, requires_grad=False)
        expected.append(model[0].weight.detach().clone())
        disk_offload(model, tmp_path, torch.device("sim:0"))
        return model.half()

    facts = rig.load(load)
    model = rig.mover.object_of("m")
    stage(rig, facts)
    assert type(model[1].weight) is OwnParameter
    assert not model[1].weight.requires_grad
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model[0].weight, expected[0].half())


def test_another_librarys_mapping_is_asked_and_the_model_runs_only_whole(rig):
    def load():
        model = Tiny().eval()
        attach_align_device_hook(
            model, execution_device=torch.device("sim:0"), offload=True, weights_map=UserDict(state(model))
        )
        return model

    (part,) = rig.load(load).parts
    assert not part.offloaded
    rig.stage(part.part)
    assert all(torch.equal(t, Tiny().state_dict()[n]) for n, t in rig.mover.object_of("m").state_dict().items())


@can_offload_torchao
def test_quantized_weights_are_rebuilt_and_run_only_whole(rig):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def make():
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(64, 64)).eval()
        quantize_(model, Int8WeightOnlyConfig())
        return model

    def load():
        model = make()
        cpu_offload(model, torch.device("sim:0"))
        return model

    x = torch.linspace(-1, 1, 64).reshape(1, 64)
    facts = rig.load(load)
    assert not any(part.offloaded for part in facts.parts)
    for part in facts.parts:
        rig.stage(part.part)
    with torch.no_grad():
        assert torch.allclose(type(make()).forward(rig.mover.object_of("m"), x), make()(x))


def test_what_no_file_holds_is_rebuilt_by_a_loader_that_may_be_called_again(tmp_path):
    with closing(Rig(tmp_path / "rig", files=False, build=build)) as rig:
        facts = rig.mover.load(ModelSpec("m", LoaderSpec(call=lambda: split(tmp_path / "o")), reload=True))
        rig.facts.update({part.part: part for part in facts.parts})
        assert all(part.readable for part in facts.parts)
        for _ in range(2):
            for part in facts.parts:
                rig.stage(part.part)
            model = rig.mover.object_of("m")
            assert all(torch.equal(t, Tiny().state_dict()[n]) for n, t in model.state_dict().items())
            for part in facts.parts:
                rig.drop(part.part)


def test_writes_refused_leave_it_running(rig, tmp_path):
    from modelcache.move import KeptWritten
    from modelcache.spec import OnWrite

    facts = rig.load(lambda: split(tmp_path), on_write=OnWrite.REFUSE)
    on, off = by_place(facts)
    for part in (on, off):
        rig.stage(part)
    rig.promote(on)
    model = rig.mover.object_of("m")
    with torch.no_grad():
        model.linear1.weight.add_(1)
    assert isinstance(rig.mover.move(_trim(rig, on)), KeptWritten)
    assert device_names(model)["linear2.weight"] == "meta"
    with torch.no_grad():
        model(X.to("sim:0"))


def _trim(rig, part):
    from modelcache.move import Move, Residency

    return Move(part, 1000, rig.mover.residency(part), Residency(0, 0), rig.n(part))


def test_replaced_weights_are_told_from_the_model_also_in_another_dtype(rig, tmp_path):
    def load():
        model = modelcache.dispatch_model(Tiny().eval(), SPLIT, offload_dir=tmp_path).half()
        (tmp_path / "linear2.weight.dat").write_bytes(torch.zeros(5, 4).numpy().tobytes())
        return model

    on, off = by_place(rig.load(load))
    rig.stage(on)
    with pytest.raises(WeightsError, match="holds other weights than the model was dispatched with"):
        rig.stage(off)


def test_unchanged_weights_are_those_of_the_model_also_in_another_dtype(rig, tmp_path):
    on, off = by_place(rig.load(lambda: modelcache.dispatch_model(Tiny().eval(), SPLIT, offload_dir=tmp_path).half()))
    rig.stage(on)
    rig.stage(off)
    assert torch.equal(rig.mover.object_of("m").linear2.weight, Tiny().linear2.weight.half())
