# Two commands on a fresh machine with Python >= 3.11 and pip: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
RUN     = $(VENV)/bin
# A worker for each core, of 1 to 2 GB; one that is idle takes over what lies at the end of another one's list.
PARALLEL ?= -n auto --maxprocesses=4 --dist=worksteal

OLDEST  = tests/conv tests/blocks tests/octave tests/proof tests/test_torch_compat.py tests/test_threads.py tests/test_golden.py

.PHONY: demo test test-oldest check fmt docs bench networks fit zoo mutations hostile clean

demo: $(VENV)/.installed
	$(RUN)/surgeon demo

test: $(VENV)/.installed-test
	$(RUN)/python -m pytest $(PARALLEL)

test-oldest: $(VENV)-oldest/.installed  # with the oldest versions allowed; newer parts of them may call what is deprecated by now
	$(VENV)-oldest/bin/python -m pytest -W ignore::DeprecationWarning $(OLDEST)

check: $(VENV)/.installed-dev
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/python -m pytest $(PARALLEL)

fmt: $(VENV)/.installed-dev
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

docs: $(VENV)/.installed-dev  # docs/cli.md and the tour in README.md are made from the program
	$(RUN)/python scripts/make_docs.py

bench: $(VENV)/.installed-test
	$(RUN)/python benchmarks/convert.py
	$(RUN)/python benchmarks/hetconv.py
	$(RUN)/python benchmarks/kept_energy.py
	$(RUN)/python benchmarks/octave.py
	$(RUN)/python benchmarks/scaling.py
	$(RUN)/python benchmarks/fit_memory.py --network resnet18 --pixels 64 --images 320 640 --batch 64

networks: $(VENV)/.installed-test  # ten minutes of two cores; docs/networks.md is made of them
	$(RUN)/python benchmarks/networks.py

fit: $(VENV)/.installed-test  # hours of two cores; it can be stopped, and goes on from there
	$(RUN)/python benchmarks/fit.py

zoo: $(VENV)/.installed-test  # hours; it can be stopped, and goes on from there
	$(RUN)/python benchmarks/zoo.py --write-docs

mutations: $(VENV)/.installed-test  # an hour or two of one core; it can be stopped, and goes on from there
	$(RUN)/python benchmarks/mutations.py --write-docs

hostile: $(VENV)/.installed-test  # the same
	$(RUN)/python benchmarks/hostile.py --write-docs

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torchvision pins torch, so what needs both is resolved in one go
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(RUN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(RUN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(RUN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed $(VENV)/.installed-test

$(VENV)-oldest/.installed: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable '.[test]'
	touch $@
