"""Names and specs: what people write becomes a `ModelSpec`, or is refused in words."""

from __future__ import annotations

import threading

import pytest

from modelcache.errors import UnknownModelError
from modelcache.registry import Registry, build_spec
from modelcache.spec import OnWrite, Priority
from modelcache.tier import Tier


def load() -> object:
    return object()


def test_everything_people_write_is_read() -> None:
    spec = build_spec(
        "flux",
        load,
        size="2GiB",
        workspace=1024,
        pin="vram",
        priority="high",
        idle="1m30s",
        concurrency="unlimited",
        reload=True,
        on_write="refuse",
    )
    assert spec.loader.call is load
    assert (spec.size_bytes, spec.workspace_bytes, spec.pin) == (2 << 30, 1024, Tier.VRAM)
    assert (spec.priority, spec.idle_s, spec.concurrency) == (Priority.HIGH, 90.0, 0)
    assert (spec.reload, spec.on_write) == (True, OnWrite.REFUSE)


def test_members_of_enums_are_taken_as_they_are() -> None:
    spec = build_spec("flux", load, pin=Tier.RAM, priority=Priority.LOW, on_write=OnWrite.DISCARD, idle="never")
    assert (spec.pin, spec.priority, spec.on_write, spec.idle_s) == (Tier.RAM, Priority.LOW, OnWrite.DISCARD, None)


def test_a_class_with_weights_is_the_safetensors_loader() -> None:
    spec = build_spec("net", model=dict, weights="net.safetensors")
    assert spec.loader.kind == "safetensors"
    assert spec.loader.options["weights"] == "net.safetensors"


@pytest.mark.parametrize(
    ("name", "loader", "options", "error", "words"),
    [
        ("../llama", load, {}, ValueError, "'../llama' is not a valid name"),
        ("My Model", load, {}, ValueError, "did you mean 'my-model'"),
        ("a" * 65, load, {}, ValueError, "1 to 64 characters"),
        ("con", load, {}, ValueError, "the name of a device"),
        (7, load, {}, TypeError, "got int"),
        ("a", None, {}, TypeError, "a loader is a callable"),
        ("a", "transformer", {}, ValueError, "did you mean 'transformers'"),
        ("a", "transformers", {}, ValueError, "path is missing"),
        ("a", load, {"worksapce": "1GiB"}, TypeError, "did you mean 'workspace'"),
        ("a", load, {"workspace": "1 Gb"}, ValueError, "unknown unit 'Gb'"),
        ("a", load, {"size": 0}, ValueError, "must be greater than 0"),
        ("a", load, {"size": True}, TypeError, "must be bytes"),
        ("a", load, {"pin": "gpu"}, ValueError, "must be one of 'vram', 'ram'"),
        ("a", load, {"idle": "3:30"}, ValueError, "cannot read '3:30'"),
        ("a", load, {"concurrency": -1}, ValueError, "must not be negative"),
        ("a", load, {"reload": "yes"}, TypeError, "True or False"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(name, loader, options, error, words) -> None:
    with pytest.raises(error) as caught:
        build_spec(name, loader, **options)
    assert words in str(caught.value)


def test_a_name_is_taken_once() -> None:
    registry = Registry()
    registry.add(build_spec("flux", load))
    with pytest.raises(ValueError, match="'flux' is registered already"):
        registry.add(build_spec("flux", load))
    registry.remove("flux")
    registry.add(build_spec("flux", load))
    assert registry.names() == ("flux",)


def test_constructor_arguments_go_with_a_class() -> None:
    spec = build_spec("net", model=dict, weights="net.safetensors", model_args={"width": 3})
    assert spec.loader.options["model_args"] == {"width": 3}
    with pytest.raises(ValueError, match="model_args is no option of the loader 'transformers'"):
        build_spec("net", "transformers", path="x", model_args={})


def test_of_many_threads_with_one_name_one_registers_it() -> None:
    registry, start = Registry(), threading.Barrier(8)
    outcomes: list[bool] = []

    def register() -> None:
        start.wait()
        for number in range(50):
            try:
                registry.add(build_spec(f"m{number}", load))
            except ValueError:
                outcomes.append(False)
            else:
                outcomes.append(True)

    threads = [threading.Thread(target=register) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (outcomes.count(True), outcomes.count(False)) == (50, 350)


def test_a_hundred_thousand_models_are_found_by_name_and_a_typo_is_still_answered() -> None:
    registry = Registry()
    for number in range(100_000):
        registry.add(build_spec(f"model-{number}", load, workspace="1GiB"))
    assert registry.get("model-99999").workspace_bytes == 1 << 30
    with pytest.raises(UnknownModelError) as caught:
        registry.get("modle-99999")
    assert "model-99999" in caught.value.close_matches
    assert caught.value.num_registered == 100_000


def test_an_unknown_name_brings_the_nearest_ones() -> None:
    registry = Registry()
    for name in ("flux", "flux-fill", "qwen"):
        registry.add(build_spec(name, load))
    with pytest.raises(UnknownModelError) as caught:
        registry.get("fluxx")
    assert caught.value.close_matches[0] == "flux"
    assert "did you mean 'flux'" in str(caught.value)
    with pytest.raises(KeyError):
        registry.remove("nobody")
