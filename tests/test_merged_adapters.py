"""LoRA adapters merged by peft itself on the device: the merge is there after every way of giving the model up."""

from __future__ import annotations

import gc

import pytest
import torch

from modelcache import ModelCache
from modelcache.errors import LeaseError, MoveError
from modelcache.testing import SimulatedDevice
from modelcache.tier import Tier

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

IDS = torch.tensor([[5, 6, 7]])


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted(base=None):
    """A model with a LoRA adapter that changes its answers, not merged."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(llama() if base is None else base, config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            # Not by peft's own drawing: a device draws other numbers than the CPU.
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def answer(model, device) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(device)).logits.cpu()


class Scene:
    def __init__(self, tmp_path) -> None:
        self.simulated = SimulatedDevice(16 << 20, link_bytes_per_s=None)
        self.device = self.simulated.torch_device
        self.cache = ModelCache(
            device=self.simulated,
            vram=128 << 10,
            ram=8 << 20,
            disk=8 << 20,
            image_dir=tmp_path,
            segment=16 << 10,
            progress=False,
        )

    def away_and_back(self, name: str, tier: Tier) -> torch.Tensor:
        self.cache.evict(name, to=tier)
        with self.cache.get(name) as model:
            return answer(model, self.device)


@pytest.fixture
def scene(tmp_path):
    made = Scene(tmp_path)
    yield made
    made.cache.close()


@pytest.fixture
def unmerged(scene):
    return answer(adapted().to(scene.device), scene.device)


@pytest.fixture
def expected(scene, unmerged):
    """What a model answers that was merged on the device and never moved again."""
    model = adapted().to(scene.device)
    model.merge_adapter()
    found = answer(model, scene.device)
    assert not torch.equal(found, unmerged)
    return found


@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
def test_an_adapter_merged_in_a_lease_is_merged_after_the_model_was_away(scene, expected, unmerged, tier):
    scene.cache.register("m", adapted)
    with scene.cache.get("m") as model:
        assert torch.equal(answer(model, scene.device), unmerged)
        model.merge_adapter()
    assert torch.equal(scene.away_and_back("m", tier), expected)
    assert scene.cache.info("m").disk_bytes > 0 or tier is Tier.RAM
    with scene.cache.get("m") as model:
        model.unmerge_adapter()
        here = answer(model, scene.device)
    torch.testing.assert_close(here, unmerged)
    assert torch.equal(scene.away_and_back("m", tier), here)


def test_a_merge_outlives_being_given_up_for_other_models(scene, expected):
    scene.cache.register("m", adapted)
    with scene.cache.get("m") as model:
        model.merge_adapter()
    scene.cache.register("other", lambda: torch.nn.Linear(170, 170).requires_grad_(requires_grad=False))
    with scene.cache.get("other"):
        assert scene.cache.info("m").state in ("parked", "partial")
    with scene.cache.get("m") as model:
        assert torch.equal(answer(model, scene.device), expected)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
def test_an_adapter_brought_merged_and_unloaded_in_one_lease_stays_in_the_weights(scene, expected, tier, safe):
    scene.cache.register("m", llama)
    with scene.cache.get("m") as model:
        adapted(model).to(scene.device).merge_and_unload(safe_merge=safe)
    assert torch.equal(scene.away_and_back("m", tier), expected)


@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
def test_a_loader_s_adapter_may_be_merged_and_unloaded(scene, expected, tier):
    scene.cache.register("m", adapted)
    with scene.cache.get("m") as model:
        model.merge_and_unload()
        assert not any("lora" in name for name, _ in model.named_parameters())
    for _ in range(2):
        assert torch.equal(scene.away_and_back("m", tier), expected)
    gc.collect()  # modules that peft took out lie in circles, with what they computed
    assert scene.simulated.allocated_bytes() == scene.cache.status().tier(Tier.VRAM).resident_bytes


def test_refuse_keeps_a_merged_model_where_it_is_and_says_so(scene, expected):
    scene.cache.register("m", adapted, on_write="refuse")
    with scene.cache.get("m") as model:
        model.merge_adapter()
    for tier in (Tier.RAM, Tier.DISK):
        with pytest.raises(LeaseError, match="'m' was written to and is not given up"):
            scene.cache.evict("m", to=tier)
    assert scene.cache.info("m").state == "ready"
    with scene.cache.get("m") as model:
        assert torch.equal(answer(model, scene.device), expected)


@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
def test_discard_gives_the_model_of_the_loader_back(scene, expected, unmerged, tier):
    scene.cache.register("m", adapted, on_write="discard")
    with scene.cache.get("m") as model:
        model.merge_adapter()
        assert torch.equal(answer(model, scene.device), expected)
    scene.cache.evict("m", to=tier)
    with scene.cache.get("m") as model:
        q = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
        assert torch.equal(q.cpu(), llama().model.layers[0].self_attn.q_proj.weight)


def test_an_adapter_that_is_left_on_a_cached_model_is_named_until_it_is_taken_off(scene):
    scene.cache.register("m", llama)
    with scene.cache.get("m") as model:
        before = answer(model, scene.device)
        peft_model = adapted(model)
    with pytest.raises(MoveError, match=r"lora_A.default.weight' was added.*unregister it and register it again"):
        scene.cache.park("m")
    with scene.cache.get("m"):
        peft_model.unload()
    assert torch.equal(scene.away_and_back("m", Tier.RAM), before)


@pytest.mark.parametrize("tier", [Tier.RAM, Tier.DISK])
def test_running_statistics_of_a_model_in_train_mode_survive(scene, tier):
    def net():
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))

    still, x = net().to(scene.device).train(), torch.linspace(-1, 1, 32).reshape(4, 8).to(scene.device)
    scene.cache.register("m", net)
    for _ in range(3):
        with torch.no_grad():
            still(x)
            with scene.cache.get("m") as model:
                model.train()(x)
        scene.cache.evict("m", to=tier)
    with scene.cache.get("m") as model:
        found = {name: value.cpu() for name, value in model.state_dict().items()}
    assert found["1.num_batches_tracked"].item() == 3
    assert all(torch.equal(found[name], value.cpu()) for name, value in still.state_dict().items())
