#!/usr/bin/env bash
# Build the sdist and the wheel, install the wheel into an empty environment, and run the quick start of the README there,
# from outside the checkout. What passed is left in dist/.
set -euo pipefail
root=$(pwd)
venv=$(cd "${VENV:-.venv}" && pwd)
constraints=$(realpath "${CONSTRAINTS:-constraints/dev.txt}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' modelcache/_version.py)
grep -q "^## \[$version\]" CHANGELOG.md || { echo "CHANGELOG.md has no section [$version]" >&2; exit 1; }
"$venv/bin/python" -m build --quiet --outdir "$work/dist" "$root"
"${PY:-python3}" -m venv "$work/empty"
"$work/empty/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" "$work"/dist/*.whl
"$venv/bin/python" "$root/tools/quick_start.py" "$root/README.md" > "$work/quick_start.py"
cd "$work"
unset PYTHONPATH
home=$(empty/bin/python -c 'import modelcache; print(modelcache.__file__)')
case "$home" in
    "$work"/empty/*) echo "modelcache $(empty/bin/python -c 'import modelcache; print(modelcache.__version__)') in an empty environment" ;;
    *) echo "the wheel is not what is imported, but $home" >&2; exit 1 ;;
esac
empty/bin/python -W error::ResourceWarning quick_start.py
empty/bin/modelcache config init
empty/bin/modelcache config check
empty/bin/modelcache plan
empty/bin/modelcache doctor
mkdir -p "$root/dist"
cp dist/* "$root/dist/"
ls -l "$root/dist"
