"""The mover with the package's own loaders and real architectures: transformers, files, dispatched models, threads."""

import random
import threading
from contextlib import closing

import pytest
import torch
from movers import Rig, bits, same_bits
from safetensors.torch import save_file

from modelcache.dataplane.loading.loaders import build
from modelcache.errors import ModelNotResidentError
from modelcache.move import Move, Moved, Residency
from modelcache.spec import LoaderSpec, ModelSpec


@pytest.fixture
def rig(tmp_path):
    with closing(Rig(tmp_path, build=build, segment_bytes=64 << 10, capacity=64 << 20)) as rig:
        yield rig


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def load(rig, name, **loader):
    facts = rig.mover.load(ModelSpec(name, LoaderSpec(**loader)))
    rig.facts.update({part.part: part for part in facts.parts})
    return facts


def test_a_transformers_model_generates_the_same_after_every_round_trip(rig):
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = llama().generate(ids, max_new_tokens=4, do_sample=False)
    (part,) = load(rig, "llama", call=llama).parts
    model = rig.mover.object_of("llama")
    rig.stage(part.part)
    for _ in range(2):
        rig.promote(part.part)
        assert model.device.type == "sim"
        with torch.no_grad():
            got = model.generate(ids.to("sim:0"), max_new_tokens=4, do_sample=False).cpu()
        assert torch.equal(got, expected)
        rig.park(part.part)
        rig.spill(part.part)
        rig.stage(part.part)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same_bits(model, bits(llama()))


def test_a_saved_transformers_model_is_dropped_and_read_from_its_files(rig, tmp_path):
    llama().save_pretrained(tmp_path / "llama")
    (part,) = load(
        rig, "llama", kind="transformers", options={"path": str(tmp_path / "llama"), "dtype": "bfloat16"}
    ).parts
    assert part.readable
    model = rig.mover.object_of("llama")
    rig.stage(part.part)
    expected = bits(model)
    assert isinstance(rig.drop(part.part), Moved)
    rig.stage(part.part)
    rig.promote(part.part)
    assert same_bits(model, expected)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)


def test_a_class_with_a_file_of_weights_is_read_again(rig, tmp_path):
    net = Net()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    options = {"model": Net, "weights": str(tmp_path / "net.safetensors")}
    (part,) = load(rig, "net", kind="safetensors", options=options).parts
    assert part.readable
    for _ in range(2):
        rig.stage(part.part)
        assert same_bits(rig.mover.object_of("net"), bits(net))
        rig.drop(part.part)


def test_a_dispatched_model_is_made_whole_and_cached_like_any_other(rig, tmp_path):
    from accelerate import dispatch_model

    def dispatched():
        model = llama()
        places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu"}
        places |= {f"model.layers.{i}": place for i, place in enumerate(["cpu", "disk", "cpu"])}
        return dispatch_model(model, device_map=places, main_device="cpu", offload_dir=str(tmp_path / "offload"))

    pytest.importorskip("modelcache.dataplane.materialize.entry_points")
    (part,) = load(rig, "llama", call=dispatched).parts
    model = rig.mover.object_of("llama")
    rig.stage(part.part)
    rig.promote(part.part)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(ids.to("sim:0")).logits.argmax(-1).cpu(), llama()(ids).logits.argmax(-1))
    rig.park(part.part)
    assert same_bits(model, bits(llama()))


def test_many_threads_move_many_parts_at_once(rig):
    def make(seed):
        def model():
            torch.manual_seed(seed)
            return torch.nn.Sequential(*[torch.nn.Linear(100, 100) for _ in range(5)])

        return model

    parts = {f"m{i}": load(rig, f"m{i}", call=make(i)).parts[0] for i in range(4)}
    failures = []

    def travel(name, part):
        chooser = random.Random(name)
        n, where = len(part.ram_bytes), Residency(0, len(part.ram_bytes))
        try:
            for i in range(40):
                away = Residency(0, n) == where
                k = chooser.randint(0, n)
                to = Residency(0, 0) if away else Residency(k, 0) if k != where.vram else Residency(0, n)
                spills = to == Residency(0, n)
                rig.mover.move(Move(part.part, i, where, to, n, write_image=spills))
                where = to
        except BaseException as error:
            failures.append(error)

    def load_and_forget():
        try:
            for _ in range(10):
                rig.mover.load(ModelSpec("extra", LoaderSpec(call=make(9))))
                rig.mover.forget("extra")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=travel, args=each) for each in parts.items()]
    threads.append(threading.Thread(target=load_and_forget))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    rig.check_books()
    for i, (name, part) in enumerate(parts.items()):
        if rig.mover.residency(part.part) == Residency(0, rig.n(part.part)):
            rig.stage(part.part)
        assert same_bits(rig.mover.object_of(name), bits(make(i)()))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_round_trips(rig):
    def make():
        torch.manual_seed(2)
        return torch.jit.script(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()))

    (part,) = load(rig, "m", call=make).parts
    model = rig.mover.object_of("m")
    for _ in range(2):
        rig.stage(part.part)
        rig.promote(part.part)
        rig.spill(part.part)
    rig.stage(part.part)
    with torch.no_grad():
        assert torch.equal(model(torch.ones(1, 8)), make()(torch.ones(1, 8)))


def test_a_compiled_model_is_not_compiled_again_after_a_round_trip(rig):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    def make():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))

    (part,) = load(rig, "m", call=make).parts
    rig.stage(part.part)
    model = rig.mover.object_of("m")
    compiled = torch.compile(model, backend=counter)
    x = torch.ones(2, 8, device="sim:0")
    with torch.no_grad():
        for _ in range(3):
            rig.promote_quietly(part.part)
            got = compiled(x).cpu()
            rig.park_quietly(part.part)
        assert torch.allclose(got, make()(x.cpu()), atol=1e-6)
        assert counter.frame_count == 1
        with pytest.raises(ModelNotResidentError):
            compiled(x)
    del x
