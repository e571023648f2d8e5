# One set-up for everything: `make demo` on a machine with nothing but Python 3.11 makes .venv and opens the demo.
#   PYTHON=...             the interpreter that .venv is made with
#   ARGS="--port 7861"     passed on to demo.py (make demo), pytest (make test) or benchmarks (make bench)
#   JOBS=2                 processes that run the tests (make test)
#   ARGS="-m 'not slow'"   the tests that take seconds (make test)
#   COMPANION_PROFILE=paper notebooks at the papers' size instead of the quick one

PYTHON ?= $(shell command -v python3.11 || command -v python3)
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
SOURCES := companion tests $(wildcard demo.py benchmarks docs space tools) $(NOTEBOOKS)
JOBS ?= 2
export COMPANION_PROFILE ?= small

.PHONY: help demo test notebooks docs bench lint
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up .venv and open the demo on http://127.0.0.1:7860"
	@echo "make test       set up .venv and run all tests, notebooks included"
	@echo "make notebooks  set up .venv and open the notebooks in JupyterLab"
	@echo "make docs       set up .venv and build the site, build/site/index.html"
	@echo "make bench      measure time, memory and exactness again, and print docs/benchmarks.md"
	@echo "make lint       ruff and mypy"

demo: .venv/ready-demo
	.venv/bin/python demo.py $(ARGS)

# Files of tests, each whole, on JOBS processes of one thread each; a notebook's cells stay together and in order.
# glibc keeps freed memory: to fetch and clear it anew for every tensor costs up to half of a small tensor's time.
test: export MALLOC_MMAP_THRESHOLD_ = 33554432
test: export MALLOC_TRIM_THRESHOLD_ = 268435456
test: .venv/ready-dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0 \
		--nbval-lax --nbval-current-env --nbval-cell-timeout=600 --durations=60 tests $(NOTEBOOKS) $(ARGS)

notebooks: .venv/ready-notebooks
	.venv/bin/python -m jupyter lab notebooks

# From the outputs in the notebooks; nothing is executed. A warning, such as a link to nowhere, is an error.
docs: .venv/ready-docs
	.venv/bin/python -m sphinx -W --keep-going -q -j auto -d build/doctrees -c docs . build/site
	@echo "open build/site/index.html"

bench: .venv/ready-all
	.venv/bin/python -m benchmarks $(ARGS)

lint: .venv/ready-dev
	.venv/bin/python -m ruff check $(SOURCES)
	.venv/bin/python -m ruff format --check $(SOURCES)
	.venv/bin/python -m mypy

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python found: install 3.11 or newer, or name one: make demo PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "$(PYTHON) is no Python 3.11 or newer: install one, or name one: make demo PYTHON=/path/to/python3.11"; exit 1; }
	"$(PYTHON)" -m venv .venv

# .venv/ready-NAME has what `make NAME` needs; tools/install.py says where torch comes from.
EXTRAS_dev := all,dev,docs
.venv/ready-%: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python tools/install.py $(or $(EXTRAS_$*),$*)
	touch $@
