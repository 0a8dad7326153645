# The commands of the README. Each makes its own virtual environment; python3 (3.10 or newer) is enough.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$python && break; done)

.PHONY: demo test lint docs bench chaos clean

demo: $(VENV)/demo.stamp
	$(BIN)/python -m example_project.demo

# Tests wait more than they compute: several processes, a module in one of them; what measures a time runs after them.
test: lint
	$(BIN)/python -m pytest --numprocesses=3 --dist=loadscope -m 'not alone and not celerys_own'
	$(BIN)/python -m pytest -m alone

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/dev.stamp
	$(BIN)/python -m docs.tables
	$(BIN)/python -m sphinx --builder html --conf-dir docs --fail-on-warning --keep-going . build/docs
	@echo "Open build/docs/docs/index.html"

# In turns with DBOS, Absurd and plain Celery, in an environment of its own; ARGS are options: docs/benchmarks.md.
bench:
	@$(MAKE) --no-print-directory VENV=.venv-bench .venv-bench/bench.stamp
	.venv-bench/bin/python -m tests.benchmarks $(ARGS)

# Everything at once, for DURATION seconds; SEED brings the faults of another run again.
chaos: $(VENV)/dev.stamp
	$(BIN)/python -m tests.chaos $(if $(SEED),--seed=$(SEED)) $(if $(DURATION),--duration=$(DURATION))

clean:
	rm -rf .venv .venv-oldest .venv-bench build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/%.stamp: setup.cfg pyproject.toml $(BIN)/pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --prefer-binary --editable '.[$*]'
	@touch $@

# Debian and Ubuntu ship a python3 whose venv module can't install pip; then pip's own installer does it.
$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "No Python 3.10 or newer was found: set PYTHON=/path/to/python3."; exit 1; }
	$(PYTHON) -m venv $(VENV) || $(MAKE) --no-print-directory venv-without-ensurepip

.PHONY: venv-without-ensurepip
venv-without-ensurepip:
	$(PYTHON) -m venv --clear --without-pip $(VENV)
	$(BIN)/python -c 'from urllib.request import urlretrieve as get; \
	get("https://bootstrap.pypa.io/get-pip.py", "$(VENV)/get-pip.py")'
	$(BIN)/python $(VENV)/get-pip.py --quiet

.SECONDARY:
