# Everything runs in .venv, made here at the first use from any Python 3.11-3.13 (or reused when it is there).
#
# A torch >= 2.10 that this Python can already import is used as it is; otherwise the one pinned in constraints.txt is
# installed. What that downloads, measured on Linux x86-64 with Python 3.11: `make quickstart` 302 MB with a CPU build of
# torch (192 MB; 1.3 GB installed), 2.8 GB with the build PyPI serves there by default, CUDA libraries included. pip prefers
# the CPU build once it is shown one: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make quickstart
# `make test` and the other targets need 140 MB more (61 MB of it is the Node that pyright runs on).

VENV := .venv
PY := $(VENV)/bin/python
JOBS ?= 2
# Originals we compare with; --no-deps because they ask for torchvision, which the comparisons replace by a stub.
PEERS := torchscale timm einops open_clip_torch ftfy wcwidth

.PHONY: help setup quickstart check format test test-slow docs lines bench bench-full study clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(VENV)/.stamp-dev  ## install everything needed to use, test and change multiway

quickstart: $(VENV)/.stamp-quickstart  ## train a small BEiT-3 in minutes; writes runs/quickstart/report.html
	$(PY) -m multiway quickstart

check: $(VENV)/.stamp-dev  ## format, lint, types and the rules of the house
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(VENV)/bin/pyright
	$(PY) -m pytest -q tests/house

format: $(VENV)/.stamp-dev  ## rewrite the sources in the house's format
	$(PY) -m ruff check --fix-only --quiet
	$(PY) -m ruff format

test: $(VENV)/.stamp-dev  ## the default suite, minutes
	$(PY) -m pytest -n $(JOBS) --dist worksteal

test-slow: $(VENV)/.stamp-dev  ## the tests that take minutes each
	$(PY) -m pytest -m slow

docs: $(VENV)/.stamp-dev  ## build the documentation into site/
	$(PY) -m mkdocs build --strict --quiet

lines: $(VENV)/.stamp-dev  ## count lines against the guides for size
	@$(PY) -m tests.house.sizes

bench: $(VENV)/.stamp-bench  ## speed beside the originals, with floors and goals; under 15 minutes on two cores
	$(PY) benchmarks/table.py --quick

bench-full: $(VENV)/.stamp-bench  ## the same with every row at full size, and vision beside transformers
	$(PY) benchmarks/table.py --full
	$(PY) -W ignore benchmarks/vision.py

study: $(VENV)/.stamp-dev  ## what masked pre-training does for contrast at equal compute
	$(PY) benchmarks/study_pretraining.py

clean:  ## remove what was built; runs/ and .venv stay
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis

# --- the environment ----------------------------------------------------------------------------------------------------
# PYTHON=... chooses the interpreter; otherwise the first that runs (shims may not), one with a usable torch before others.

RIGHT_VERSION := import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13)
USABLE_TORCH := import torch; assert torch.__version__ >= "2.10"
PYTHON ?= $(shell \
	for condition in '$(RIGHT_VERSION); $(USABLE_TORCH)' '$(RIGHT_VERSION)'; do \
		for python in python3.13 python3.12 python3.11 python3 python; do \
			if $$python -c "$$condition" >/dev/null 2>&1; then echo $$python; exit; fi; \
		done; \
	done)

# A .pth file shows the environment the packages that lie beside the interpreter's own torch; pip never writes there.
define make_environment
	@set -e; if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		python="$(PYTHON)"; \
		$${python:-false} -c '$(RIGHT_VERSION)' 2>/dev/null || { echo "multiway needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }; \
		echo "making $(VENV) with $$($$python --version)"; \
		$$python -m venv $(VENV); \
		beside=$$($$python -c '$(USABLE_TORCH); print(torch.__path__[0].rpartition("/")[0])' 2>/dev/null) \
			&& echo "$$beside" > $$(echo $(VENV)/lib/python3.*/site-packages)/torch_beside.pth || true; \
	fi
	@torch=$$($(PY) -c '$(USABLE_TORCH); print(torch.__version__)' 2>/dev/null || sed -n 's/^torch==//p' constraints.txt); \
		echo "torch $$torch"; sed "s/^torch==.*/torch==$$torch/" constraints.txt > $(VENV)/constraints.txt
endef
INSTALL := $(PY) -m pip install --disable-pip-version-check --constraint $(VENV)/constraints.txt

$(VENV)/.stamp-quickstart: pyproject.toml constraints.txt
	$(make_environment)
	$(INSTALL) --editable ".[quickstart]"
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml constraints.txt
	$(make_environment)
	$(INSTALL) --editable ".[quickstart,dev]"
	$(INSTALL) --no-deps $(PEERS)
	@touch $(VENV)/.stamp-quickstart $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-dev
	$(INSTALL) --no-deps webdataset braceexpand
	@touch $@
