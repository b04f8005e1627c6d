"""torch on the simulated device: operators, and real models against their results on the CPU."""

import copy
import gc
import io
import pickle
import threading

import pytest
import torch
from torch import nn

from modelcache.dataplane.device.simulated import SimulatedDevice

GUARDS = [torch.no_grad, torch.inference_mode]


@pytest.fixture
def device():
    opened = SimulatedDevice(256 << 20, link_bytes_per_s=None)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    ).eval()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ).eval()


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=2),
        nn.GroupNorm(2, 8), nn.SiLU(), nn.ConvTranspose2d(8, 4, 2), nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10), nn.Softmax(-1),
    ).eval()  # fmt: skip


class Tagger(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()


IDS = torch.tensor([[5, 17, 99, 3, 42, 7, 8, 1]])
MODELS = {
    "llama": (llama, lambda m, x: m(x).logits, IDS),
    "gpt2": (gpt2, lambda m, x: m(x).logits, IDS),
    "bert": (bert, lambda m, x: m(x).last_hidden_state, IDS),
    "t5": (t5, lambda m, x: m(x, decoder_input_ids=x).logits, IDS),
    "conv": (conv_net, lambda m, x: m(x), torch.linspace(-1, 1, 128).view(2, 1, 8, 8)),
    "lstm": (lambda: Tagger(nn.LSTM), lambda m, x: m(x), torch.linspace(-1, 1, 60).view(2, 5, 6)),
    "gru": (lambda: Tagger(nn.GRU), lambda m, x: m(x), torch.linspace(-1, 1, 60).view(2, 5, 6)),
    "rnn": (lambda: Tagger(nn.RNN), lambda m, x: m(x), torch.linspace(-1, 1, 60).view(2, 5, 6)),
    "encoder": (encoder, lambda m, x: m(x), torch.linspace(-1, 1, 160).view(2, 5, 16)),
}


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_computes_on_the_cpu(device, name, guard):
    make, call, x = MODELS[name]
    model = make()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    identities = {key: id(value) for key, value in model.named_parameters()}
    with guard():
        expected = call(model, x)
        model.to("sim:0")
        got = call(model, x.to("sim:0"))
        assert got.device == device.torch_device
        torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=1e-5)
        assert {p.device for p in model.parameters()} == {device.torch_device}
        model.to("cpu")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert {key: id(value) for key, value in model.named_parameters()} == identities
    del got
    gc.collect()
    assert device.allocated_bytes() == 0


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("make", [llama, gpt2, t5])
@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"num_beams": 2, "do_sample": False}], ids=["greedy", "beams"]
)
def test_generate_gives_the_tokens_of_the_cpu(device, make, guard, options):
    model = make()
    mask = torch.ones_like(IDS)
    with guard():
        expected = model.generate(IDS, attention_mask=mask, max_new_tokens=5, pad_token_id=0, **options)
        model.to("sim:0")
        got = model.generate(
            IDS.to("sim:0"), attention_mask=mask.to("sim:0"), max_new_tokens=5, pad_token_id=0, **options
        )
    assert got.device == device.torch_device
    assert torch.equal(got.cpu(), expected)


def test_sampling_draws_the_tokens_of_the_cpus_generator(device):
    model = gpt2()
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "pad_token_id": 0, "do_sample": True}
    torch.manual_seed(7)
    expected = model.generate(IDS, **options)
    model.to("sim:0")
    torch.manual_seed(7)
    got = model.generate(IDS.to("sim:0"), **options | {"attention_mask": torch.ones_like(IDS).to("sim:0")})
    assert torch.equal(got.cpu(), expected)


def test_half_precision_models_run(device):
    model = llama().to(torch.bfloat16)
    with torch.no_grad():
        expected = model(IDS).logits
        got = model.to("sim:0")(IDS.to("sim:0")).logits
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.cpu(), expected, atol=1e-2, rtol=1e-2)


