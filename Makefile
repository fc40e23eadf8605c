# Everything people do with this repository. `make` lists it.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Bare machines have no uv: the environment is made by plain venv and pip, faster with uv if it is there.
UV := $(shell command -v uv 2>/dev/null)
INSTALL := $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check)

PROTOS := $(shell find protos -name '*.proto')
STUBS := server/headrace/v1/prediction_service_pb2.py
INSTALLED := $(VENV)/.installed
TRITON := .venv-triton/.installed
PEERS := .venv-peers/.installed
TRACING := .venv-traces/.installed
GPU := .venv-gpu/.installed
MODEL := model_repository/home_valuation/1/manifest.json

.PHONY: help setup triton peers protos model demo up traces test test-all test-gpu lint fmt bench bench-features bench-overload bench-soak loadtest loadtest-ui profile lock clean

help:  ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(INSTALLED) protos  ## make .venv with everything, headrace included

$(INSTALLED): requirements.lock requirements-data.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 to 3.13 is needed: make PYTHON=python3.12 $@" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || \
	  { echo "make: $(PYTHON) has no venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --no-deps --require-hashes -r requirements.lock
	$(INSTALL) --no-deps --require-hashes -r requirements-data.lock
	$(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

protos: $(STUBS)  ## generate the Python stubs from protos/

$(STUBS): $(PROTOS) | $(INSTALLED)
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=server --pyi_out=server --grpc_python_out=server $(PROTOS)

model: $(MODEL)  ## train the home valuation model and export it to ONNX

$(MODEL): model_repository/home_valuation/train.py model_repository/home_valuation/home_sales.py $(STUBS)
	$(BIN)/python model_repository/home_valuation/train.py
	touch $@

demo: setup model  ## real home sales through the whole path, on this machine; exits by itself
	$(BIN)/headrace demo

up: setup model  ## the same stack, serving until Ctrl-C; TRACES=1 sends every call's trace to `make traces`
	$(if $(TRACES),OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317 OTEL_TRACES_SAMPLER_ARG=1) $(BIN)/headrace up

traces: $(TRACING)  ## a trace viewer on http://127.0.0.1:6006, until Ctrl-C
	PHOENIX_HOST=127.0.0.1 PHOENIX_PORT=6006 PHOENIX_GRPC_PORT=4317 PHOENIX_TELEMETRY_ENABLED=false \
	  PHOENIX_WORKING_DIR=$(CURDIR)/.venv-traces/data .venv-traces/bin/phoenix serve

# An environment of its own, of half a gigabyte: nothing else needs it.
$(TRACING): requirements-traces.lock
	test -x .venv-traces/bin/python || $(PYTHON) -m venv .venv-traces
	$(subst $(BIN),.venv-traces/bin,$(INSTALL)) --no-deps --require-hashes -r requirements-traces.lock
	touch $@

triton: $(TRITON)  ## put a real Triton server beside, for the tests of models that run elsewhere and the bench

# An environment of its own: its Python backend needs numpy 1. Where there is no wheel, the tests are skipped.
# ONNX Runtime is for the bench.
$(TRITON): requirements-triton.lock
	test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	$(subst $(BIN),.venv-triton/bin,$(INSTALL)) --no-deps --require-hashes -r requirements-triton.lock || \
	  echo "make: no Triton for this machine; its tests are skipped"
	touch $@

peers: $(PEERS) $(TRITON)  ## put MLServer and Triton beside, for the bench

# An environment of its own, of 400 MB: MLServer has its own wishes for half of what we use.
$(PEERS): requirements-peers.lock
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	$(subst $(BIN),.venv-peers/bin,$(INSTALL)) --no-deps --require-hashes -r requirements-peers.lock || \
	  echo "make: no MLServer for this machine; the bench goes without"
	touch $@

# Two at a time, a file's tests together; then, one at a time, those that time a server or count what comes in a while.
# What fails in company of others is run once more by itself, and said: what fails twice fails.
QUICK := not slow and not gpu
AGAIN := { echo "make: once more, one at a time, what failed"; \
  $(BIN)/python -m pytest -m "$(QUICK)" --exitfirst --last-failed --last-failed-no-failures none; }

test: setup model triton  ## all tests but the slow ones
	$(BIN)/python -m pytest -m "$(QUICK) and not alone" --numprocesses 2 --dist loadfile || $(AGAIN)
	$(BIN)/python -m pytest -m "$(QUICK) and alone" || $(AGAIN)

test-all: setup model triton  ## all tests but those for a GPU
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(GPU)  ## the tests that need an NVIDIA GPU, with CUDA from wheels; skipped, with the reason, without one
	.venv-gpu/bin/python -m pytest -m gpu -v -s tests/gpu tests/contracts/test_backend.py

# An environment of its own: the two builds of ONNX Runtime exclude each other.
$(GPU): requirements-gpu.lock $(PROTOS) pyproject.toml
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	$(subst $(BIN),.venv-gpu/bin,$(INSTALL)) --no-deps --require-hashes -r requirements-gpu.lock
	$(subst $(BIN),.venv-gpu/bin,$(INSTALL)) --no-deps --no-build-isolation --editable .
	.venv-gpu/bin/python -m grpc_tools.protoc -I protos --python_out=server --pyi_out=server --grpc_python_out=server $(PROTOS)
	touch $@

lint: setup  ## check everything, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

fmt: setup  ## format, and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## measure the gateway beside its ceiling, glue code and, after `make peers`, MLServer and Triton; then overload
	$(BIN)/python loadtest/bench/run.py

bench-features: setup  ## measure reads of features against Feast's SDK, `feast listen` and `feast serve`
	$(BIN)/python loadtest/bench/features.py

bench-overload: setup  ## the part of bench that asks for up to five times what the gateway can answer
	$(BIN)/python loadtest/bench/overload.py

profile: setup  ## say where a request's CPU time goes, stage by stage
	$(BIN)/python loadtest/bench/profile_server.py

bench-soak: setup  ## answer an hour's worth of feature reads as fast as they go, and see whether anything grows
	$(BIN)/python loadtest/bench/soak.py

loadtest: setup model  ## Locust against `headrace up`: fails when a target of loadtest/slo.yaml is missed
	$(BIN)/python loadtest/run.py

loadtest-ui: setup model  ## the same by hand, on Locust's page, until Ctrl-C
	$(BIN)/python loadtest/run.py --ui

lock:  ## renew the lock files, but for the trace viewer's (needs uv); requirements-data.lock pins one wheel by hand
	uv pip compile pyproject.toml --universal --python-version 3.11 --extra cpu --group dev \
	  --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet --output-file requirements.lock
	uv pip compile pyproject.toml --universal --python-version 3.11 --extra gpu --group build --group test \
	  --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet --output-file requirements-gpu.lock
	printf 'mlserver==1.7.1\nonnxruntime\n' | uv pip compile - --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet --output-file requirements-peers.lock
# Triton's own wheel asks for more than its server needs.
	printf '%s\n' nvidia-pytriton==0.7.0 numpy==1.26.4 onnxruntime flatbuffers ml-dtypes packaging 'protobuf<7' | \
	  uv pip compile - --no-deps --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet --output-file requirements-triton.lock

clean:  ## remove what was made, the environment too
	rm -rf $(VENV) .venv-triton .venv-peers .venv-traces .venv-gpu .monitor demo-report.html features/data model_repository/*/[0-9]* server/headrace/v1/*_pb2* \
	  .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
