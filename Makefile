# `make demo` and `make test` on a fresh machine with Python 3.11 or later, pip and make.

PYTHON ?= python3
BIN := .venv/bin
CHECKED := tuner model tests bench

.PHONY: demo test check format wheel clean

demo: .venv/.installed
	rm -rf runs/demo
	$(BIN)/tuner search demo --data synthetic

test: .venv/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: .venv/.installed
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/ruff check --fix $(CHECKED)

# What cluster.yaml installs on every node. Alone in dist/: a node takes what lies there.
wheel: .venv/.installed
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation

# Constraints pin what was run; pyproject.toml says what may run. The extras are what all verbs need.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cluster,dashboard,export,wandb-pages,dev]'
	touch $@

clean:
	rm -rf .venv dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
