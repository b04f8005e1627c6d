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


def make_room(cache: ModelCache) -> None:
    with cache.get("other"):
        pass


def shown(scene, ask):
    """A handle whose model was called once after it came back, which shows what operators read; it is parked again."""
    handle = scene.cache.get("model")
    first = ask(handle).cpu()
    make_room(scene.cache)
    ask(handle)
    make_room(scene.cache)
    return handle, first


class Watched:
    """A cache with room for one of two models, on a device whose fresh memory is not a number until it is filled."""

    def __init__(self, make, link_bytes_per_s: float | None = 20e6, memory: str = "allocated") -> None:
        self.faults = Faults()
        self.device = SimulatedDevice(
            16 << 20,
            link_bytes_per_s=link_bytes_per_s,
            faults=self.faults,
            memory=memory,
            **({"granularity_bytes": 4096} if memory == "mapped" else {}),
        )
        self.cache = ModelCache(device=self.device, vram="1MiB", ram="16MiB", segment=SEGMENT, progress=False)
        self.arrivals = []
        put = self.cache._driver._mailbox.put
        self.cache._driver._mailbox.put = lambda item: (
            self.arrivals.append(item.part) if isinstance(item, Arriving) else None,
            put(item),
        )
        torch._dynamo.reset()  # another test's compiled code would keep calls from starting early
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
        handle, first = shown(scene, ask)
        assert torch.allclose(first, expected, atol=1e-5)
        for _ in range(3):
            assert torch.allclose(ask(handle).cpu(), expected, atol=1e-5)
            make_room(scene.cache)
    assert len(scene.arrivals) >= 2


def test_a_block_and_a_get_wait_for_the_last_segment(watched):
    scene = watched(encoder)
    ask = CASES["encoder"][1]
    with torch.no_grad():
        handle, first = shown(scene, ask)
        for take in (lambda: handle, lambda: scene.cache.get("model"), lambda: scene.cache.lease_many("model")):
            with scene.cache.get("other"):
                pass
            with take():
                whole = scene.cache._driver.look(lambda m: [p.state.value for p in m.books.parts.values()])
                assert "promoting" not in whole
    assert torch.allclose(ask(handle).cpu(), first, atol=1e-5)


def test_a_call_is_let_in_while_copies_are_under_way_and_others_wait_for_what_they_read(watched):
    scene = watched(encoder, link_bytes_per_s=None)
    ask = CASES["encoder"][1]
    with torch.no_grad():
        handle, first = shown(scene, ask)
        answers, read = [], []

        def call() -> None:
            with torch.no_grad():
                answers.append(ask(handle).cpu())

        def look() -> None:
            read.append({name: tensor.cpu().clone() for name, tensor in handle.named_parameters()})

        with scene.faults.hold("copy_in", nth=3) as hold:
            caller, reader = threading.Thread(target=call), threading.Thread(target=look)
            caller.start()
            assert hold.wait_reached(10)
            while not scene.cache._driver.gates["model"].num_leases:
                caller.join(0.001)
            (is_arriving,) = scene.cache._driver.look(lambda m: [p.is_arriving for p in m.books.parts_of(["model"])])
            assert is_arriving
            scene.cache._driver.look(lambda machine: machine.validate())
            reader.start()
            reader.join(0.05)
            assert reader.is_alive()
        caller.join()
        reader.join()
        assert torch.allclose(answers[0], first, atol=1e-5)
        expected = dict(encoder().named_parameters())
        assert all(torch.equal(tensor, expected[name]) for name, tensor in read[0].items())


class Paths(torch.nn.Module):
    """Calls that reach the same weights in other ways than the call that was looked at."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.embed = torch.nn.Embedding(64, 64)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(12))
        self.head = torch.nn.Linear(64, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, how: str = "plain") -> torch.Tensor:
        if how == "functional":
            return torch.nn.functional.linear(x, self.blocks[11].weight)
        if how == "head":
            return self.head(x)
        if how == "first block only":
            return self.blocks[0](x)
        for block in self.blocks:
            x = block(x)
        return self.embed(torch.tensor([63], device=x.device)) + x


X = torch.linspace(-1, 1, 64).reshape(1, 64)


@pytest.mark.parametrize("memory", ["allocated", "mapped"])
@pytest.mark.parametrize("how", ["plain", "functional", "head", "first block only"])
def test_a_call_may_take_another_way_to_the_weights(watched, how, memory):
    scene = watched(Paths, memory=memory)
    with torch.no_grad():
        expected = Paths()(X, how)
        handle, _ = shown(scene, lambda m: m(X))
        assert torch.allclose(handle(X, how).cpu(), expected, atol=1e-5)
        # What the call did not read is there all the same, to be read and written.
        assert torch.equal(handle.blocks[11].weight.cpu(), Paths().blocks[11].weight)
        for parameter in handle.parameters():
            parameter.add_(1)
        make_room(scene.cache)
        assert torch.allclose(handle.blocks[11].weight.cpu(), Paths().blocks[11].weight + 1)
    assert scene.arrivals


def test_a_block_wrapped_after_the_call_that_was_looked_at_waits_too(watched):
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.inner.weight, self.inner.bias)

    scene = watched(Paths)
    with torch.no_grad():
        expected = Paths()(X)
        handle, _ = shown(scene, lambda m: m(X))
        raw = unwrap(handle)
        raw.blocks[11] = Wrapped(raw.blocks[11])
        for _ in range(2):
            assert torch.allclose(handle(X).cpu(), expected, atol=1e-5)
            make_room(scene.cache)


def test_nothing_starts_early_once_the_compiler_made_code(watched):
    scene = watched(Paths)
    with torch.no_grad():
        expected = Paths()(X)
        handle, _ = shown(scene, lambda m: m(X))
        torch.compile(lambda x: x + 1, backend="eager")(X)
        before = len(scene.arrivals)
        for _ in range(2):
            assert torch.allclose(handle(X).cpu(), expected, atol=1e-5)
            make_room(scene.cache)
        assert len(scene.arrivals) == before
        torch._dynamo.reset()
        assert torch.allclose(handle(X).cpu(), expected, atol=1e-5)
        assert len(scene.arrivals) == before + 1


def test_a_copy_that_fails_under_a_call_is_its_error_and_the_next_call_brings_the_model_back(watched):
    scene = watched(encoder, link_bytes_per_s=None)
    ask = CASES["encoder"][1]
    with torch.no_grad():
        handle = scene.cache.get("model")
        first = ask(handle).cpu()
        make_room(scene.cache)
        ask(handle)
        make_room(scene.cache)
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
            make_room(scene.cache)
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
    assert len(scene.arrivals) >= 2
