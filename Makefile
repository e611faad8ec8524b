# make demo: a bedtime story on every engine.   make test: lint, types, tests.
# make real: the real Gemma 3 270M.   make docs: the documentation, as a site in build/site.
PYTHON ?= python3
BIN := .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable
# MLX's Linux wheel comes with a slow reference BLAS; OpenBLAS, where the system has it, is 40x faster
OPENBLAS := $(shell ldconfig -p 2>/dev/null | awk '/libopenblas\.so\.0.*x86-64/ {print $$NF; exit}')
# its idle threads must not spin while another engine computes
RUN := $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS) OPENBLAS_THREAD_TIMEOUT=4) TF_CPP_MIN_LOG_LEVEL=3

.PHONY: demo test real llama-cpp lint format docs pictures reference bench clean

demo: .venv/demo
	@$(RUN) $(BIN)/gemma-multi demo

test: .venv/test lint
	$(RUN) $(BIN)/python -m pytest -n 2 --dist worksteal

# what only the real Gemma 3 270M can show; fetches 250 MB of weights, and texts, once
real: .venv/test
	$(BIN)/pip install --quiet 'torch==2.13.0' 'transformers>=4.56' 'scikit-learn>=1.5'
	$(BIN)/pip install --quiet 'vadersentiment==3.3.2'
	$(RUN) $(BIN)/python -m pytest -m real --durations=10 tests/real
	$(BIN)/python benchmarks/int4_quality.py --documents 4 --kept --only "calibrated on itself, embedding int4"
	$(BIN)/python benchmarks/specialists.py --task "film reviews" --rows 200 --ways other int4
	$(BIN)/python benchmarks/long_text.py --tokens 4000

# .gguf files in llama.cpp itself, small ones and the real 270M. Ten minutes to compile; pip keeps it
llama-cpp: .venv/test
	$(BIN)/pip install --quiet 'llama-cpp-python==0.3.36'
	$(RUN) $(BIN)/python -m pytest -m llama_cpp tests/exporters/test_llama_cpp.py

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# the package as it is installed, with exporters/ in its place
	@rm -rf build/package && mkdir -p build/package
	@cp -rp gemma_multi build/package && cp -rp exporters build/package/gemma_multi
	$(BIN)/mypy
	@cd build/package && $(CURDIR)/$(BIN)/lint-imports --no-cache --no-logo --config $(CURDIR)/pyproject.toml

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

# what the README and the site show of the demo
pictures: .venv/test
	$(RUN) $(BIN)/python docs/make_pictures.py

# the goldens, and our engines, against transformers on torch
reference: .venv/test
	$(BIN)/pip install --quiet 'torch==2.13.0' 'peft>=0.17' accelerate trl datasets
	$(BIN)/python tests/goldens/make.py --check
	$(BIN)/python tests/goldens/make_training.py --check
	GEMMA_MULTI_REFERENCE=1 $(RUN) $(BIN)/python -m pytest tests/engines tests/evaluation \
	  tests/exporters/test_huggingface.py
	$(RUN) $(BIN)/gemma-multi parity storyteller --backends keras,litert --precision float32 --against transformers --trace

bench: .venv/test
	$(RUN) $(BIN)/python benchmarks/loading.py
	$(RUN) $(BIN)/python benchmarks/parity.py
	$(BIN)/pip install --quiet 'torch==2.13.0' trl datasets
	$(BIN)/python benchmarks/finetuning.py

# What cannot be installed here (no wheel for this Python or processor) is named and left out; the
# demo goes on with the rest.
.venv/demo: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv; the first time takes a minute or two"
	@$(PIP) '.[mlx,keras,litert,litert-lm]' 2>.venv/install.log || { $(PIP) . && \
	for extra in mlx keras litert litert-lm; do $(PIP) ".[$$extra]" 2>.venv/$$extra.log || \
	echo "$$extra cannot be installed here and is left out; see .venv/$$extra.log"; done; }
	@# see [keras] in pyproject.toml
	@if $(BIN)/python -c 'import sys, keras; sys.exit(sys.version_info < (3, 14))' 2>/dev/null; \
	then $(BIN)/python -m pip install --quiet --no-deps keras-hub==0.32.0; fi
	@touch $@

.venv/test: .venv/demo
	@$(PIP) '.[test]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache
