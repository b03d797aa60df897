# Every target makes the environment that it needs, in .venv, from the package registry.
#   make book    build the book into _build/html, every page anew from the measured runs in results/
#   make test    lint, unit tests, and every notebook run live in the tiny profile
#   make tiny    the quickest look: train two methods on scikit-learn's digits
#   make bench   how fast it is on this machine, as ratios
#   make readme  rewrite the results in README.md from results/
#   make clean   remove what was built, and .venv; never results/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What the notebooks need is in what the book and the tests need: whichever is there already will do.
NOTEBOOKS := $(or $(firstword $(wildcard $(VENV)/installed-book $(VENV)/installed-test)),$(VENV)/installed-notebooks)

.PHONY: book test tiny bench readme clean
.DELETE_ON_ERROR:

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

book: $(VENV)/installed-book
	TQDM_DISABLE=1 $(BIN)/jupyter-book build --all --warningiserror --keep-going .
	@echo "open _build/html/index.html"

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

tiny: $(NOTEBOOKS)
	$(BIN)/mislas train --dataset digits --imbalance 10 --method ce mislas --results-root _build/tiny

bench: $(NOTEBOOKS)
	$(BIN)/python benchmarks/train.py

readme: $(NOTEBOOKS)
	$(BIN)/python book/readme.py

clean:
	rm -rf $(VENV) _build build *.egg-info .pytest_cache .ruff_cache
