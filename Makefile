# make demo: a bedtime story on every engine.   make test: lint, types, tests.
PYTHON ?= python3
BIN := .venv/bin
# MLX's Linux wheel comes with a slow reference BLAS; OpenBLAS, where the system has it, is 40x faster
OPENBLAS := $(shell ldconfig -p 2>/dev/null | awk '/libopenblas\.so\.0.*x86-64/ {print $$NF; exit}')
# its idle threads must not spin while another engine computes
RUN := $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS) OPENBLAS_THREAD_TIMEOUT=4) TF_CPP_MIN_LOG_LEVEL=3

.PHONY: demo test lint format reference bench clean

demo: .venv/demo
	@$(RUN) $(BIN)/gemma-multi demo

test: .venv/test lint
	$(RUN) $(BIN)/python -m pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the goldens, and our engines, against transformers on torch
reference: .venv/test
	$(BIN)/pip install --quiet 'torch==2.13.0' 'peft>=0.17'
	$(BIN)/python tests/goldens/make.py --check
	$(BIN)/python tests/goldens/make_training.py --check
	$(RUN) $(BIN)/gemma-multi parity storyteller --backends keras,litert --precision float32 --against transformers --trace

bench: .venv/test
	$(RUN) $(BIN)/python benchmarks/loading.py
	$(RUN) $(BIN)/python benchmarks/parity.py
	$(BIN)/pip install --quiet 'torch==2.13.0' trl datasets
	$(BIN)/python benchmarks/finetuning.py

.venv/demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mlx,keras,litert,litert-lm]'
	@touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache
