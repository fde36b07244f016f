PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart sentences test test-portable test-vllm environments environment-vllm soak coverage lint docs

quickstart: $(VENV)/installed-demo
	$(BIN)/python examples/quickstart/run.py

sentences: $(VENV)/installed-demo
	$(BIN)/python examples/sentences/sentences.py

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

test-portable: environments
	$(BIN)/python -m pytest -n 0 tests/models/portable

environments: $(VENV)/installed-test
	$(BIN)/python tests/models/portable/environments.py .venv-portable

test-vllm: environment-vllm
	$(BIN)/python -m pytest -n 0 tests/evaluation/test_vllm.py

environment-vllm: $(VENV)/installed-test
	$(BIN)/python tests/models/portable/environments.py .venv-vllm tests/evaluation/vllm_versions.txt

soak: $(VENV)/installed-test
	$(BIN)/python -m pytest --soak -m soak -n 0

coverage: $(VENV)/installed-test
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --longest 300 --timeout 1800  # the tracer is slow
	$(BIN)/coverage combine --quiet
	# a test compiles an example of CONTRIBUTING.md as a module of the package, which is not a file
	$(BIN)/coverage json --ignore-errors --quiet -o coverage.json
	$(BIN)/python tests/coverage_table.py coverage.json

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[$*]'
	touch $@
