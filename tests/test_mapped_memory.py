"""`memory: mapped` from the front door to the device."""

import pytest
import torch

from modelcache import ConfigError, ModelCache
from modelcache.config import settings_of


def layers(seed):
    def load():
        torch.manual_seed(seed)
        return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(10)))

    return load


def test_another_word_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match="memory"):
        ModelCache(device="simulated", memory="virtual")


def test_the_environment_may_say_it(monkeypatch):
    monkeypatch.setenv("MODELCACHE_MEMORY", "mapped")
    assert settings_of({}).memory == "mapped"
    assert settings_of({"memory": "allocated"}).memory == "allocated"


def test_without_a_device_it_changes_nothing():
    with ModelCache(device="host_only", memory="mapped", ram="200MiB") as cache:
        cache.register("a", layers(1), size="1MiB")
        with cache.get("a") as model:
            assert model(torch.zeros(1, 64)).shape == (1, 64)


def test_models_that_take_turns_come_back_to_the_addresses_they_had():
    given = torch.ones(2, 64)
    expected = {name: layers(seed)()(given) for name, seed in (("a", 1), ("b", 2))}
    addresses = {"a": set(), "b": set()}
    with ModelCache(device="simulated", memory="mapped", vram="8MiB", ram="200MiB", segment="2MiB") as cache:
        cache.register("a", layers(1))
        cache.register("b", layers(2))
        for _ in range(4):
            for name in ("a", "b"):
                with cache.get(name) as model:
                    assert torch.allclose(model(given.to("sim:0")).cpu(), expected[name], atol=1e-6)
                    addresses[name].add(tuple(each.data_ptr() for each in model.parameters()))
                cache.park(name)
    assert [len(each) for each in addresses.values()] == [1, 1]