def test_a_compiled_model_runs_and_is_not_compiled_again_when_its_memory_moves(device):
    compiles = []

    def backend(graph, _inputs):
        compiles.append(graph)
        return graph.forward

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).requires_grad_(False).to("sim:0")
    compiled = torch.compile(model, backend=backend)
    x = torch.ones(2, 4).to("sim:0")
    expected = compiled(x).cpu()
    for _ in range(3):
        for p in model.parameters():
            p.data = p.data.clone()
        assert torch.equal(compiled(x).cpu(), expected)
    assert len(compiles) == 1
    torch._dynamo.reset()


def test_accelerate_dispatches_over_device_cpu_and_disk(device, tmp_path):
    from accelerate import dispatch_model

    model = llama()
    with torch.no_grad():
        expected = model(IDS).logits
    # accelerate knows tied weights by their address, also once the memory was freed and another weight is there.
    kept = model.lm_head.weight.data
    places = {
        "model.embed_tokens": "sim:0",
        "model.layers.0": "sim:0",
        "model.layers.1": "cpu",
        "model.layers.2": "disk",
        "model.norm": "sim:0",
        "model.rotary_emb": "sim:0",
        "lm_head": "sim:0",
    }
    dispatch_model(model, device_map=places, main_device="sim:0", offload_dir=tmp_path)
    assert {str(p.device) for p in model.parameters()} == {"sim:0", "meta"}
    for guard in GUARDS:
        with guard():
            got = model(IDS.to("sim:0")).logits
            torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=1e-5)
            model.generate(
                IDS.to("sim:0"),
                attention_mask=torch.ones_like(IDS).to("sim:0"),
                max_new_tokens=3,
                do_sample=False,
                pad_token_id=0,
            )
    assert kept.device.type == "cpu"


def test_accelerates_cpu_offload_brings_weights_only_for_the_call(device):
    from accelerate import cpu_offload

    model, x = conv_net(), torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
    with torch.no_grad():
        expected = model(x)
        cpu_offload(model, execution_device="sim:0", offload_buffers=True)
        got = model(x.to("sim:0"))
    torch.testing.assert_close(got.cpu(), expected)
    del got
    gc.collect()
    assert device.allocated_bytes() == 0


# --- mixing devices ---


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: there @ here,
        lambda here, there: torch.nn.functional.linear(here, there),
        lambda here, there: torch.cat([here, there]),
        lambda here, there: there.add_(here),
        lambda here, there: torch.where(there > 0, there, here),
        lambda here, there: nn.functional.embedding(here.long(), there),
        lambda here, there: torch.add(here, here, out=there),
        lambda here, there: there.index_put_((torch.tensor([0]),), here[0]),
    ],
)
def test_mixing_devices_raises_as_torch_does(device, mix):
    with pytest.raises(RuntimeError, match="two devices|same device"):
        mix(torch.ones(2, 2), torch.ones(2, 2).to("sim:0"))


def test_a_model_on_the_device_refuses_cpu_input(device):
    with pytest.raises(RuntimeError, match="sim:0 and cpu"):
        bert().to("sim:0")(IDS)


def test_an_error_is_not_lost_when_a_tensor_dies_on_its_way(device):
    for _ in range(3):
        with pytest.raises(TypeError, match="convert sim:0"):
            torch.ones(2).to("sim:0").numpy()
    gc.collect()
    assert device.allocated_bytes() == 0


def test_scalars_and_cpu_indices_mix_as_on_other_accelerators(device):
    x = torch.arange(12.0).view(3, 4)
    y = x.to("sim:0")
    assert torch.equal((y + torch.tensor(2.0)).cpu(), x + 2)
    assert torch.equal(y[torch.tensor([0, 2])].cpu(), x[[0, 2]])
    assert torch.equal(y[:, torch.tensor([1, 3])].cpu(), x[:, [1, 3]])
    y[torch.tensor([1])] = 5.0
    assert y[1].tolist() == [5.0] * 4


