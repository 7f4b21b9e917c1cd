# make sweep: trains the quickstart sweep and prints its tables; make test: linters, types and tests.
# make test-slow, test-slurm (Debian's SLURM packages), test-kills: tests that take minutes; test-report: the report in a
# headless Chromium. make docs: the pictures and tables of the pages, from sweeps on embedded data.
# Each makes its own environment in .venv first (Python 3.11 or newer, pip).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
QUICKSTART := sweep_output/quickstart
DOCS := sweep_output/docs

.PHONY: sweep test test-slow test-slurm test-kills test-report docs clean

sweep: .venv/installed
	$(BIN)/python -m domainbed.scripts.sweep launch sweeps/quickstart.toml --output_dir $(QUICKSTART) --skip_confirmation
	$(BIN)/python -m domainbed.scripts.collect_results --input_dir $(QUICKSTART)

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2

docs: sweep
	$(BIN)/python -m domainbed.scripts.sweep launch sweeps/docs.toml --output_dir $(DOCS) --skip_confirmation
	$(BIN)/python docs/make.py --quickstart $(QUICKSTART) --docs $(DOCS)
	$(BIN)/python examples/render.py

test-slow: .venv/installed
	$(BIN)/pytest -q -m slow

test-slurm: .venv/installed
	$(BIN)/pytest -q -m slurm tests/slurm

test-report: .venv/installed
	$(BIN)/pip install --quiet --editable '.[dev,browser]'
	$(BIN)/pytest -q -m browser tests/browser

test-kills: .venv/installed
	$(BIN)/python tests/kills.py --kills 100 --requests 30 --operations 1 --damage --seed 0

.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv sweep_output
