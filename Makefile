# Set-up, demonstration and checks. `make demo` and `make test` need only Python >= 3.10 and make.
PYTHON ?= python3
BIN := .venv/bin
TEST_OPTIONS := --numprocesses 2 --dist worksteal
PROMPT ?= three red circles in a row on a blue background

.PHONY: demo test test-slow test-all test-oldest gpu compatibility lint docs wheel clean

demo: .venv/.demo
	$(BIN)/agentsd compare --out out --prompt "$(PROMPT)"

# The quick tests; test-slow runs the others, of which some need Chromium, and test-all every test.
test: .venv/.test
	$(BIN)/python -m pytest $(TEST_OPTIONS) -m quick

test-slow: .venv/.test
	AGENTSD_BROWSER_TESTS=required $(BIN)/python -m pytest $(TEST_OPTIONS) -m "not quick"

test-all: .venv/.test
	AGENTSD_BROWSER_TESTS=required $(BIN)/python -m pytest $(TEST_OPTIONS)

# Patching, with the oldest releases that pyproject.toml allows. Several GB, as that torch comes with
# CUDA; PYTHON must be a version that it supports, 3.10 to 3.12.
OLDEST_TESTS := $(patsubst %,tests/test_%.py,patch runtime attention merging merged_parts golden \
	inspection schedule layers)
test-oldest: OLDEST = .venv-oldest
test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python \
		--resolution lowest-direct --editable ".[test]"
	$(OLDEST)/bin/python -m pytest $(TEST_OPTIONS) $(OLDEST_TESTS)

# All that only a graphics card can tell, in one report: gpu-check/report.md. Run again, it goes on.
gpu: .venv/.test
	$(BIN)/python scripts/gpu_check.py

# The table of what works together with a patch, from the tests.
compatibility: .venv/.test
	$(BIN)/python -m pytest -m cell --compatibility=docs/compatibility.md

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The pages of docs/ and the API, in site/; a warning, such as a dead link, is an error.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

wheel: .venv/.test
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv .venv-oldest dist out site

# Installed again only when the requirements have changed.
.venv/.demo: EXTRAS =
.venv/.test: EXTRAS = [test]
.venv/.lint: EXTRAS = [lint]
.venv/.docs: EXTRAS = [docs]
# torch-fidelity, to check the metrics against, and timm; tests/independent.py says why they are
# kept apart.
.venv/.test: AND_THEN = $(BIN)/pip install --quiet --constraint constraints.txt --no-deps \
	--upgrade --target .venv/independent torch-fidelity timm
.venv/.demo .venv/.test .venv/.lint .venv/.docs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".$(EXTRAS)"
	$(AND_THEN)
	touch $@
