# One command for each thing that a checkout needs. `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DATA := data/quickstart
DATA_READY := $(DATA)/train/manifest.json
RUN := runs/quickstart

# The programs of the virtual environment (deepspeed, torchrun) find each other through PATH.
export PATH := $(abspath $(BIN)):$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart test check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## make the virtual environment .venv with the pinned dependencies

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is missing or older than Python 3.11: make PYTHON=python3.11 ..." >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval]'
	@touch $@

$(DATA_READY): | $(READY)
	python data_prep/shard.py --source stdlib --vocab-size 4096 --chunks-per-shard 32 \
	  --valid-fraction 0.02 --out $(DATA)

quickstart: $(READY) $(DATA_READY)  ## prepare data, train, evaluate and generate, from nothing
	@# The tiny model has 4 lanes: as many ranks as there are GPUs, but 1, 2 or 4; without GPUs 2.
	deepspeed --quiet --num_accelerators $$(python -c \
	  'import torch; n = torch.cuda.device_count(); print(4 if n > 3 else 2 if n != 1 else 1)') \
	  launch/train.py --deepspeed configs/zero2.json --config configs/tiny.yaml --fresh \
	  data.path=$(DATA) run.path=$(RUN)
	python launch/evaluate.py --checkpoint $(RUN) --data $(DATA)
	python launch/generate.py --checkpoint $(RUN) --prompt "def " --tokens 120
	@echo "curves:  $(RUN)/plots/loss.png and $(RUN)/plots/history.png"
	@echo "mlflow:  $(BIN)/mlflow ui --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///$(dir $(RUN))mlflow.db}"
	@echo "         http://127.0.0.1:5000/#/experiments"

test: $(READY)  ## run the tests
	@# Three files at a time for two cores: many tests wait for the processes that they start.
	pytest -n 3 --dist loadfile --no-loadscope-reorder

check: $(READY)  ## run ruff and mypy
	ruff check .
	ruff format --check .
	mypy

clean:  ## remove the environment and caches; data and runs stay
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
