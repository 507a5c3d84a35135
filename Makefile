# `make` shows what there is. Everything lives in .venv; nothing else on the machine is touched.
PYTHON ?= python3
ENGINE ?= auto
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(PYTHON) -m deploy.install --engine $(ENGINE)
# Two processes; the tests of a file stay together (tests/conftest.py).
TWO := -n 2 --no-loadscope-reorder
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
TARGETS ?= gateway worker-cpu
DOCKER ?= docker

.DEFAULT_GOAL := help
.PHONY: help install serve test test-all soak chaos lint bench gpu-check images lock dashboards compatibility pictures clean

help:  ## show this
	@echo "usage: make TARGET"; echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name what; do printf '  %-13s %s\n' "$$name" "$$what"; done

install:  ## make .venv and the model; ENGINE=cpu|cuda|none, else by the GPU
	@$(INSTALL)

serve: install  ## install if needed, then serve; ARGS="--policy vtc --port 9000"
	@exec $(BIN)/evenhand serve $(ARGS)

test:  ## install if needed, lint, run the tests that prove each feature once; TESTS="tests/server -k vtc": those
	@$(INSTALL) --tests
	@$(MAKE) --no-print-directory lint
	@$(BIN)/python -m pytest $(or $(TESTS),-m "not slow" $(TWO))

test-all: test  ## `make test`, then the slow tests: deaths of real engines, chaos, long properties
	@$(BIN)/python -m pytest -m slow

soak:  ## hours of what `make test` does for seconds: hostile bytes, dying workers; TIMES=200
	@$(INSTALL) --tests
	@EVENHAND_SOAK=$(or $(TIMES),200) $(BIN)/python -m pytest --timeout=0 tests/server/test_fuzz.py tests/server/test_charges.py tests/chaos tests/engine/test_disaggregation.py
	@$(BIN)/python -m tests.chaos soak
	@$(BIN)/python -m tests.chaos churn

chaos:  ## each chaos run of docs/reliability.md once, with its defaults, but not the soaks
	@$(INSTALL) --tests
	@missed=0; for run in workers engines seeds redis rolling overload hostile memory batch; do \
		$(BIN)/python -m tests.chaos $$run || missed=1; done; exit $$missed

lint:  ## style, types and import rules
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary
	@said="$$($(BIN)/lint-imports --no-logo)" || { echo "$$said"; exit 1; }

bench: bench-start bench-ttft bench-laptop bench-schedule bench-policies bench-iterations bench-simulator bench-replay bench-compare bench-fresh bench-gateway bench-gateway-cost bench-scale bench-placement bench-replicas bench-disaggregation bench-salt bench-tls bench-batch  ## each benchmark once, with its defaults

bench-%: install
	@exec $(BIN)/evenhand bench $* $(ARGS)

gpu-check: install  ## whether all works on this machine's GPU, in ten minutes: ARGS="--model meta-llama/Llama-3.1-8B-Instruct"
	@exec $(BIN)/evenhand bench gpu-check $(ARGS)

images:  ## build the images, and list what is in each in build/images; TARGETS="gateway worker-cuda" REGISTRY=ghcr.io/me/
	@mkdir -p build/images
	@set -e; for target in $(TARGETS); do \
		image=$(REGISTRY)evenhand-$$target:$(VERSION); \
		DOCKER_BUILDKIT=1 $(DOCKER) build $(BUILD_ARGS) --target $$target --tag $$image --tag $${image%:*}:latest \
			--label org.opencontainers.image.version=$(VERSION) \
			--label org.opencontainers.image.revision=$$(git rev-parse HEAD) \
			--label org.opencontainers.image.created=$$(git show --no-patch --format=%cI) .; \
		$(DOCKER) run --rm --entrypoint sh $$image -c 'pip --python "$$(command -v python3)" inspect' > build/images/$$target-python.json; \
		$(DOCKER) run --rm --entrypoint dpkg-query $$image --show > build/images/$$target-debian.txt; \
		echo "$$image"; \
	done

lock:  ## make the lock files anew from pyproject.toml; UPGRADE=1: newest versions
	@$(PYTHON) -m deploy.install.lock $(if $(UPGRADE),--upgrade)

dashboards:  ## make deploy/observability/grafana/dashboards anew from deploy/observability/dashboards.py
	@$(BIN)/python -m deploy.observability.dashboards

compatibility: install  ## every client of docs/compatibility.md against a real engine; ARGS="--only langchain --newest"
	@$(BIN)/python -m tests.compatibility $(ARGS)

pictures:  ## make docs/pictures anew from a gateway under load; needs Chromium
	@$(INSTALL) --tests
	@$(BIN)/python -m tests.pictures $(ARGS)

clean:  ## remove .venv and everything else that was made here
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info build runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
