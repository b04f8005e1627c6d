"""What importing the package loads, changes and exports; and what a forked child may do. In processes of their own."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import modelcache

PACKAGE = Path(modelcache.__file__).parent


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=PACKAGE.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    [
        "modelcache",
        "modelcache.cache",
        "modelcache.testing",
        "modelcache.config",
        "modelcache.core.machine",
        "modelcache.runtime.driver",
        "modelcache.cli",
    ],
)
def test_importing_loads_no_torch_and_starts_no_thread(module):
    heavy = "('torch', 'accelerate', 'transformers', 'safetensors', 'numpy', 'pynvml')"
    code = f"""
        import sys, threading, {module}
        print([name for name in {heavy} if name in sys.modules], threading.active_count())
    """
    assert run(code) == "[] 1"


def test_importing_reads_no_environment_and_opens_no_socket():
    code = """
        import sys
        seen = []
        def hook(event, args):
            if event.startswith("socket.") or event in ("os.putenv", "subprocess.Popen", "os.fork"):
                seen.append(event)
        sys.addaudithook(hook)
        import modelcache, modelcache.cache, modelcache.testing
        print(seen)
    """
    assert run(code) == "[]"


def test_the_public_names_are_sorted_unique_and_all_there():
    names = modelcache.__all__
    assert names == sorted(set(names))
    for name in names:
        assert getattr(modelcache, name) is not None
    assert set(names) <= set(dir(modelcache))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = modelcache.nothing


def test_type_checkers_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname or alias.name for node in guarded.body for alias in node.names}
    assert seen == set(modelcache.__all__) - {"__version__"}


def test_every_error_is_public():
    from modelcache import errors

    theirs = {name for name, value in vars(errors).items() if isinstance(value, type) and name.endswith("Error")}
    assert theirs <= set(modelcache.__all__)


def test_the_fakes_are_public_and_only_two_of_them_load_torch():
    code = """
        import sys, modelcache.testing as testing
        assert testing.__all__ == sorted(testing.__all__)
        for name in testing.__all__:
            if name not in ("SimulatedDevice", "Faults"):
                getattr(testing, name)
        before = "torch" in sys.modules
        testing.SimulatedDevice
        print(before, "torch" in sys.modules)
    """
    assert run(code) == "False True"


def test_a_forked_child_is_refused_at_once_and_the_parent_goes_on():
    code = """
        import os
        from modelcache.errors import ForkedCacheError
        from modelcache.testing import FakeClock, FakeModel, FakeMover, FakePool, cache_of
        pool = FakePool()
        cache = cache_of(FakeMover(pool), FakeClock(), pool)
        cache.register("a", lambda: FakeModel(5))
        cache.register("b", lambda: FakeModel(5))
        handle = cache.get("a")
        handle()
        child = os.fork()
        if not child:
            asks = [
                lambda: cache.get("a"), lambda: cache.get("b"), handle, lambda: cache.register("c", FakeModel),
                lambda: cache.prefetch("b"), lambda: cache.park("a"), lambda: cache.free(vram=1),
                lambda: cache.lease_many("a", "b"), lambda: cache.unregister("b"), lambda: cache.resize(vram=5),
            ]
            refused = 0
            for ask in asks:
                try:
                    ask()
                except ForkedCacheError:
                    refused += 1
            cache.close()
            os._exit(0 if refused == len(asks) else 100 + refused)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), handle(lambda: "fine"))
        cache.close()
    """
    assert run(code) == "0 fine"


def test_a_process_that_ends_without_closing_ends():
    code = """
        from modelcache.testing import FakeClock, FakeModel, FakeMover, FakePool, cache_of
        pool = FakePool()
        cache = cache_of(FakeMover(pool), FakeClock(), pool)
        cache.register("a", lambda: FakeModel(5))
        cache.get("a")()
        print("done")
    """
    assert run(code) == "done"
