# Each target makes its own .venv from requirements.txt where there is none.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= digits
OUT ?= out/demo

.PHONY: demo test test-ptx test-adapters test-all lint docs bench clean

demo: .venv/ready ## train on real digits, verify, sample, invert, draw
	$(BIN)/python -m mintnet_triton demo --data $(DATA) --out $(OUT)

test: .venv/ready ## every mechanism: within 8 minutes on two cores
	$(BIN)/python -m pytest -n auto --dist worksteal

test-ptx: .venv/ready ## every kernel as compiled for sm_80 and sm_90, executed on a CPU
	$(BIN)/python -m pytest -n auto --dist worksteal --full tests/test_ptx.py

test-adapters: .venv/ready ## inside the other flow libraries, none of which may be missing
	$(BIN)/python -c "import FrEIA, huggingface_hub, nflows, normflows, onnxscript, pyro, sbi, torchflows, zuko"
	$(BIN)/python -m pytest tests/adapters tests/test_export.py

test-all: docs ## every case and every GPU, with the oldest Triton, too: hours without a GPU
	$(BIN)/python -m pytest -n auto --dist worksteal --full
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade \
		--target .venv/triton-oldest triton==3.6.0
	PYTHONPATH=$(CURDIR)/.venv/triton-oldest $(BIN)/python -m pytest -n auto --full tests/test_compile.py

lint: .venv/ready ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/ready-docs ## the pages and the API as a site, in out/docs; a warning is an error
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env docs out/docs

bench: .venv/ready ## how fast, against whom, how near the limit: tables and pictures
	$(BIN)/python -m bench run

clean:
	rm -rf .venv out build dist *.egg-info

.venv/ready: requirements.txt
	@$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or newer is needed'"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

.venv/ready-docs: .venv/ready docs/requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt \
		-r docs/requirements.txt
	touch $@
