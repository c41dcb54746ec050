# A fresh machine needs Python 3.11 or newer and nothing else: each target makes the environment it uses.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CHECKOUT = pyproject.toml constraints.txt

.PHONY: quickstart test test-slow lint docs wheel clean

## Train the quick study here and now, nine cells at once on a core, and write results/quick/ (six minutes on two cores).
quickstart: $(VENV)/.core
	$(VENV)/bin/lit-mult sweep quick --vectorize 9 --out results/quick

## Lint, types, architecture and tests.
test: $(VENV)/.dev lint
	$(VENV)/bin/python -m pytest -n auto --dist worksteal

## The tests that take minutes.
test-slow: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -m slow

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

## Build the pages of docs/ into build/docs, all of them, as the code may have changed where they have not. Warnings are
## errors, and nothing is fetched.
docs: $(VENV)/.docs
	$(VENV)/bin/python -m sphinx -b html --fresh-env --write-all -W --keep-going -q docs build/docs

## Build the sdist and, from it, the wheel; check both, and that the wheel, installed elsewhere, brings its studies and
## presets along.
wheel: $(VENV)/.dev
	rm -rf dist build/wheel-check
	$(VENV)/bin/python -m build --quiet --no-isolation
	$(VENV)/bin/python -m twine check --strict dist/*
	$(PIP) --no-deps --target build/wheel-check dist/*.whl
	cd build/wheel-check && ../../$(VENV)/bin/python -P -c "import sys; sys.path.insert(0, '.'); \
	  import lit_mult; assert 'wheel-check' in lit_mult.__file__, lit_mult.__file__; \
	  from lit_mult.method.presets import load_preset; \
	  print(lit_mult.load_study('quick').n_cells, 'cells;', load_preset('falcon-h1-0.5b').name)"

clean:
	rm -rf $(VENV) dist build docs/results/reports .pytest_cache .mypy_cache .ruff_cache

# torch alone first: with it in place nothing that follows resolves another build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/.core: $(VENV)/.torch $(CHECKOUT)
	$(PIP) --editable .
	touch $@

$(VENV)/.docs: $(VENV)/.torch $(CHECKOUT)
	$(PIP) --editable '.[docs]'
	touch $@ $(VENV)/.core

$(VENV)/.dev: $(VENV)/.torch $(CHECKOUT)
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps litgpt  # its models need nothing more, and its requirements pin much
	touch $@ $(VENV)/.core
