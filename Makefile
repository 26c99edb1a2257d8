# `make demo` and `make test` set up .venv first; nothing but Python 3.11+ and make is needed.
# `make gpu` measures on a machine that has PyTorch and no network: the other packages come as wheels, from `make wheels WHEELS=DIR`,
# with HAVE=FILE without those that FILE lists, what `pip list --format=freeze` prints there.
PYTHON ?= python3
VIDEOS ?=
RECORD ?=
RUN ?= runs/demo
WHEELS ?=
HAVE ?=
OUT ?= runs/gpu
DEVICE ?= cuda
COMMIT ?=
# Minutes of the suites; with the tests before them and the last group of cases the whole call takes eight at most.
MINUTES ?= 5
SUITES ?= train tokenizer transformer sampling data
# What a CPU measures is the smallest there is, to see that the call works.
SETTINGS ?= $(if $(filter cpu,$(DEVICE)),--quick --presets tiny --precision fp32,--compile --graphs --peers --overlap --precision bf16 --rounds 4 --ratios 4 16)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint gpu wheels setup clean

demo: setup
	$(BIN)/promag demo --config demo --output-dir $(RUN) $(if $(VIDEOS),--videos "$(VIDEOS)") $(if $(RECORD),--record "$(RECORD)")

test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 3 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/typing_stubs.py
	$(BIN)/pyright

# Each command goes on after the one before it failed; the status is that of all.
gpu: export PYTHONPATH := $(CURDIR)/runs/packages:$(CURDIR):$(PYTHONPATH)
gpu: export HF_HUB_OFFLINE := 1
gpu:
	mkdir -p "$(OUT)"
	$(if $(WHEELS),$(PYTHON) -m pip install -q --no-index --no-deps --no-compile --upgrade --target runs/packages "$(WHEELS)"/*.whl)
	status=0; \
	timeout --signal=INT --kill-after=5 95 $(PYTHON) -m pytest tests/test_cuda.py > "$(OUT)/tests.txt" 2>&1 || status=$$?; \
	tail -n 3 "$(OUT)/tests.txt"; \
	timeout $$(( $(MINUTES) * 60 + 50 )) $(PYTHON) -m promag benchmark speed $(SUITES) --device $(DEVICE) $(SETTINGS) \
		--minutes $(MINUTES) $(if $(COMMIT),--commit $(COMMIT)) --record "$(OUT)/speed.jsonl" || status=$$?; \
	exit $$status

wheels: setup
	$(BIN)/python .ci/wheels.py "$(WHEELS)" $(if $(HAVE),--have "$(HAVE)")

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
