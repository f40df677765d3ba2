# Everything runs in .venv, which is made when it isn't there. PYTHON chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test check lint types bench corpus opinfo fuzz setup clean

demo: $(READY)
	$(BIN)/optimize-cli models/eigenstate.py

test: $(READY)
	$(BIN)/python -m pytest -n auto

check: lint types test

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	MYPYPATH=.venv/package $(BIN)/mypy -p looplift

bench: $(READY)
	$(BIN)/python tests/bench.py

corpus: .venv/corpus
	$(BIN)/python tests/corpus/run.py --write docs/corpus.md

# vit-pytorch asks for torchvision, of which there is no CPU build for every torch; it isn't used
.venv/corpus: $(READY) constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,corpus]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt vit-pytorch
	touch $@

opinfo: $(READY)
	$(BIN)/python tests/opinfo.py --write docs/opinfo.md

MINUTES ?= 10
fuzz: $(READY)
	$(BIN)/python tests/fuzz.py --minutes $(MINUTES)
	$(BIN)/python tests/steps.py --minutes $(MINUTES)

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	mkdir -p .venv/package && ln -sfn ../.. .venv/package/looplift  # the root under its import name
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
