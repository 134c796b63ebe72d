# `make demo` and `make test` set themselves up: a virtual environment, the installation, then the job. Both can be repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tests of a file share what one of them has trained. Files with many tests are not the long ones.
IN_PARALLEL := --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo table test test-middle test-slow test-versions audit lock lint types docs install clean

demo: install
	$(BIN)/python tools/pretrain.py

# Every method on CIFAR-10, about four hours of one core for a seed of all, ten for the whole table; goes on where it was stopped.
CIFAR10 ?= cifar10
table: install
	OMP_NUM_THREADS=1 $(BIN)/python docs/cifar10_table.py $(CIFAR10) runs/cifar10-table

test: install lint types
	$(BIN)/python -m pytest $(IN_PARALLEL)

# Trainings that are killed, stopped, sharded and spread over two processes: what a change of the training loop should pass.
test-middle: install
	$(BIN)/python -m pytest -m middle $(IN_PARALLEL)

test-slow: install
	$(BIN)/python -m pytest -m slow

# Lowest stated and newest versions of all dependencies, in environments of their own.
test-versions:
	PYTHON=$(PYTHON) .ci/versions

# Known holes in what is locked; asks an advisory service on the network.
audit: install
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --requirement .ci/lock.txt --require-hashes --disable-pip --strict

# The newest versions of everything, with the hash of every file, for all systems and Pythons.
lock: install
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes --upgrade \
		--no-annotate --custom-compile-command "make lock" --quiet --output-file .ci/lock.txt

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

# The documentation as a site, in build/docs.
docs: install
	$(BIN)/sphinx-build -q -W --keep-going docs build/docs

install: $(VENV)/.installed

# Again whenever the dependencies change.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'mim needs Python 3.11 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest .mypy_cache .ruff_cache .pytest_cache
