# Two commands for newcomers: `make demo` and `make test`. Everything is installed into .venv from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO_OUT ?= demo
PS ?= ps1
SUBMISSIONS ?= submitted/$(PS)
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test scale lab assignment grade grades lint types check notebooks bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

# torch first and alone: another package that pulled it in might pick a newer build, gigabytes larger.
$(VENV)/base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sparselab needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Installing into $(VENV); a few minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[notebooks]'
	@touch $@

$(VENV)/test: $(VENV)/base
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/course: $(VENV)/base
	$(PIP) -e '.[course]'
	@touch $@

$(VENV)/scale: $(VENV)/base
	$(PIP) -e '.[scale]'
	@touch $@

# Threads that sleep while they wait: an eighth slower on an idle machine, several times quicker on a busy one.
demo lab: export OMP_WAIT_POLICY ?= PASSIVE

demo: $(VENV)/base ## prune the bundled model three ways and print what each cost
	$(BIN)/sparselab compare tiny --out $(DEMO_OUT) --overwrite

test: $(VENV)/test ## run every test that this machine can, two files at a time: make test JOBS=2
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

scale: $(VENV)/scale ## add DeepSpeed, for models partitioned by ZeRO-3

lab: $(VENV)/base ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

assignment: $(VENV)/course ## write what students get: make assignment PS=ps1
	$(BIN)/python -m sparselab.course assignment $(PS) $(OPTIONS)

grade: $(VENV)/course ## grade submissions: make grade PS=ps1 SUBMISSIONS=submitted/ps1
	$(BIN)/python -m sparselab.course grade $(PS) $(SUBMISSIONS) $(OPTIONS)

grades: $(VENV)/course ## write grades and feedback anew, once points were given by hand: make grades PS=ps1
	$(BIN)/python -m sparselab.course grades graded/$(PS)

lint: $(VENV)/test ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/test ## check types
	$(BIN)/mypy

check: lint types test ## everything that CI checks

notebooks: $(VENV)/test ## run the notebooks and store their outputs
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/0*.ipynb

bench: $(VENV)/base ## measure anew what benchmarks/ records
	$(BIN)/sparselab bench --json benchmarks/speed.json
	$(BIN)/sparselab compare tiny --out benchmarks/compare --overwrite
	$(BIN)/python benchmarks/layer_lab.py
	$(BIN)/python benchmarks/trust.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/ranks.py
	$(BIN)/python benchmarks/kills.py --kills 25
	$(BIN)/python benchmarks/sweeps.py

clean: ## remove what make and the tests have made
	rm -rf $(VENV) $(DEMO_OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
