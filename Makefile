# One virtual environment for everything; constraints.txt pins every version.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q -c constraints.txt

.PHONY: demo test lint docs clean

# torch first and pinned: a range-only install would bring the CUDA build.
$(VENV)/.base: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .[demo]
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) -e .[test]
	$(PIP) --no-deps spikingjelly # it asks for torchaudio, of which there may be no CPU build
	touch $@

demo: $(VENV)/.base
	$(BIN)/python -m graphopt optimize torchvision:resnet50

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e .[docs]
	touch $@

# A site of files in build/site that loads nothing from elsewhere.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build *.egg-info