# --- out=, views, in place ---


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("shape", [(0,), (3, 4)])
def test_out_variants_fill_and_resize(device, guard, shape):
    x = torch.arange(12.0).view(3, 4)
    with guard():
        y, out = x.to("sim:0"), torch.empty(shape, device="sim:0")
        assert torch.add(y, 1, out=out) is out
        assert torch.equal(out.cpu(), x + 1)
        values, indices = torch.empty(0, device="sim:0"), torch.empty(0, dtype=torch.int64, device="sim:0")
        torch.topk(y, 2, out=(values, indices))
        expected = torch.topk(x, 2)
        assert torch.equal(values.cpu(), expected.values)
        assert torch.equal(indices.cpu(), expected.indices)
        torch.mm(y, y.T.contiguous(), out=out.resize_(3, 3))
        torch.testing.assert_close(out.cpu(), x @ x.T)
        piece = torch.zeros(2, 3, 4, device="sim:0")
        torch.mul(y, 2, out=piece[1])
        assert torch.equal(piece.cpu(), torch.stack([torch.zeros(3, 4), x * 2]))


def test_an_out_of_another_shape_is_resized_with_torchs_warning(device):
    out = torch.empty(5, device="sim:0")
    with pytest.warns(UserWarning, match="resized"):
        torch.add(torch.ones(2, 3).to("sim:0"), 1, out=out)
    assert out.tolist() == [[2.0] * 3] * 2


def test_an_operator_may_write_over_its_own_input(device):
    x = torch.arange(9.0).view(3, 3)
    y = x.to("sim:0")
    assert torch.add(y, y, out=y) is y
    torch.addmm(y, y.clone(), y.clone(), out=y)
    expected = x * 2
    torch.addmm(expected, expected.clone(), expected.clone(), out=expected)
    torch.testing.assert_close(y.cpu(), expected)
    y.cumsum_(0)
    torch.testing.assert_close(y.cpu(), expected.cumsum(0))


def test_views_share_the_storage_of_their_base(device):
    base = torch.arange(24.0).to("sim:0")
    views = [
        base.view(4, 6),
        base[3:9],
        base.view(2, 3, 4).permute(2, 0, 1),
        base.view(torch.int32),
        base.unfold(0, 3, 2),
        base.expand(2, 24),
        base.detach(),
        base.chunk(3)[1],
        base.view(12, 2).unbind(1)[1],
        torch.view_as_complex(base.view(12, 2)),
    ]
    reference = torch.arange(24.0)
    assert {view.untyped_storage()._cdata for view in views} == {base.untyped_storage()._cdata}
    assert views[1].storage_offset() == 3
    base.mul_(2)
    reference.mul_(2)
    assert torch.equal(views[2].cpu(), reference.view(2, 3, 4).permute(2, 0, 1))
    assert torch.equal(views[4].cpu(), reference.unfold(0, 3, 2))
    assert torch.equal(views[9].cpu(), torch.view_as_complex(reference.view(12, 2)))
    views[1].zero_()
    assert base[3:9].eq(0).all()
    assert base.view(4, 6)._base is base


def test_shapes_change_in_place(device):
    x = torch.arange(6.0).to("sim:0")
    x.resize_(2, 3)
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
    x.resize_(3, 4)
    assert x.flatten()[:6].tolist() == [0, 1, 2, 3, 4, 5]
    x.t_()
    assert tuple(x.shape) == (4, 3)
    x.unsqueeze_(0).squeeze_(0)
    y = torch.empty(0, device="sim:0").set_(x)
    assert y.untyped_storage()._cdata == x.untyped_storage()._cdata
    y.set_()
    assert y.numel() == 0
    z = torch.empty(0, device="sim:0").set_(x.untyped_storage())
    assert z.numel() == 12


def test_results_that_are_several_pieces_of_one_memory_are_charged_once(device):
    x = torch.ones(64, 64).to("sim:0")
    before = device.allocated_bytes()
    pieces = torch.linalg.qr(x)
    assert device.allocated_bytes() - before == sum(piece.untyped_storage().nbytes() for piece in pieces)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sort(dim=-1), lambda x: x.argmax(-1), lambda x: x.nonzero(), lambda x: x[x > 3], lambda x: torch.where(x > 2, x, -x),
        lambda x: x.softmax(-1), lambda x: torch.einsum("ij,kj->ik", x, x), lambda x: x.cumsum(0), lambda x: x.to(torch.float16),
        lambda x: x.std(0), lambda x: torch.bincount(x.long().flatten()), lambda x: x.repeat_interleave(2, 0), lambda x: torch.tril(x),
        lambda x: nn.functional.one_hot(x.long()), lambda x: torch.stack([x, x]).amax(0), lambda x: x.masked_fill(x > 4, float("-inf")),
        lambda x: torch.linalg.svdvals(x), lambda x: torch.fft.rfft(x), lambda x: nn.functional.pad(x, (1, 2)), lambda x: x.gather(1, x.long() % 4),
        lambda x: torch.nn.functional.interpolate(x.view(1, 1, 3, 4), size=(6, 8), mode="bilinear"), lambda x: torch.scatter_add(x, 1, x.long() % 4, x),
        lambda x: torch.unique(x.long() % 3, return_counts=True), lambda x: x.new_zeros(3) + torch.arange(3, device=x.device), lambda x: torch._foreach_mul([x, x], 2.0),
        lambda x: torch.linspace(0, 1, 5, device=x.device), lambda x: torch.full((2, 2), 7, device=x.device), lambda x: torch.eye(3, device=x.device),
        lambda x: x.equal(x.clone()), lambda x: bool(x.isnan().any()), lambda x: x.sum().item(), lambda x: x.float().quantile(0.3), lambda x: torch.cdist(x, x),
        lambda x: torch.as_tensor([1, 2], device=x.device), lambda x: nn.functional.scaled_dot_product_attention(x.view(1, 1, 3, 4), x.view(1, 1, 3, 4), x.view(1, 1, 3, 4), is_causal=True),
    ],
)  # fmt: skip
def test_operators_agree_with_the_cpu(device, operation):
    x = (torch.arange(12.0).view(3, 4) * 1.7) % 5
    expected, got = operation(x), operation(x.to("sim:0"))
    if isinstance(expected, torch.Tensor):
        assert got.device == device.torch_device
        got = got.cpu()
    elif isinstance(expected, tuple | list):
        assert all(each.device == device.torch_device for each in got)
        got = [each.cpu() for each in got]
        expected = list(expected)
    torch.testing.assert_close(got, expected)


def test_a_packed_sequence_keeps_its_lengths_on_the_cpu(device):
    sequence = torch.arange(12.0).view(2, 6, 1)
    packed = nn.utils.rnn.pack_padded_sequence(sequence.to("sim:0"), torch.tensor([6, 4]), batch_first=True)
    assert (packed.data.device.type, packed.batch_sizes.device.type) == ("sim", "cpu")
    back, lengths = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    assert lengths.tolist() == [6, 4]
    assert back[0].cpu().equal(sequence[0])


# --- the rest of torch ---


def test_deep_copies_are_of_the_device_and_keep_ties(device):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).to("sim:0")
    model[2].weight = model[0].weight
    model.register_buffer("shared", model[1].running_mean)
    twin = copy.deepcopy(model)
    assert {t.device for t in [*twin.parameters(), *twin.buffers()]} == {device.torch_device}
    assert twin[2].weight is twin[0].weight
    assert twin.shared is twin[1].running_mean
    held = device.allocated_bytes()
    twin[1].running_mean.fill_(3.0)
    assert model[1].running_mean.eq(0).all()
    del twin
    gc.collect()
    assert device.allocated_bytes() < held


def test_a_state_dict_is_saved_as_bytes_of_its_own_and_read_back(device):
    memory = device.allocate(4096)
    memory.zero_()
    model = nn.Linear(4, 4).requires_grad_(False)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    for offset, p in zip((512, 1024), model.parameters(), strict=True):
        view = device.storage(memory, offset, p.nbytes).view(p.dtype).view(p.shape)
        view.copy_(p)
        p.data = view
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert file.tell() < 4096
    file.seek(0)
    loaded = torch.load(file, map_location="cpu")
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    model.load_state_dict({name: weight + 1 for name, weight in loaded.items()})
    assert torch.equal(memory.cpu()[512:576].view(torch.float32), (weights["weight"] + 1).flatten())


def test_safetensors_saves_a_model_on_the_device(device, tmp_path):
    from safetensors.torch import load_file, save_model

    model = llama().to("sim:0")
    save_model(model, str(tmp_path / "model.safetensors"))
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(value, model.state_dict()[name].cpu()) for name, value in loaded.items())


def test_pickles_hold_the_numbers(device):
    assert pickle.loads(pickle.dumps(torch.arange(4.0).to("sim:0"))).tolist() == [0, 1, 2, 3]


def test_a_bare_storage_on_the_device_does_not_crash(device):
    assert torch.UntypedStorage(16, device="sim:0").nbytes() == 16


def test_training_works_on_the_first_index(device):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    twin = copy.deepcopy(model).to("sim:0")
    x = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
    for each, data in ((model, x), (twin, x.to("sim:0"))):
        each(data).square().sum().backward()
        torch.optim.SGD(each.parameters(), lr=0.1).step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(b.cpu(), a)


def test_random_numbers_are_the_cpus(device):
    torch.manual_seed(3)
    expected = torch.randn(5)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(5, device="sim:0").cpu(), expected)
    with torch.random.fork_rng():
        torch.rand(3, device="sim:0")


def test_the_default_device_of_a_block_is_obeyed(device):
    with torch.device("sim:0"):
        model = nn.Linear(2, 2)
        assert torch.ones(2).device == device.torch_device
        assert model(torch.ones(2)).device == device.torch_device


def test_cpu_work_is_as_before(device):
    assert not torch.ones(2).is_pinned()
    assert torch.ones(2).device.type == "cpu"
    assert torch.empty(0).device.type == "cpu"


def test_an_index_is_chosen_for_a_block_of_code(device):
    second = SimulatedDevice(1 << 20)
    with torch.sim.device(1):
        assert str(torch.ones(2, device="sim").device) == "sim:1"
        assert torch.sim.current_device() == 1
    assert str(torch.ones(2, device="sim").device) == "sim:0"
    assert torch.sim.device_count() == 2
    second.close()


def test_threads_compute_at_once_on_one_model(device):
    model = bert()
    inputs = [torch.randint(0, 200, (1, 6)) for _ in range(4)]
    with torch.no_grad():
        expected = [model(x).last_hidden_state for x in inputs]
    model.to("sim:0")
    got, failures = {}, []

    def work(n):
        try:
            with torch.inference_mode():
                for _ in range(3):
                    got[n] = model(inputs[n].to("sim:0")).last_hidden_state.cpu()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for n in range(4):
        torch.testing.assert_close(got[n], expected[n], atol=1e-5, rtol=1e-5)


def test_running_out_in_the_middle_of_a_forward_leaves_nothing_behind():
    model, x = bert(), IDS
    size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    device = SimulatedDevice(size + 8_000, link_bytes_per_s=None)
    model.to(device.torch_device)
    held = device.allocated_bytes()
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        model(x.repeat(4, 4).to(device.torch_device))
    gc.collect()
    assert device.allocated_bytes() == held
    device.close()
