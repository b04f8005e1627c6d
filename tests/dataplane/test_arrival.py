"""A call that starts while segments arrive: it waits where it must, and fails in words where one does not come."""

import threading
from contextlib import closing

import pytest
import torch
from movers import Rig

from modelcache.errors import ModelNotResidentError, MoveError
from modelcache.move import Move, Residency

NUM_LAYERS, WIDTH = 6, 32


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS))
        for layer in self.layers:
            layer.weight = torch.nn.Parameter(torch.rand(WIDTH, WIDTH, generator=generator), requires_grad=False)
        self.passed = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
            self.passed += 1
        return x


@pytest.fixture
def rig(tmp_path):
    with closing(Rig(tmp_path, segment_bytes=4 * WIDTH * WIDTH)) as rig:
        yield rig


X = torch.rand(2, WIDTH, generator=torch.Generator().manual_seed(2))


class Scene:
    """One model that ran once and was parked, and a promotion of it on another thread."""

    def __init__(self, rig: Rig, make=Net) -> None:
        self.rig = rig
        (facts,) = rig.load(make).parts
        self.part, self.model = facts.part, rig.mover.object_of("m")
        rig.stage(self.part)
        rig.promote(self.part)
        self.expected = make()(X)
        torch._dynamo.reset()  # another test's compiled code would keep calls from starting early
        assert torch.allclose(self.run(), self.expected)
        self.model.passed = 0
        rig.park_quietly(self.part)
        self.arriving = threading.Event()
        self.outcome: list[object] = []

    def run(self) -> torch.Tensor:
        """As a handle does when it had to ask for its lease."""
        with self.rig.mover.call("m"):
            return self.model(X.to(self.rig.device.torch_device)).cpu()

    def promote(self) -> threading.Thread:
        n = self.rig.n(self.part)
        move = Move(self.part, 10_000, self.rig.mover.residency(self.part), Residency(n, 0), n)

        def carry_out() -> None:
            try:
                self.outcome.append(self.rig.mover.move(move, None, self.arriving.set))
            except MoveError as error:
                self.outcome.append(error)

        thread = threading.Thread(target=carry_out)
        thread.start()
        return thread


def num_hooks(model: torch.nn.Module) -> int:
    hooks = [(m._forward_pre_hooks, m._forward_hooks, m._state_dict_pre_hooks) for m in model.modules()]
    return sum(len(each) for kinds in hooks for each in kinds)


def test_a_forward_starts_before_the_last_segment_and_waits_for_it(rig):
    scene = Scene(rig)
    hooks = num_hooks(scene.model)
    with rig.faults.hold("copy_in", nth=4) as hold:
        promotion = scene.promote()
        assert scene.arriving.wait(10)
        results = []
        caller = threading.Thread(target=lambda: results.append(scene.run()))
        caller.start()
        assert hold.wait_reached(10)
        while scene.model.passed < 3:
            caller.join(0.01)
        caller.join(0.05)
        assert caller.is_alive()
        assert scene.model.passed == 3
        assert rig.mover.residency(scene.part).vram == 0
    caller.join()
    promotion.join()
    assert torch.equal(results[0], scene.run())
    assert torch.allclose(results[0], scene.expected)
    assert num_hooks(scene.model) == hooks


@pytest.mark.parametrize("at", [0, 3, NUM_LAYERS])
def test_what_no_operator_was_seen_to_read_lands_first_and_before_anybody_starts(rig, at):
    class Skipping(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers.insert(at, torch.nn.Linear(WIDTH, WIDTH, bias=False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i, layer in enumerate(self.layers):
                x = x if i == at else layer(x).relu()
            return x

    scene = Scene(rig, Skipping)
    unread = scene.model.layers[at].weight.clone()
    with rig.faults.hold("copy_in", nth=2) as second, rig.faults.hold("copy_in", nth=1) as hold:
        promotion = scene.promote()
        assert hold.wait_reached(10)
        assert not scene.arriving.is_set()
        with pytest.raises(ModelNotResidentError):
            scene.run()
        hold.release()
        assert scene.arriving.wait(10)
        assert second.wait_reached(10)
        assert torch.equal(scene.model.layers[at].weight.cpu(), unread)
    promotion.join()
    assert torch.allclose(scene.run(), scene.expected)


def test_a_copy_that_fails_after_the_start_is_an_error_of_the_call_and_the_model_is_parked(rig):
    scene = Scene(rig)
    hold = rig.faults.hold("copy_in", nth=2)
    rig.faults.fail("copy_in", nth=4)
    with hold:
        promotion = scene.promote()
        assert scene.arriving.wait(10)
        errors = []

        def call() -> None:
            try:
                scene.run()
            except (MoveError, torch.AcceleratorError) as error:
                errors.append(error)

        caller = threading.Thread(target=call)
        caller.start()
        assert hold.wait_reached(10)
        while not scene.model.passed:
            caller.join(0.01)
    caller.join()
    promotion.join()
    (error,) = errors
    assert "injected" in str(error)
    assert isinstance(scene.outcome[0], MoveError)
    assert rig.mover.residency(scene.part) == Residency(0, 0)
    with pytest.raises(MoveError, match="injected"):
        scene.run()
    error.__traceback__ = error.__cause__ = error.__context__ = None  # its frames have tensors
    rig.promote(scene.part)
    assert torch.allclose(scene.run(), scene.expected)


def test_an_operator_reached_after_the_failure_raises_a_move_error(rig):
    scene = Scene(rig)
    at_second, go_on = threading.Event(), threading.Event()
    scene.model.layers[0].register_forward_hook(lambda *_: at_second.set() or go_on.wait(10) and None)
    rig.faults.fail("copy_in", nth=5)
    with rig.faults.hold("copy_in", nth=3):
        promotion = scene.promote()
        assert scene.arriving.wait(10)
        errors = []

        def call() -> None:
            with pytest.raises(MoveError, match="injected") as caught:
                scene.run()
            errors.append(caught.value)

        caller = threading.Thread(target=call)
        caller.start()
        assert at_second.wait(10)
    promotion.join()
    go_on.set()
    caller.join()
    assert len(errors) == 1
    assert scene.model.passed < 2


def test_whoever_settles_waits_for_the_last_segment(rig):
    scene = Scene(rig)
    with rig.faults.hold("copy_in", nth=4):
        promotion = scene.promote()
        assert scene.arriving.wait(10)
        waiter = threading.Thread(target=rig.mover.settle, args=("m",))
        waiter.start()
        waiter.join(0.05)
        assert waiter.is_alive()
    waiter.join()
    assert all(torch.equal(t.cpu(), Net().state_dict()[n]) for n, t in scene.model.state_dict().items())
    promotion.join()
    rig.mover.settle("m")
    rig.mover.settle("nobody")


def test_a_weight_exchanged_after_the_call_that_was_looked_at_is_looked_at_anew(rig):
    scene = Scene(rig)
    other = torch.nn.Parameter(scene.model.layers[2].weight.detach() + 1, requires_grad=False)
    scene.model.layers[2].weight = other
    scene.promote().join()
    assert not scene.arriving.is_set()
    rig.park_quietly(scene.part)
    rig.promote(scene.part)
    expected = Net()
    expected.layers[2].weight.data += 1
    assert torch.allclose(scene.run(), expected(X))
