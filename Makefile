# Two commands: `make demo` and `make test`. Both set up .venv first; nothing but Python 3.11+ and make is needed.
PYTHON ?= python3
VIDEOS ?=
RECORD ?=
RUN ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint setup clean

demo: setup
	$(BIN)/promag demo --config demo --output-dir $(RUN) $(if $(VIDEOS),--videos "$(VIDEOS)") $(if $(RECORD),--record "$(RECORD)")

test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/typing_stubs.py
	$(BIN)/pyright

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py .ci/torchvision_schemas.py .ci/typing_stubs.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --no-input --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python .ci/torchvision_schemas.py
	$(BIN)/python .ci/typing_stubs.py
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
