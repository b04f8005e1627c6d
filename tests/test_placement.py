"""Inputs go to the device a model runs on; the model itself is moved and cast by the cache alone.

The execution device is `meta` where a move must be seen: tensors really change device, without an accelerator.
"""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict, UserDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from doors import OneModel, handle_of
from torch import nn
from torch.nn.utils.rnn import pack_sequence

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


class Pair(NamedTuple):
    x: Any
    y: Any


class Echo:
    """Gives back what it was given."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    def forward(self, value: Any) -> Any:
        return value

    def load_state_dict(self, state: Any) -> Any:
        return state


class Batch(UserDict):
    """As a transformers `BatchEncoding`: its `to` changes it in place."""

    def to(self, device: Any) -> Batch:
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=dtype)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


# --- requests refused -------------------------------------------------------------------------------------------------


def refused(call: Any) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    "request_",
    [
        lambda h: h.to("cuda"),
        lambda h: h.to("cuda:1"),
        lambda h: h.to(device="cuda"),
        lambda h: h.to(torch.device("cuda", 0)),
        lambda h: h.to(1),
        lambda h: h.to(torch.zeros(1, device="meta")),
        lambda h: h.cuda(),
        lambda h: h.cuda(0),
        lambda h: h.cuda(device="cuda:1"),
        lambda h: h.xpu(),
    ],
)
def test_another_device_is_refused_with_what_to_do(request_):
    handle, door = handle_of(Net(), CPU)

    text = refused(lambda: request_(handle))

    assert text.startswith("'flux' runs on cpu and cannot be moved to ")
    assert "cache.park('flux')" in text
    assert door.num_acquired == 0


@pytest.mark.parametrize(
    "request_",
    [
        lambda h: h.to(torch.float16),
        lambda h: h.to("cpu", torch.float16),
        lambda h: h.to("cpu", dtype=torch.float16),
        lambda h: h.half(),
        lambda h: h.type(torch.float16),
        lambda h: h.to(torch.zeros(1, dtype=torch.float16)),
    ],
)
def test_another_dtype_is_refused_with_what_to_do(request_):
    model = Net()
    handle, _ = handle_of(model, CPU)

    assert refused(lambda: request_(handle)) == (
        "'flux' cannot be cast to float16 in place: the cache holds its weights as float32; register a variant whose "
        "loader returns it so: cache.register('flux-float16', loader)"
    )
    assert model.linear.weight.dtype == torch.float32


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_are_refused(cast: str):
    handle, _ = handle_of(Net(), CPU)

    assert "cannot be cast to" in refused(getattr(handle, cast))


def test_a_memory_format_is_refused():
    handle, _ = handle_of(Net(), CPU)

    assert "do it in the loader" in refused(lambda: handle.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("call", [lambda h: h.share_memory(), lambda h: h.to_empty(device="cpu")])
def test_what_would_take_the_weights_away_is_refused(call):
    handle, _ = handle_of(Net(), CPU)

    assert "cache.unregister('flux')" in refused(lambda: call(handle))


def test_an_offloader_of_its_own_is_refused():
    class Pipeline:
        def enable_model_cpu_offload(self) -> None:
            raise AssertionError

    handle, _ = handle_of(Pipeline(), CPU)

    assert "cannot do enable_model_cpu_offload()" in refused(handle.enable_model_cpu_offload)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda parent: parent.to("meta"), "cannot be moved to meta"),
        (lambda parent: parent.half(), "cannot be cast to float16"),
        (lambda parent: parent.share_memory(), "cannot do share_memory()"),
    ],
)
def test_a_parent_module_cannot_move_or_cast_a_cached_child(call, words: str):
    model = Net()
    parent = nn.Sequential(handle_of(model, CPU)[0])

    assert words in refused(lambda: call(parent))
    assert model.linear.weight.device == CPU
    assert model.linear.weight.dtype == torch.float32
    assert not model.linear.weight.is_shared()


def test_a_pipeline_is_asked_for_its_own_dtype():
    class Pipeline:
        dtype = torch.bfloat16

        def to(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError

    handle, _ = handle_of(Pipeline(), CPU)

    assert handle.to("cpu", torch.bfloat16) is handle
    assert "holds its weights as bfloat16" in refused(lambda: handle.to(torch.float32))


def test_a_model_of_unknown_dtype_is_not_cast():
    class Opaque:
        def to(self, *args: Any) -> None:
            raise AssertionError

    handle, _ = handle_of(Opaque(), CPU)

    assert "holds its weights as they are" in refused(lambda: handle.to(torch.float32))


# --- requests that change nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        lambda h: h.to(),
        lambda h: h.to("cpu"),
        lambda h: h.to(device=CPU, non_blocking=True),
        lambda h: h.to(0),
        lambda h: h.to("cpu", torch.float32, True),
        lambda h: h.to(None, None),
        lambda h: h.to(torch.zeros(1)),
        lambda h: h.to(memory_format=torch.preserve_format),
        lambda h: h.cpu(),
        lambda h: h.float(),
    ],
)
def test_a_request_that_changes_nothing_returns_the_handle(request_):
    handle, door = handle_of(Net(), CPU)

    assert request_(handle) is handle
    assert door.num_acquired == 0


def test_a_device_without_an_index_means_the_one_in_use():
    handle, _ = handle_of(Net(), torch.device("cuda:0"))

    assert handle.to("cuda") is handle
    assert handle.cuda() is handle
    assert handle.cuda(0) is handle
    assert "cannot be moved to cuda:1" in refused(lambda: handle.cuda(1))
    assert "cannot be moved to cpu" in refused(handle.cpu)


def test_a_parent_module_goes_where_the_cached_child_runs():
    parent = nn.Sequential(handle_of(Net(), CPU)[0])

    assert parent.to("cpu").float() is parent


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def echo() -> tuple[Any, OneModel]:
    return handle_of(Echo(), ELSEWHERE)


def test_a_shared_batch_is_not_changed_by_moving_it(echo):
    handle, _ = echo
    batch = Batch(ids=torch.zeros(2), text="hello")

    moved = handle.forward(batch)

    assert moved["ids"].device == ELSEWHERE
    assert isinstance(moved, Batch)
    assert moved["text"] == "hello"
    assert batch["ids"].device == CPU


def test_tensors_are_moved_however_deep_they_lie(echo):
    handle, _ = echo
    x = torch.zeros(2)

    args, kwargs = handle(x, [1, [x]], Pair(x, "y"), key={"deep": (x, None)}, ordered=OrderedDict(a=x))

    assert args[0].device == ELSEWHERE
    assert args[1][1][0].device == ELSEWHERE
    assert isinstance(args[2], Pair)
    assert args[2].x.device == ELSEWHERE
    assert kwargs["key"]["deep"][0].device == ELSEWHERE
    assert kwargs["key"]["deep"][1] is None
    assert isinstance(kwargs["ordered"], OrderedDict)
    assert kwargs["ordered"]["a"].device == ELSEWHERE
    assert x.device == CPU


def test_a_list_of_a_kind_of_its_own_keeps_its_kind(echo):
    class Images(list):
        pass

    images = Images([torch.zeros(2)])

    moved = echo[0].forward(images)

    assert isinstance(moved, Images)
    assert moved[0].device == ELSEWHERE
    assert images[0].device == CPU


def test_a_packed_sequence_moves_itself(echo):
    handle, _ = echo
    packed = pack_sequence([torch.zeros(3), torch.zeros(2)])

    moved = handle.forward(packed)

    assert moved.data.device == ELSEWHERE
    assert moved.batch_sizes.device == CPU


def test_inputs_already_there_are_passed_on_untouched():
    handle, _ = handle_of(Echo(), CPU)
    x = torch.zeros(2)
    values = [x, [x], (x,), {"x": x}, Batch(x=x), ["a"] * 100, [[1, 2], [3]], Pair(x, 1)]

    for value in values:
        assert handle.forward(value) is value


def test_a_meta_tensor_is_left_for_the_model_to_refuse():
    handle, _ = handle_of(Echo(), CPU)
    x = torch.zeros(2, device="meta")

    assert handle.forward(x) is x


def test_weights_that_are_loaded_stay_where_they_are(echo):
    handle, door = echo
    state = {"w": torch.zeros(2)}

    assert handle.load_state_dict(state) is state
    assert door.num_acquired == 1


def test_moved_inputs_keep_their_gradient():
    handle, _ = handle_of(Echo(), ELSEWHERE)
    x = torch.zeros(2, requires_grad=True)

    assert handle.forward(x).grad_fn is not None


def test_a_handle_of_something_without_torch_does_not_import_torch():
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from doors import handle_of\n"
        "class Model:\n"
        "    def to(self, *args): raise AssertionError\n"
        "    def run(self, *args, **kwargs): return args, kwargs\n"
        "handle, door = handle_of(Model(), 'cpu')\n"
        "assert handle.run([1], a={'b': 2}) == (([1],), {'a': {'b': 2}})\n"
        "assert handle.to('cpu') is handle\n"
        "try: handle.to('cuda')\n"
        "except RuntimeError: pass\n"
        "else: raise AssertionError\n"
        "assert door.num_leases == 0 and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
