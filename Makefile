PYTHON ?= python

.PHONY: install lint format test bench docs aot gpu virtual-gpu

install:  ## editable, with everything a contributor needs
	$(PYTHON) -m pip install -e ".[test,bench,train,demo,docs]" ruff mypy clang-format

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	clang-format --dry-run --Werror $(shell git ls-files '*.cu' '*.cuh' '*.cpp' '*.h')

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	clang-format -i $(shell git ls-files '*.cu' '*.cuh' '*.cpp' '*.h')

test:
	$(PYTHON) -m pytest

bench:
	$(PYTHON) benchmarks/resnet.py

docs:  ## the pages of docs/ into site/; every link and every section that is included has to be there
	$(PYTHON) -m mkdocs build --strict

aot:  ## compile every kernel's configurations for GPUs that need not be there
	$(PYTHON) tests/aot.py
	$(PYTHON) tests/aot_cuda.py 8.0 9.0a

gpu:  ## measure on a GPU: PART=1, the first to run, to 7; each under 9 minutes; results into benchmarks/results or $$OUT
	PYTHON=$(PYTHON) benchmarks/gpu.sh

virtual-gpu:  ## the tests that need a GPU, on one made of the CPU; two hours on two cores
	$(PYTHON) -m pytest --virtual-gpu=80
	$(PYTHON) -m pytest --virtual-gpu=90
