"""Models 1.6 x the size of the VRAM budget, dispatched by their loader: used, parked, brought back, on real code."""

from __future__ import annotations

import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from torch import nn

from modelcache.cache import ModelCache
from modelcache.core.ledger import Room
from modelcache.core.machine import Budgets
from modelcache.dataplane.mover import TorchMover
from modelcache.errors import LeaseTimeoutError, LoaderError, ModelTooLargeError, MoveError, WeightsError
from modelcache.runtime.threads import SystemClock, ThreadPool
from modelcache.testing import SimulatedDevice
from modelcache.wiring import Parts

WIDTH, LAYERS = 64, 16
LAYER_BYTES = 4 * (WIDTH * WIDTH + WIDTH)
X = torch.linspace(-1, 1, WIDTH).reshape(1, WIDTH)


class Net(nn.Module):
    """Sixteen layers with a running average each, and a head tied to the last one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.layers[-1].weight
        self.eval()

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(self.norm(x))


def plain(num_layers: int) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers))).eval()


def places(*, device: int, ram: int) -> dict[str, str]:
    """The first layers on the device, the next in RAM, the rest on disk; the norm on the device, the tied head away."""
    where = ["sim:0"] * device + ["cpu"] * ram + ["disk"] * (LAYERS - device - ram)
    return {f"layers.{i}": place for i, place in enumerate(where)} | {"norm": "sim:0", "head": "disk"}


class Bench:
    """A cache whose parts a test can look at, with room in VRAM for ten of the sixteen layers."""

    def __init__(self, tmp_path, *, vram_layers: float = 10.5, ram: int = 1 << 22, disk: int = 1 << 22) -> None:
        self.tmp_path = tmp_path
        self.device = SimulatedDevice(1 << 22, link_bytes_per_s=None, rounding="512")
        self.mover = TorchMover(self.device, segment_bytes=2 * LAYER_BYTES, image_dir=tmp_path / "images")
        self.cache = ModelCache._of(
            Parts(
                budgets=Budgets(ram=ram, vram=int(vram_layers * LAYER_BYTES), disk=disk),
                mover=self.mover,
                clock=SystemClock(),
                pool=ThreadPool(),
                device_name=self.device.name,
                execution_device=lambda: self.device.torch_device,
                measure=lambda: Room(self.device.free_bytes(), self.mover.live_ram_bytes),
                close=self.mover.close,
            )
        )

    def register(self, name: str = "big", seed: int = 0, *, device: int = 6, ram: int = 5, **options) -> None:
        def load():
            net = Net(seed)
            folder = str(self.tmp_path / name)
            return dispatch_model(net, places(device=device, ram=ram), main_device="sim:0", offload_dir=folder)

        self.cache.register(name, load, **options)

    def answer(self, name: str = "big") -> torch.Tensor:
        with torch.no_grad(), self.cache.get(name, timeout=20) as model:
            return model(X.to("sim:0")).cpu()

    def check(self) -> None:
        """The books balance, and they are what the data plane holds."""

        def look(machine):
            machine.validate()
            held = [self.mover.held_bytes(part) for part in machine.books.parts]
            workspace = sum(m.workspace_bytes for m in machine.books.models.values() if m.workspace_charged)
            assert machine.books.vram.resident_bytes == sum(each.vram for each in held) + workspace
            assert machine.books.ram.resident_bytes == sum(each.ram for each in held)

        self.cache._driver.look(look)

    def object_of(self, name: str = "big") -> Net:
        return self.mover.object_of(name)


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    made.cache.close()


def assert_whole(model: Net, seed: int = 0) -> None:
    """No hook, nothing on meta, every byte and tie as when it was made."""
    expected = Net(seed).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].cpu(), tensor), name
    assert model.head.weight is model.layers[-1].weight
    assert not any("_hf_hook" in vars(module) for module in model.modules())
    assert "hf_device_map" not in vars(model)


def is_dispatched(model: Net) -> bool:
    return any(parameter.is_meta for parameter in model.parameters()) and hasattr(model, "hf_device_map")


def weights_in_ram() -> set[int]:
    """The addresses of all live tensors of a layer's weight's size in RAM, whoever holds them."""
    gc.collect()
    every = [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
    return {each.data_ptr() for each in every if each.device.type == "cpu" and each.numel() == WIDTH * WIDTH}


def test_it_runs_from_its_dispatch_is_parked_by_another_and_comes_back(bench):
    bench.register()
    bench.cache.register("other", lambda: plain(10))
    expected = Net()(X)
    for _ in range(3):
        assert torch.allclose(bench.answer(), expected, atol=1e-6)
        assert is_dispatched(bench.object_of())
        assert bench.cache.info("big").state == "ready"
        bench.check()
        bench.answer("other")
        assert bench.cache.info("big").state != "ready"
        assert bench.object_of().layers[0].weight.device.type == "cpu"
        assert_whole(bench.object_of())
        bench.check()


def test_what_is_charged_is_what_the_device_has_and_what_comes_in_at_a_time(bench):
    bench.register()
    bench.answer()
    stats = bench.cache.info("big")
    on_device = sum(bench.device.charge_bytes(size) for size in (4 * WIDTH * WIDTH, 4 * WIDTH)) * 6
    one_layer = bench.device.charge_bytes(4 * WIDTH * WIDTH) + bench.device.charge_bytes(4 * WIDTH)
    assert on_device <= stats.vram_bytes <= on_device + 4096  # and the norm
    assert stats.workspace_bytes == one_layer
    peak = 0

    def look(*_):
        nonlocal peak
        peak = max(peak, bench.device.allocated_bytes())

    with torch.no_grad(), bench.cache.get("big") as model:
        for layer in model.layers:
            layer.register_forward_hook(look)
        model(X.to("sim:0"))
    activations = 16 * 512
    assert peak <= stats.vram_bytes + stats.workspace_bytes + activations


def test_ram_holds_its_bytes_once(bench):
    before = weights_in_ram()
    bench.register()
    bench.answer()
    pieces = [
        (copy.memory.data_ptr(), copy.memory.data_ptr() + copy.memory.numel())
        for part in bench.mover._parts.values()
        for copy in part.ram
    ]
    bench.device.release_cached()  # the simulated device is RAM too, and keeps a little of what was freed
    mine = weights_in_ram() - before
    assert len(mine) >= 10
    assert all(any(start <= address < stop for start, stop in pieces) for address in mine)
    assert bench.mover.live_ram_bytes == bench.cache.info("big").ram_bytes <= 20 * LAYER_BYTES


def test_a_budget_that_holds_all_of_it_gets_it_whole(tmp_path):
    bench = Bench(tmp_path, vram_layers=20)
    bench.register()
    with bench.cache:
        assert torch.allclose(bench.answer(), Net()(X), atol=1e-6)
        assert_whole(bench.object_of())
        assert {p.device.type for p in bench.object_of().parameters()} == {"sim"}
        bench.check()


def test_it_changes_its_form_with_the_budget(bench):
    bench.register()
    bench.answer()
    bench.cache.resize(vram=20 * LAYER_BYTES)
    bench.cache.park("big")
    assert torch.allclose(bench.answer(), Net()(X), atol=1e-6)
    assert_whole(bench.object_of())
    bench.cache.resize(vram=int(10.5 * LAYER_BYTES))
    assert torch.allclose(bench.answer(), Net()(X), atol=1e-6)
    assert is_dispatched(bench.object_of())
    bench.check()


@pytest.mark.parametrize("device", [9, 6])
def test_it_is_too_large_only_when_its_dispatch_is(tmp_path, device):
    bench = Bench(tmp_path, vram_layers=7.6)
    bench.register(device=device)
    with bench.cache:
        if device == 6:
            bench.answer()
        else:
            with pytest.raises(ModelTooLargeError, match="weights brought in at a time"):
                bench.answer()


def test_evicted_to_disk_and_back_it_is_bit_equal(bench):
    bench.register()
    bench.answer()
    bench.cache.evict("big", to="disk")
    assert bench.cache.info("big").ram_bytes == 0
    assert bench.mover.live_ram_bytes == 0
    assert torch.allclose(bench.answer(), Net()(X), atol=1e-6)
    bench.cache.park("big")
    assert_whole(bench.object_of())
    bench.check()


def test_all_on_disk_is_read_again_from_the_files_of_the_dispatch(tmp_path):
    bench = Bench(tmp_path, disk=0)

    def load():
        net = Net()
        disk_offload(net, str(tmp_path / "o"), torch.device("sim:0"), offload_buffers=True)
        return net

    bench.cache.register("big", load)
    with bench.cache:
        bench.answer()
        bench.cache.evict("big", to="disk")
        assert bench.mover.live_ram_bytes == 0
        assert torch.allclose(bench.answer(), Net()(X), atol=1e-6)
        bench.cache.evict("big", to="disk")
        with (tmp_path / "o" / "layers.3.weight.dat").open("r+b") as file:
            file.write(b"\1\2\3\4")
        with pytest.raises(WeightsError, match="layers.3.weight"):
            bench.answer()


def test_two_dispatched_models_take_turns(bench):
    bench.register("one", 1)
    bench.register("two", 2, device=7, ram=0)
    for _ in range(2):
        for name, seed in (("one", 1), ("two", 2)):
            assert torch.allclose(bench.answer(name), Net(seed)(X), atol=1e-6)
            bench.check()


def test_two_threads_wait_for_each_other(bench):
    bench.register()
    expected, wrong = Net()(X), []

    def use():
        for _ in range(10):
            if not torch.allclose(bench.answer(), expected, atol=1e-6):
                wrong.append("answer")

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_is_leased_once_at_a_time(bench):
    bench.register(concurrency=4)
    with ThreadPoolExecutor(1) as other, bench.cache.get("big"), pytest.raises(LeaseTimeoutError):
        other.submit(bench.cache.get, "big", timeout=0.01).result()


def test_writes_to_what_is_on_the_device_come_back(bench):
    bench.register()
    with torch.no_grad(), bench.cache.get("big") as model:
        model.layers[0].weight.add_(1)
    bench.cache.park("big")
    expected = Net().layers[0].weight + 1
    assert torch.equal(bench.object_of().layers[0].weight, expected)
    with bench.cache.get("big") as model:
        assert torch.equal(model.layers[0].weight.cpu(), expected)


def test_a_forward_that_raises_leaves_nothing_behind(bench):
    bench.register()
    bench.answer()
    held = bench.device.allocated_bytes()
    with bench.cache.get("big") as model, pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        handle = model.layers[12].register_forward_pre_hook(lambda *_: (torch.ones(1, 3, device="sim:0"),))
        model(X.to("sim:0"))
    handle.remove()
    assert torch.allclose(bench.answer(), Net()(X), atol=1e-6)
    bench.cache.park("big")
    assert_whole(bench.object_of())
    bench.answer()
    assert bench.device.allocated_bytes() == held


def test_unregistered_it_leaves_nothing(bench):
    bench.register()
    bench.answer()
    bench.cache.unregister("big")
    gc.collect()
    assert bench.device.allocated_bytes() == 0
    assert bench.mover.live_ram_bytes == 0
    bench.check()


def test_everything_offloaded_by_cpu_offload_runs_with_nothing_resident(tmp_path):
    bench = Bench(tmp_path, vram_layers=1.5)

    def load():
        net = Net()
        cpu_offload(net, torch.device("sim:0"))
        return net

    bench.cache.register("big", load)
    with bench.cache:
        assert torch.allclose(bench.answer(), Net()(X), atol=1e-6)
        bench.cache.park("big")
        assert_whole(bench.object_of())
        bench.check()


def test_a_dispatch_for_another_place_runs_only_whole(tmp_path, caplog):
    bench = Bench(tmp_path)

    def load():
        net = Net()
        where = places(device=0, ram=10) | {"norm": "cpu"}
        return dispatch_model(net, where, main_device="cpu", offload_dir=str(tmp_path / "o"))

    bench.cache.register("big", load)
    with bench.cache, caplog.at_level("INFO", logger="modelcache.dataplane"):
        with pytest.raises(ModelTooLargeError):
            bench.answer()
        assert "runs only whole" in caplog.text


def test_hooks_bring_in_no_weight_for_another_by_a_reused_address(bench):
    bench.register()
    bench.answer()
    hooks = [vars(m)["_hf_hook"] for m in bench.object_of().modules() if "_hf_hook" in vars(m)]
    offloading = [hook for hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]
    assert len(offloading) >= 10
    assert not any(hook.tied_params_map or hook.tied_params_names for hook in offloading)


def test_prefetched_to_ram_it_is_not_yet_used(bench):
    bench.register()
    bench.cache.prefetch("big", tier="ram").result(20)
    assert bench.cache.info("big").state == "parked"
    assert bench.device.allocated_bytes() == 0
    assert_whole(bench.object_of())
    bench.answer()


def test_explain_says_how_it_runs(bench):
    bench.register()
    bench.answer()
    assert "it does not fit whole, so it runs from the dispatch it came with" in bench.cache.explain("big")


@pytest.mark.parametrize("seed", range(4))
def test_whatever_three_callers_and_an_operator_do_answers_and_bytes_are_right(tmp_path, seed):
    bench = Bench(tmp_path, vram_layers=12, ram=1 << 20)
    bench.register("one", 1, device=6, ram=5)
    bench.register("two", 2, device=8, ram=0)
    bench.cache.register("three", lambda: plain(8))
    models = {"one": Net(1), "two": Net(2), "three": plain(8)}
    expected = {name: model(X).detach() for name, model in models.items()}
    failures = []

    def use(chooser):
        for _ in range(12):
            name = chooser.choice(list(expected))
            if not torch.allclose(bench.answer(name), expected[name], atol=1e-6):
                failures.append(name)

    def operate(chooser):
        for _ in range(12):
            name = chooser.choice(list(expected))
            match chooser.randrange(5):
                case 0:
                    bench.cache.park(name, timeout=20)
                case 1:
                    bench.cache.evict(name, to="disk", timeout=20)
                case 2:
                    bench.cache.resize(vram=int(chooser.choice([10.5, 12, 18, 25]) * LAYER_BYTES))
                case 3:
                    bench.cache.prefetch(name, tier=chooser.choice(["ram", "vram"])).cancel()
                case 4:
                    bench.cache.free(vram=10 * LAYER_BYTES, timeout=20)

    def run(work, number):
        try:
            work(random.Random(f"{seed} {number}"))
        except Exception as error:  # said by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work, i)) for i, work in enumerate((use, use, use, operate))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with bench.cache:
        assert not failures
        bench.cache.resize(vram=12 * LAYER_BYTES)
        bench.cache.free(vram=12 * LAYER_BYTES)
        bench.check()
        for name, i in (("one", 1), ("two", 2)):
            bench.cache.prefetch(name, tier="ram").result(20)
            assert_whole(bench.object_of(name), i)
            bench.answer(name)
            assert is_dispatched(bench.object_of(name))
    gc.collect()
    assert bench.device.allocated_bytes() == 0
    assert bench.mover.live_ram_bytes == 0


# --- what people do to a model while it runs from its dispatch --------------------------------------------------------


def test_a_weight_assigned_while_it_runs_from_its_dispatch_is_a_write(bench):
    bench.register()
    bench.answer()
    mine = torch.full((WIDTH, WIDTH), 0.5)
    with torch.no_grad(), bench.cache.get("big") as model:
        model.layers[8].weight = nn.Parameter(mine.clone())
        model.layers[0].weight.fill_(0.25)
    bench.cache.park("big")
    assert torch.equal(bench.object_of().layers[8].weight, mine)
    assert bench.object_of().layers[0].weight.unique().tolist() == [0.25]
    bench.cache.evict("big", to="disk")
    bench.answer()
    bench.cache.park("big")
    assert torch.equal(bench.object_of().layers[8].weight, mine)
    bench.check()


def test_adapters_merged_while_it_runs_from_its_dispatch_stay_merged(bench):
    import peft

    def adapted():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=[f"layers.{i}" for i in range(LAYERS)], init_lora_weights=False)
        return peft.get_peft_model(Net(), config).eval()

    def load():
        model = adapted()
        where = {f"base_model.model.{name}": place for name, place in places(device=6, ram=5).items()}
        return dispatch_model(model, where, main_device="sim:0", offload_dir=str(bench.tmp_path / "o"))

    merged = adapted()
    with torch.no_grad():
        merged.merge_adapter()
        expected = merged(X)
    bench.cache.register("big", load)
    with torch.no_grad(), bench.cache.get("big", timeout=20) as model:
        model.merge_adapter()
    bench.cache.park("big")
    found = {n: t for n, t in bench.object_of().state_dict().items() if "base_layer.weight" in n}
    wanted = merged.state_dict()
    assert len(found) == LAYERS
    assert all(torch.allclose(tensor, wanted[name], atol=1e-6) for name, tensor in found.items())
    assert torch.allclose(bench.answer(), expected, atol=1e-5)


def test_weights_of_another_shape_are_named_and_nothing_is_given_up(bench):
    bench.register()
    with torch.no_grad(), bench.cache.get("big") as model:
        model.layers[8].weight = nn.Parameter(torch.ones(3, 3))
    with pytest.raises(MoveError, match=r"'layers\.8\.weight' was \[64, 64\] torch.float32 and is \[3, 3\]"):
        bench.cache.park("big")
    assert bench.cache.info("big").state == "ready"


def test_a_forward_patched_meanwhile_is_named_and_kept(bench):
    bench.register()
    with bench.cache.get("big") as model:
        patch = lambda x: x * 2  # noqa: E731  It must be an attribute of the instance.
        model.layers[8].forward = patch
    with pytest.raises(MoveError, match=r"the forward of layers\.8 was set after it was loaded"):
        bench.cache.park("big")
    assert bench.object_of().layers[8].forward is patch
    del bench.object_of().layers[8].forward
    bench.cache.park("big")


def test_the_same_object_under_two_names_is_refused_and_goes_on_running(bench):
    kept = []

    def load():
        if not kept:
            kept.append(dispatch_model(Net(), places(device=6, ram=5), offload_dir=str(bench.tmp_path / "o")))
        return kept[0]

    bench.cache.register("big", load)
    bench.cache.register("again", load)
    bench.answer()
    with pytest.raises(LoaderError, match="is, in whole or in part, 'big'; register it once"):
        bench.answer("again")
    assert torch.allclose(bench.answer(), Net()(X), atol=1e-6)


def test_a_model_refused_after_its_dispatch_was_taken_over_has_it_back(bench):
    model = dispatch_model(Net(), places(device=6, ram=5), offload_dir=str(bench.tmp_path / "o"))
    model.register_buffer("odd", torch.eye(3).to_sparse())
    bench.cache.register("big", lambda: model)
    with pytest.raises(LoaderError, match="only strided tensors"):
        bench.answer()
    assert is_dispatched(model)
    with torch.no_grad():
        assert torch.allclose(model(X.to("sim:0")).cpu(), Net()(X), atol=1e-6)


def test_a_loader_that_may_be_called_again_is_called_once_at_a_time(bench):
    running, most = [], []

    def load():
        running.append(None)
        most.append(len(running))
        try:
            net = Net()
            return dispatch_model(net, places(device=6, ram=10), offload_dir=str(bench.tmp_path / "o"))
        finally:
            running.pop()

    bench.cache.register("big", load, reload=True)
    for _ in range(3):
        assert torch.allclose(bench.answer(), Net()(X), atol=1e-6)
        bench.cache.evict("big", to="disk")
    assert max(most) == 1


def test_after_close_a_model_that_somebody_keeps_has_no_hooks(tmp_path):
    bench = Bench(tmp_path)
    bench.register()
    bench.answer()
    model = bench.object_of()
    bench.cache.close()
    assert not any("_hf_hook" in vars(module) for module in model.modules())
    assert "hf_device_map" not in vars(model)


def test_a_dispatch_that_cannot_be_kept_says_so_where_it_matters(tmp_path):
    bench = Bench(tmp_path)

    def load():
        net = Net()
        where = places(device=0, ram=10) | {"norm": "cpu"}
        return dispatch_model(net, where, main_device="cpu", offload_dir=str(tmp_path / "o"))

    bench.cache.register("big", load)
    with bench.cache, pytest.raises(ModelTooLargeError, match="runs only whole: its dispatch computes on cpu too"):
        bench.answer()
