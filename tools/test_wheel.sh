#!/usr/bin/env bash
# Build the wheel and run the tests of the surface against it, from outside the checkout: a top-level package hides
# packaging mistakes. Uses the libraries of $VENV, but not its editable install.
set -euo pipefail
root=$(pwd)
venv=$(cd "${VENV:-.venv}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$venv/bin/python" -m build --quiet --wheel --outdir "$work/dist" "$root"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/site" "$work"/dist/*.whl
cp -r "$root/tests" "$root/configs" "$root/examples" "$root/pyproject.toml" "$work/"
cd "$work"
export PYTHONPATH="$work/site" OMP_NUM_THREADS=1
home=$("$venv/bin/python" -c 'import modelcache; print(modelcache.__file__)')
case "$home" in
    "$work"/*) echo "testing $home" ;;
    *) echo "the wheel is not what is imported, but $home" >&2; exit 1 ;;
esac
"$venv/bin/python" -m pytest -q -n "${JOBS:-2}" --dist worksteal -p no:cacheprovider \
    tests/core/test_ledger.py tests/core/test_planner.py tests/runtime tests/config tests/cli tests/test_cache.py tests/test_handle.py
