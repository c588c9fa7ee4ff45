# `make demo` and `make test` install their dependencies in .venv. Requires Python 3.11+ with pip.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-fast test-slow test-soak lint proto clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/installed: setup.py constraints.txt $(wildcard kernels/native/*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

demo: .venv/installed  ## serve the embedded model and ask it about images and a video
	$(BIN)/python -P -m octavo.benchmarks.demo

lint: .venv/installed-test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .venv/src && ln -sfn $(CURDIR) .venv/src/octavo
	cd .venv/src && ../bin/mypy --config-file ../../pyproject.toml -p octavo

test: lint .venv-proto/installed  ## lint, then run the test suite (as .ci/run does)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Left out: minutes of compilation and interpretation, and scripts that start whole processes.
FAST := tests/scheduler tests/kernels tests/input tests/engine \
  --ignore tests/kernels/test_interpreter.py --ignore tests/kernels/test_kernels_compiled.py \
  --ignore tests/engine/test_exit.py --ignore tests/engine/test_forks.py

test-fast: lint  ## while developing: lint, scheduler, kernels, input and engine, in 3 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(FAST)

test-slow: .venv/installed-test  ## slow tests (minutes each)
	$(BIN)/python -m pytest -m slow --timeout 1800

test-soak: .venv/installed-test  ## one hour of mixed load: checks for leaks and lost requests
	$(BIN)/python -P -m octavo.benchmarks.soak --minutes 60 --warm-up 20 --json soak.json

# protoc 25 (grpcio-tools 1.62) generates stubs that protobuf 4.25 and later can load.
.venv-proto/installed:
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/pip install --disable-pip-version-check grpcio-tools==1.62.3 "setuptools<81"
	touch $@

OUT ?= .venv-proto/src

proto: .venv-proto/installed  ## regenerate the stubs in proto/
	rm -rf .venv-proto/src && mkdir .venv-proto/src && ln -s $(CURDIR) .venv-proto/src/octavo
	.venv-proto/bin/python -m grpc_tools.protoc -I.venv-proto/src --python_out=$(OUT) \
	  --pyi_out=$(OUT) --grpc_python_out=$(OUT) octavo/proto/octavo.proto octavo/proto/worker.proto
	.venv-proto/bin/python -m grpc_tools.protoc -I.venv-proto/src --python_out=$(OUT) \
	  --pyi_out=$(OUT) octavo/proto/media.proto octavo/proto/grammar.proto

clean:  ## remove the environments
	rm -rf .venv .venv-proto
