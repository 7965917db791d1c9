# Two commands: `make demo` and `make test`. Each sets up its own environment first; PYTHON= chooses the interpreter, and
# TESTS= some of the tests: make test TESTS="-m 'not slow'"

PYTHON ?= python3
TAG := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv-$(TAG)
RUN := $(VENV)/bin

.PHONY: demo test lint bench docs clean

demo: $(VENV)/ready
	$(RUN)/python examples/train_digits.py

test: lint
	$(RUN)/python -m pytest -q -n 2 --dist loadfile $(TESTS)

lint: $(VENV)/ready
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/mypy

bench: $(VENV)/bench
	$(RUN)/python benchmarks/report.py

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build  # with --quiet no warning counts
	@echo "site/index.html; with search: $(RUN)/mkdocs serve"

$(VENV)/bench: $(VENV)/ready
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, $(PYTHON) is $(TAG): make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,test]'
	@touch $@

clean:
	rm -rf .venv-* build dist site demo-output resume-output .mypy_cache .pytest_cache .ruff_cache
