# The two commands are `make demo` and `make test`; each does its own set-up from a fresh clone.
PY ?= python3
# What torch to take: the CPU build this is developed with. constraints/none.txt leaves the choice to pip.
CONSTRAINTS ?= constraints/dev.txt
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test check proof soak fuzz bench gpu wheel-test release clean

$(VENV)/.ok: pyproject.toml $(CONSTRAINTS)
	$(PY) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[ab,demo,test,dev,bench]'
	touch $@

demo: $(VENV)/.ok ## real models share too little VRAM, on any machine
	$(BIN)/modelcache demo

test: $(VENV)/.ok ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not proof" -n $(JOBS) --dist worksteal --figures .figures/test.json

check: $(VENV)/.ok ## format, lint, types, import contracts, known vulnerabilities
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit -q -r modelcache -c pyproject.toml
	$(BIN)/python tools/audit.py

proof: $(VENV)/.ok ## what proves the suite: seeded bugs are caught by the tests they name; a slice of each fuzzer
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py --jobs $(JOBS) --figures .figures/mutants.json
	OMP_NUM_THREADS=1 $(BIN)/python tools/fuzz.py --seconds 20 --jobs $(JOBS) --figures .figures/fuzz.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m proof tests/lifecycle -n $(JOBS) --dist worksteal --figures .figures/lifecycle.json
	$(BIN)/python tools/figures.py

soak: $(VENV)/.ok ## an hour of simulated schedules of the shipped mover, then the tests that are too large for the suite
	OMP_NUM_THREADS=1 $(BIN)/python tools/soak.py --hours 1 --jobs $(JOBS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m proof -n $(JOBS) --dist worksteal

fuzz: $(VENV)/.ok ## each fuzzer for twenty minutes
	OMP_NUM_THREADS=1 $(BIN)/python tools/fuzz.py --seconds 1200 --jobs $(JOBS)

bench: $(VENV)/.ok ## the figures of the README, next to their references in the same run
	GLIBC_TUNABLES=glibc.cpu.x86_non_temporal_threshold=0x400000 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run.py

gpu: ## the tests that need a CUDA device, with whatever Python and torch are there
	$(PY) -m pytest -q -m gpu tests

wheel-test: $(VENV)/.ok ## the tests against the built wheel, from outside the checkout
	VENV=$(VENV) tools/test_wheel.sh

release: $(VENV)/.ok ## the sdist and the wheel, tried in an empty environment; they are left in dist/
	VENV=$(VENV) PY=$(PY) CONSTRAINTS=$(CONSTRAINTS) tools/release.sh

clean:
	rm -rf $(VENV) build dist .figures demo-report .pytest_cache .mypy_cache .ruff_cache .hypothesis
