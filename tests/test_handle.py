"""The handle: behaves as the model, and holds a lease whenever the model is used."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import gc
import inspect
import itertools
import logging
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from doors import OneModel, handle_of
from interrupts import interrupted
from torch import nn

from modelcache.errors import CacheClosedError, LeaseTimeoutError
from modelcache.handle import ModelHandle, unwrap

CPU = torch.device("cpu")


class Net(nn.Module):
    """A module that can say whether it is leased while it runs."""

    door: OneModel

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.temperature = 1.0

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """Scale and shift."""
        assert self.door.num_leases >= 1
        return self.linear(x) * scale

    def encode(self, sentences: list[str], batch_size: int = 2) -> torch.Tensor:
        """As a sentence-transformers model: many forwards in one call."""
        batches = [sentences[i : i + batch_size] for i in range(0, len(sentences), batch_size)]
        return torch.cat([self(torch.tensor([[float(len(text)), 1.0] for text in batch])) for batch in batches])

    def fail(self) -> None:
        assert self.door.num_leases >= 1
        raise ValueError("no")

    def fluent(self) -> Net:
        assert self.door.num_leases == 1
        return self

    def num_leases_now(self) -> int:
        return self.door.num_leases

    def _private(self) -> int:
        return self.door.num_leases

    @property
    def base_model(self) -> Net:
        return self

    @property
    def leases_seen_by_property(self) -> int:
        return self.door.num_leases

    @classmethod
    def build(cls) -> str:
        return cls.__name__

    @staticmethod
    def version() -> int:
        return 1


@pytest.fixture
def net() -> tuple[Any, OneModel]:
    return net_with()


def net_with(**options: Any) -> tuple[Any, OneModel]:
    model = Net()
    handle, door = handle_of(model, CPU, **options)
    object.__setattr__(model, "door", door)
    return handle, door


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_call_that_raises_returns_the_lease(net):
    handle, door = net

    with pytest.raises(ValueError, match="no"):
        handle.fail()
    with pytest.raises(TypeError):
        handle("too", "many")

    assert door.num_leases == 0


def test_a_call_whose_inputs_cannot_be_moved_returns_the_lease(net):
    handle, door = net

    class Broken(dict):
        def items(self) -> Any:
            raise KeyError("broken")

    with pytest.raises(KeyError):
        handle(Broken())

    assert door.num_leases == 0


def test_a_block_that_raises_returns_the_lease(net):
    handle, door = net

    with pytest.raises(ZeroDivisionError), handle:
        1 / 0  # noqa: B018

    assert door.num_leases == 0


def test_a_call_that_gets_no_lease_runs_nothing(net):
    handle, door = net
    door.gate.close()

    with pytest.raises(LeaseTimeoutError):
        handle(torch.zeros(2))

    assert door.num_leases == 0


def test_an_attribute_the_model_lacks_is_missing(net):
    handle, _ = net

    with pytest.raises(AttributeError, match=r"'Net' object has no attribute 'lease'"):
        handle.lease
    assert not hasattr(handle, "park")


def test_a_model_that_is_not_callable_says_so_itself():
    handle, door = handle_of(object(), CPU)

    with pytest.raises(TypeError, match="'object' object is not callable"):
        handle()
    assert door.num_leases == 0


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copying_is_refused_with_what_to_do(net, duplicate):
    with pytest.raises(TypeError, match=r"the handle of 'flux' cannot be copied: .*call cache.get\('flux'\) there"):
        duplicate(net[0])


def test_pickling_is_refused_with_what_to_do(net):
    with pytest.raises(TypeError, match=r"the handle of 'flux' cannot be pickled: .*modelcache.unwrap\(handle\)"):
        pickle.dumps(net[0])


# --- calls ------------------------------------------------------------------------------------------------------------


def test_a_call_holds_one_lease_and_gives_the_models_answer(net):
    handle, door = net
    x = torch.ones(1, 2)

    assert torch.equal(handle(x, scale=2.0), unwrap(handle).linear(x) * 2.0)
    assert door.num_acquired == 1
    assert door.num_leases == 0


def test_one_lease_spans_all_batches_of_a_method(net):
    handle, door = net

    vectors = handle.encode(["a", "bb", "ccc", "dddd", "eeeee"])

    assert vectors.shape == (5, 2)
    assert door.num_acquired == 1


def test_a_method_kept_by_the_caller_leases_each_time(net):
    handle, door = net
    method = handle.num_leases_now

    assert method() == 1
    assert method() == 1
    assert door.num_acquired == 2


def test_a_method_that_returns_the_model_returns_the_handle(net):
    handle, _ = net

    assert handle.fluent() is handle
    assert handle.eval() is handle
    assert handle.train(False) is handle
    assert handle.requires_grad_(False) is handle
    assert handle.base_model is handle


def test_a_method_replaced_on_the_instance_is_still_leased(net):
    handle, door = net
    model = unwrap(handle)
    # accelerate replaces `forward` by a partial of a hooked function.
    model.forward = functools.partial(lambda module, x: module.door.num_leases, model)

    assert handle.forward(torch.zeros(2)) == 1


def test_a_method_of_a_part_given_out_by_the_model_is_leased(net):
    handle, door = net

    class Outer:
        """As peft and compiled modules: what it lacks, its inner model has."""

        def __getattr__(self, name: str) -> Any:
            return getattr(unwrap(handle), name)

    outer, outer_door = handle_of(Outer(), CPU)
    unwrap(handle).__dict__["door"] = outer_door

    assert outer.num_leases_now() == 1


def test_class_methods_static_methods_and_private_methods_take_no_lease(net):
    handle, door = net

    assert handle.build() == "Net"
    assert handle.version() == 1
    assert handle._private() == 0
    assert door.num_acquired == 0


def test_a_method_looks_like_the_models_own(net):
    handle, _ = net

    assert inspect.signature(handle.forward) == inspect.signature(unwrap(handle).forward)
    assert inspect.ismethod(handle.forward)
    assert handle.forward.__doc__ == "Scale and shift."
    assert handle.forward.__name__ == "forward"
    assert inspect.signature(handle) == inspect.signature(unwrap(handle))


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_a_block_yields_the_raw_model_under_one_lease(net):
    handle, door = net

    with handle as model:
        assert model is unwrap(handle)
        assert type(model) is Net
        model(torch.zeros(1, 2))
        model(torch.zeros(1, 2))

    assert door.num_acquired == 1
    assert door.num_leases == 0


def test_blocks_nest(net):
    handle, door = net

    with handle, handle as model:
        assert door.num_leases == 2
        handle(torch.zeros(1, 2))
        assert model.num_leases_now() == 2

    assert door.num_leases == 0
    assert not handle._self_tie.entered


def test_an_inner_block_leaves_the_outer_ones_lease(net):
    handle, door = net

    with handle:
        with handle:
            pass
        assert door.num_leases == 1


def test_threads_use_one_handle_in_blocks_at_once(net):
    handle, door = net
    all_in = threading.Barrier(4)

    def use() -> int:
        with handle as model:
            all_in.wait()
            seen = door.num_leases
            all_in.wait()
            model(torch.zeros(1, 2))
        return seen

    with ThreadPoolExecutor(4) as pool:
        seen = [future.result() for future in [pool.submit(use) for _ in range(4)]]

    assert seen == [4, 4, 4, 4]
    assert door.num_leases == 0
    assert not handle._self_tie.entered


def test_tasks_that_use_one_handle_in_blocks_each_return_their_own_lease(net):
    handle, door = net

    async def main() -> None:
        both_in, first_left = asyncio.Event(), asyncio.Event()

        async def first() -> None:
            with handle:
                await both_in.wait()
            first_left.set()

        async def second() -> None:
            with handle:
                with handle:
                    both_in.set()
                    await first_left.wait()
                    assert [holder() for holder in door.gate.holders()] == [asyncio.current_task()] * 2
                assert door.num_leases == 1
            assert door.num_leases == 0

        await asyncio.gather(first(), second())

    asyncio.run(main())
    assert not handle._self_tie.entered


def test_a_block_around_an_event_loop_is_left_after_those_of_its_tasks(net):
    handle, door = net

    async def main() -> None:
        with handle:
            assert door.num_leases == 2
        assert door.num_leases == 1

    with handle:
        asyncio.run(main())
        assert list(door.gate.holders()) == [threading.current_thread()]

    assert door.num_leases == 0


def test_a_block_entered_in_one_task_may_be_left_in_another(net):
    handle, door = net
    stack = contextlib.ExitStack()

    async def enter() -> None:
        stack.enter_context(handle)

    async def leave() -> None:
        assert door.num_leases == 1
        stack.close()

    asyncio.run(enter())
    asyncio.run(leave())

    assert door.num_leases == 0
    assert not handle._self_tie.entered


def test_a_task_that_is_dropped_inside_a_block_is_not_kept_by_its_handle(net):
    handle, door = net

    async def main() -> weakref.ref[Any]:
        async def stay() -> None:
            with handle:
                await asyncio.get_running_loop().create_future()

        task = asyncio.create_task(stay())
        await asyncio.sleep(0)
        assert door.num_leases == 1
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        return weakref.ref(task)

    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(main())
    gc.collect()
    loop.close()

    assert task() is None
    assert door.num_leases == 0


def test_a_block_entered_on_one_thread_may_be_left_on_another(net):
    handle, door = net
    stack = contextlib.ExitStack()
    stack.enter_context(handle)

    thread = threading.Thread(target=stack.close)
    thread.start()
    thread.join()

    assert door.num_leases == 0


def test_calls_of_many_threads_balance(net):
    handle, door = net

    def use() -> None:
        for _ in range(50):
            handle(torch.zeros(1, 2))
            with handle as model:
                model(torch.zeros(1, 2))

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(use) for _ in range(4)]:
            future.result()

    assert door.num_leases == 0
    assert door.num_acquired == 400


# --- the first use ----------------------------------------------------------------------------------------------------


def first_handle(limit: int = 0) -> tuple[Any, OneModel]:
    _, door = net_with(limit=limit)
    return ModelHandle("flux", door, door.first_use("flux")), door


def test_the_first_call_uses_the_first_lease_and_returns_it():
    handle, door = first_handle()
    assert door.num_leases == 1

    assert handle.num_leases_now() == 1

    assert door.num_leases == 0
    assert door.num_acquired == 0
    handle.num_leases_now()
    assert door.num_acquired == 1


def test_the_first_call_works_at_a_limit_of_one():
    handle, door = first_handle(limit=1)

    with handle:
        assert door.num_leases == 1
    handle.num_leases_now()

    assert door.num_leases == 0


def test_a_first_lease_that_was_given_up_is_replaced_by_a_new_one():
    _, door = net_with()
    handle: Any = ModelHandle("flux", door, door.first_use("flux"))
    door.end_first_uses()
    assert door.num_leases == 0

    assert handle.num_leases_now() == 1
    assert door.num_acquired == 1


def test_a_timer_that_runs_out_inside_the_first_call_takes_nothing():
    _, door = net_with()
    handle: Any = ModelHandle("flux", door, door.first_use("flux"))

    with handle:
        door.end_first_uses()
        assert door.num_leases == 1

    assert door.num_leases == 0


def test_a_handle_that_is_dropped_unused_returns_its_first_lease():
    handle, door = first_handle()

    del handle
    gc.collect()

    assert door.num_leases == 0


def test_reading_attributes_keeps_the_first_lease():
    handle, door = first_handle()

    assert handle.temperature == 1.0
    handle.state_dict()

    assert door.num_leases == 1


# --- what takes no lease ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda h: list(h.parameters()),
        lambda h: list(h.named_parameters()),
        lambda h: list(h.buffers()),
        lambda h: list(h.modules()),
        lambda h: list(h.children()),
        lambda h: list(h.named_modules()),
        lambda h: h.state_dict(),
        lambda h: h.eval(),
        lambda h: h.train(),
        lambda h: h.requires_grad_(True),
        lambda h: h.linear,
        lambda h: h.temperature,
        lambda h: h.device,
        lambda h: h.training,
        repr,
        str,
        dir,
    ],
)
def test_looking_at_a_model_takes_no_lease(net, read):
    handle, door = net

    read(handle)

    assert door.num_acquired == 0


def test_a_property_is_read_without_a_lease(net):
    assert net[0].leases_seen_by_property == 0


def test_an_attribute_that_is_set_is_set_on_the_model(net):
    handle, _ = net

    handle.temperature = 0.5
    handle.linear.bias.data.zero_()
    handle.extra = nn.Linear(1, 1)

    model = unwrap(handle)
    assert model.temperature == 0.5
    assert "extra.weight" in model.state_dict()
    del handle.extra
    assert not hasattr(model, "extra")


def test_containers_behave_as_containers():
    handle, door = handle_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), CPU)

    assert len(handle) == 2
    assert handle[1] is unwrap(handle)[1]
    assert [type(layer) for layer in handle] == [nn.Linear, nn.ReLU]
    assert door.num_acquired == 0


# --- identity ---------------------------------------------------------------------------------------------------------


def test_a_handle_is_an_instance_of_the_models_class(net):
    handle, _ = net

    assert isinstance(handle, Net)
    assert isinstance(handle, nn.Module)
    assert handle.__class__ is Net
    assert type(handle) is ModelHandle
    assert callable(handle)


def test_a_handle_shows_name_type_and_state(net):
    assert repr(net[0]) == "<modelcache: flux Net vram 22.1 GiB>"


def test_a_handle_of_a_closed_cache_can_still_be_shown(net, monkeypatch):
    handle, door = net

    def closed(name: str) -> str:
        raise CacheClosedError

    monkeypatch.setattr(door, "state_of", closed)
    assert repr(handle) == "<modelcache: flux Net the cache is closed; create a new ModelCache>"


def test_unwrap_gives_the_raw_object_and_leaves_others_alone(net):
    handle, door = net

    assert unwrap(handle) is door.model
    assert unwrap(door.model) is door.model
    assert unwrap(3) == 3


def test_device_is_where_calls_will_run():
    handle, _ = handle_of(Net(), torch.device("cuda:0"))

    assert handle.device == torch.device("cuda:0")
    assert not hasattr(unwrap(handle), "device")


def test_a_model_with_a_device_of_its_own_answers_where_calls_will_run():
    class Pipeline:
        device = CPU

    handle, _ = handle_of(Pipeline(), torch.device("cuda:0"))

    assert handle.device == torch.device("cuda:0")


def test_no_name_is_added_to_the_models_own(net):
    handle, door = net

    public = {name for name in dir(type(handle)) if not name.startswith("_")}
    assert public == set()
    assert set(dir(handle)) == set(dir(door.model))


# --- torch ------------------------------------------------------------------------------------------------------------


def test_a_parent_module_keeps_the_childs_weights_in_its_state(net):
    handle, door = net
    parent = nn.Module()
    parent.child = handle

    assert list(parent.state_dict()) == ["child.linear.weight", "child.linear.bias"]
    assert [name for name, _ in parent.named_parameters()] == ["child.linear.weight", "child.linear.bias"]
    assert parent.child is handle
    assert parent.eval() is parent
    assert not unwrap(handle).training
    parent.load_state_dict(parent.state_dict())
    assert door.num_leases == 0


def test_a_parent_module_leases_the_child_when_it_calls_it(net):
    handle, door = net

    nn.Sequential(handle, nn.ReLU())(torch.zeros(1, 2))

    assert door.num_acquired == 1
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(nn.Sequential(handle))


def test_load_state_dict_holds_a_lease_while_it_writes(net):
    handle, door = net

    handle.load_state_dict({"linear.weight": torch.ones(2, 2), "linear.bias": torch.zeros(2)})

    assert door.num_acquired == 1
    assert torch.equal(handle.linear.weight, torch.ones(2, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.timeout(60)
def test_compiling_a_handle_compiles_the_model_once_and_leases_each_call():
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).relu()

    handle, door = handle_of(Layers(), CPU)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(handle, backend=backend)
    answers = [compiled(torch.ones(1, 2)) for _ in range(12)]

    assert len(graphs) == 1
    assert door.num_acquired == 12
    assert door.num_leases == 0
    assert torch.equal(answers[-1], unwrap(handle)(torch.ones(1, 2)))


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_gpt() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import GPT2Config, GPT2LMHeadModel

        logging.getLogger("transformers").setLevel(logging.ERROR)
        config = GPT2Config(
            vocab_size=20, n_positions=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
        )
        return GPT2LMHeadModel(config).eval()


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
def test_generate_holds_one_lease_for_all_its_tokens(tiny_gpt):
    handle, door = handle_of(tiny_gpt, CPU)
    seen: list[int] = []
    hook = tiny_gpt.register_forward_pre_hook(lambda *_: seen.append(door.num_leases))
    ids = torch.tensor([[2, 3]])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}

    tokens = handle.generate(ids, **settings)
    hook.remove()

    assert torch.equal(tokens, tiny_gpt.generate(ids, **settings))
    assert seen == [1] * 5
    assert door.num_acquired == 1
    assert door.num_leases == 0


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
def test_a_handle_serves_as_the_model_of_a_transformers_pipeline(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, pipeline

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "day"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    ).eval()
    handle, door = handle_of(model, CPU)

    answer = pipeline("text-classification", model=handle, tokenizer=tokenizer, device="cpu")("a good day")

    assert answer == pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")("a good day")
    assert door.num_acquired >= 1
    assert door.num_leases == 0


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_as_the_model_keeps_its_lease_for_a_stream_of_inputs(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, pipeline

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "day"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    ).eval()
    seen: list[int] = []
    model.register_forward_pre_hook(lambda *_: seen.append(door.num_leases))
    pipe = pipeline(
        "text-classification", model=model, tokenizer=BertTokenizer(str(tmp_path / "vocab.txt")), device="cpu"
    )
    handle, door = handle_of(pipe, CPU, limit=1)

    def texts() -> Iterator[str]:
        yield from ["a day", "a good day"]

    answers = handle(texts())
    assert door.num_leases == 1
    assert len(list(answers)) == 2

    assert seen == [1, 1]
    assert door.num_leases == 0
    assert door.num_acquired == 1
    assert "BertForSequenceClassification" not in repr(handle)


# --- event loops ------------------------------------------------------------------------------------------------------


def test_a_handle_that_is_not_ready_warns_once_inside_an_event_loop(net):
    handle, door = net
    door.ready = False

    async def run() -> None:
        with pytest.warns(RuntimeWarning, match=r"'flux' is not ready.*async with cache.aget\('flux'\)") as caught:
            handle(torch.zeros(1, 2))
        assert caught[0].filename == __file__
        handle(torch.zeros(1, 2))
        with handle:
            pass

    asyncio.run(run())


def test_a_ready_handle_does_not_warn_inside_an_event_loop(net):
    handle, _ = net

    async def run() -> None:
        handle(torch.zeros(1, 2))

    asyncio.run(run())


def test_a_handle_that_is_not_ready_does_not_warn_outside_an_event_loop(net):
    handle, door = net
    door.ready = False

    handle(torch.zeros(1, 2))


# --- interrupts -------------------------------------------------------------------------------------------------------


def call(handle: Any) -> None:
    handle.answer()


def enter(handle: Any) -> None:
    with handle:
        pass


def stream(handle: Any) -> None:
    for _ in handle.stream():
        pass


class Talker:
    def answer(self) -> int:
        return 1

    def stream(self) -> Iterator[int]:
        yield 1


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("use", [call, enter, stream])
@pytest.mark.parametrize("with_first", [False, True])
def test_an_interrupt_at_any_bytecode_loses_no_lease(use: Callable[[Any], None], with_first: bool):
    for after in itertools.count():
        door = OneModel(Talker(), CPU)
        handle = ModelHandle("flux", door, door.first_use("flux") if with_first else None)
        struck = interrupted(functools.partial(use, handle), after)
        expected = 1 if with_first and handle._self_tie.first is not None else 0
        # Interrupted while a block is left, before its lease is out of the handle, that lease goes with the handle.
        if use is not enter:
            assert door.num_leases == expected, after
        del handle
        assert door.num_leases == 0, after
        if not struck:
            break
    assert after > 50


def test_importing_the_handle_imports_no_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, modelcache.handle; assert 'torch' not in sys.modules"], check=True
    )
