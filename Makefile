# Each target makes its own .venv from requirements.txt where there is none.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= digits
OUT ?= out/demo

.PHONY: demo test test-grid compile-oldest lint bench clean

demo: .venv/ready ## train on real digits, verify, sample, invert, draw
	$(BIN)/python -m mintnet_triton demo --data $(DATA) --out $(OUT)

test: .venv/ready ## all tests
	$(BIN)/python -m pytest -n auto

test-grid: .venv/ready ## the kernels over the full grid of cases: an hour or two without a GPU
	$(BIN)/python -m pytest -n auto --full-grid tests/test_masked_conv_kernels.py \
		tests/test_mint_layer_kernels.py tests/test_inversion_kernels.py

compile-oldest: .venv/ready ## the kernels, with the oldest Triton that they are for
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade \
		--target .venv/triton-oldest triton==3.6.0
	PYTHONPATH=$(CURDIR)/.venv/triton-oldest $(BIN)/python -m pytest -n auto tests/test_compile.py

lint: .venv/ready ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/ready ## how fast, against whom, how near the limit: tables and pictures
	$(BIN)/python -m bench run

clean:
	rm -rf .venv out build dist *.egg-info

.venv/ready: requirements.txt
	@$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed'"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@
