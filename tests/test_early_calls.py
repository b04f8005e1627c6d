"""Calls through a handle start while the last weights arrive; everything else waits for the last of them."""

import threading

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from modelcache import ModelCache, unwrap
from modelcache.core.messages import Arriving
from modelcache.errors import MoveError
from modelcache.testing import Faults, SimulatedDevice

SEGMENT = 1 << 16


def llama() -> torch.nn.Module:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()


def bert() -> torch.nn.Module:
    torch.manual_seed(4)
    sizes = {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 128}
    return BertModel(BertConfig(vocab_size=64, **sizes)).eval()


def vit() -> torch.nn.Module:
    torch.manual_seed(5)
    sizes = {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 128}
    return ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).eval()


def encoder() -> torch.nn.Module:
    torch.manual_seed(6)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 5).eval()


IDS = torch.arange(12).reshape(1, 12)
CASES = {
    "llama": (llama, lambda m: m(IDS).logits),
    "bert": (bert, lambda m: m(IDS).last_hidden_state),
    "vit": (vit, lambda m: m(torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)).last_hidden_state),
    "encoder": (encoder, lambda m: m(torch.linspace(-1, 1, 64 * 5).reshape(1, 5, 64))),
}


class Watched:
    """A cache with room for one of two models, on a device whose fresh memory is not a number until it is filled."""

    def __init__(self, make, link_bytes_per_s: float | None = 20e6) -> None:
        self.faults = Faults()
        self.device = SimulatedDevice(16 << 20, link_bytes_per_s=link_bytes_per_s, faults=self.faults)
        self.cache = ModelCache(device=self.device, vram="1MiB", ram="16MiB", segment=SEGMENT, progress=False)
        self.arrivals = []
        put = self.cache._driver._mailbox.put
        self.cache._driver._mailbox.put = lambda item: (
            self.arrivals.append(item.part) if isinstance(item, Arriving) else None,
            put(item),
        )
        self.cache.register("model", make)
        self.cache.register("other", lambda: torch.nn.Linear(510, 510))


