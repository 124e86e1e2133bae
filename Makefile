# make demo | test | coverage | lint | docs | clean. The first run creates an environment in .venv. Nothing is installed outside of it, with
# one exception: Debian's venv package, if it is missing and make runs as root.
# To use another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
METADATA := setup.py pyproject.toml constraints.txt

.PHONY: help demo test coverage lint docs clean

help:
	@echo "make demo      train, route and report on synthetic video, on this machine"
	@echo "make test      run the tests"
	@echo "make coverage  run the tests, and print the lines that none of them runs"
	@echo "make lint      ruff and mypy"
	@echo "make docs      write the documentation as a site to build/docs"
	@echo "make clean     remove the environment, caches and builds (runs/ stays)"

demo: $(VENV)/.installed
	$(BIN)/videoadapt demo

# Three processes on two cores, because tests of SLURM and of ranks mostly wait.
TEST := $(BIN)/python -m pytest -q --numprocesses 3 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-test
	$(TEST)

# Apart from `make test`: it takes a third more time.
coverage: $(VENV)/.installed-test
	$(TEST) --cov --cov-report=term

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy videoadapt tests $(wildcard tools/*.py slurm/*.py)

# The variable silences the theme's advertisement of its successor; warnings of the build remain.
docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict -f tools/mkdocs.yml
	@echo "build/docs/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find videoadapt tests tools slurm -name __pycache__ -prune -exec rm -rf {} +

# The stamp files record the last installation, so a change of the metadata installs again. The environment of the tests
# also has all that the demo needs, so installing it updates both stamps.
$(VENV)/.installed: $(METADATA) | $(BIN)/pip
	@echo "Installing into $(VENV): torch and its CUDA libraries are about 5 GB, so this takes minutes."
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: $(METADATA) | $(BIN)/pip
	@echo "Installing into $(VENV): torch and its CUDA libraries are about 5 GB, so this takes minutes."
	$(PIP_INSTALL) -e '.[docs,test]'
	@touch $(VENV)/.installed $@

# pip is the target, because venv creates it last: without it the environment is incomplete. Debian and Ubuntu ship Python
# without the package that venv needs, so a missing package is installed here (as root) or named in an error.
PYTHON_XY = $(shell $(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])')

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "videoadapt needs Python 3.10 or newer; $(PYTHON) is not. Name another: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(PYTHON) -c 'import virtualenv' 2>/dev/null || \
	    { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq $(PYTHON_XY)-venv; } || \
	    { echo "$(PYTHON) cannot make environments. Install its venv module (sudo apt install $(PYTHON_XY)-venv) and run make again." >&2; exit 1; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || $(PYTHON) -m virtualenv --quiet $(VENV)
