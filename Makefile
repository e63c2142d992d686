# Two commands: `make demo` shows what this is, `make test` runs the suite. Both make .venv first; nothing else is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test lint test-versions clean

demo: $(INSTALLED)
	$(BIN)/hf-autoround demo

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first, by constraints.txt: a plain install would fetch gigabytes of CUDA libraries
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

# the oldest supported transformers, the one that vLLM pins, and the newest; each in a virtual environment of its own
test-versions: $(INSTALLED)
	for version in 5.16.1 5.19.0; do \
	  $(PYTHON) -m venv .venv-$$version && \
	  .venv-$$version/bin/python -m pip install --quiet --constraint constraints.txt torch && \
	  .venv-$$version/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]" "transformers==$$version" && \
	  .venv-$$version/bin/python -m pytest || exit 1; \
	done
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info