@pytest.fixture
def watched():
    made: list[Watched] = []

    def make(*args, **options) -> Watched:
        made.append(Watched(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.cache.close()


@pytest.mark.parametrize("name", CASES)
def test_a_call_that_starts_early_answers_as_ever(watched, name):
    make, ask = CASES[name]
    scene = watched(make)
    with torch.no_grad():
        expected = ask(make())
        handle = scene.cache.get("model")
        first = ask(handle).cpu()
        assert torch.allclose(first, expected, atol=1e-5)
        for _ in range(3):
            with scene.cache.get("other"):
                pass
            # Not bit by bit: a layer of torch's own chooses its kernel by whether anybody looks on.
            assert torch.allclose(ask(handle).cpu(), expected, atol=1e-5)
    assert len(scene.arrivals) == 3


def test_a_block_and_a_get_wait_for_the_last_segment(watched):
    scene = watched(encoder)
    ask = CASES["encoder"][1]
    with torch.no_grad():
        handle = scene.cache.get("model")
        first = ask(handle).cpu()
        for take in (lambda: handle, lambda: scene.cache.get("model"), lambda: scene.cache.lease_many("model")):
            with scene.cache.get("other"):
                pass
            with take():
                whole = scene.cache._driver.look(lambda m: [p.state.value for p in m.books.parts.values()])
                assert "promoting" not in whole
    assert torch.allclose(ask(handle).cpu(), first, atol=1e-5)


@pytest.mark.parametrize("held", [True, False])
def test_a_call_is_let_in_while_copies_are_under_way(watched, held):
    scene = watched(encoder, link_bytes_per_s=None)
    ask = CASES["encoder"][1]
    with torch.no_grad():
        handle = scene.cache.get("model")
        first = ask(handle).cpu()
        with scene.cache.get("other"):
            pass
        answers = []

        def call() -> None:
            with torch.no_grad():
                answers.append(ask(handle if held else scene.cache.get("model")).cpu())

        with scene.faults.hold("copy_in", nth=3) as hold:
            caller = threading.Thread(target=call)
            caller.start()
            assert hold.wait_reached(10)
            while not scene.cache._driver.gates["model"].num_leases:
                caller.join(0.001)
            (is_arriving,) = scene.cache._driver.look(lambda m: [p.is_arriving for p in m.books.parts_of(["model"])])
            assert is_arriving
            scene.cache._driver.look(lambda machine: machine.validate())
        caller.join()
        assert torch.allclose(answers[0], first, atol=1e-5)


@pytest.mark.parametrize(
    "read", [lambda handle: handle.layers, unwrap, lambda handle: handle.state_dict(), lambda handle: handle.eval()]
)
def test_whatever_else_is_done_with_a_new_handle_waits_for_the_last_segment(watched, read):
    scene = watched(encoder)
    with torch.no_grad():
        CASES["encoder"][1](scene.cache.get("model"))
        with scene.cache.get("other"):
            pass
        handle = scene.cache.get("model")
        read(handle)
        assert scene.cache._driver.look(lambda m: [p.flight for p in m.books.parts_of(["model"])]) == [None]
    assert len(scene.arrivals) == 1


def test_a_copy_that_fails_under_a_call_is_its_error_and_the_next_call_brings_the_model_back(watched):
    scene = watched(encoder, link_bytes_per_s=None)
    ask = CASES["encoder"][1]
    with torch.no_grad():
        handle = scene.cache.get("model")
        first = ask(handle).cpu()
        with scene.cache.get("other"):
            pass
        hold = scene.faults.hold("copy_in", nth=2)
        scene.faults.fail("copy_in", nth=4)
        errors = []

        def call() -> None:
            try:
                ask(handle)
            except (MoveError, torch.AcceleratorError) as error:
                errors.append(str(error))

        with hold:
            caller = threading.Thread(target=call)
            caller.start()
            assert hold.wait_reached(10)
        caller.join()
        assert len(errors) == 1
        assert "injected" in errors[0]
        # A call that came before the failure was told of would be let in to meet it too.
        while scene.cache._driver.look(lambda machine: not machine.flights.is_idle):
            caller.join(0.001)
        assert torch.allclose(ask(handle).cpu(), first, atol=1e-5)
        scene.cache._driver.look(lambda machine: machine.validate())


def test_callers_of_a_model_that_arrives_run_side_by_side_and_nobody_loses_a_lease(watched):
    scene = watched(bert)
    ask = CASES["bert"][1]
    with torch.no_grad():
        handle = scene.cache.get("model")
        first = ask(handle).cpu()
        for _ in range(3):
            with scene.cache.get("other"):
                pass
            answers = []

            def call(into=answers) -> None:
                with torch.no_grad():
                    into.append(ask(handle).cpu())

            callers = [threading.Thread(target=call) for _ in range(4)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
            assert len(answers) == 4
            assert all(torch.equal(answer, first) for answer in answers)
    assert scene.cache._driver.gates["model"].num_leases == 0


def test_training_statistics_written_while_segments_arrive_are_kept(watched):
    def make() -> torch.nn.Module:
        torch.manual_seed(7)
        blocks = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64)) for _ in range(8)]
        return torch.nn.Sequential(*blocks).train()

    scene = watched(make)
    x = torch.linspace(-1, 1, 640).reshape(10, 64)
    alone = make()
    with torch.no_grad():
        handle = scene.cache.get("model")
        for _ in range(4):
            alone(x)
            handle(x)
            with scene.cache.get("other"):
                pass
        kept, expected = handle.state_dict(), alone.state_dict()
    assert all(torch.allclose(kept[name].cpu().float(), expected[name].float(), atol=1e-4) for name in expected)
    assert len(scene.arrivals) == 3
