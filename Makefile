# `make demo` and `make test` do all set-up themselves; everything they install lives in .venv.
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test chaos test-cluster image lint up down clean bench screenshots
demo: $(STAMP)            ## set up, start the stack, take six challengers through the gates
	$(BIN)/titleshot demo

test: $(STAMP)            ## set up and run the tests (real Envoy, MLflow, Prefect, Locust)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit
	$(BIN)/python -m pytest tests/contract tests/chaos tests/flows

chaos: $(STAMP)           ## whatever dies and whenever: the whole suite, which takes hours (`make test` runs a short selection)
	$(BIN)/python -m pytest tests/contract tests/chaos tests/flows -m "long or not long"

test-cluster: $(STAMP)   ## the contract, a promotion and a rollback on a real cluster: see docs/kubernetes.md for its variables
	TITLESHOT_TEST_CLUSTER=1 $(BIN)/python -m pytest tests/contract/test_promises.py tests/flows/test_kubernetes.py \
	  -k "kubernetes or cluster or region" -m "long or not long" --timeout 1500

image: $(STAMP)           ## titleshot.tar, for nodes without a registry: needs root and debootstrap, or BASE=rootfs.tar
	$(BIN)/python -m deployments.images.build --output titleshot.tar $(if $(BASE),--base $(BASE),--debootstrap)

screenshots: $(STAMP)    ## the pictures in docs/img, made again by the tests in a browser
	TITLESHOT_SCREENSHOTS=docs/img $(BIN)/python -m pytest tests/flows/test_browser.py -m "long or not long"

lint: $(STAMP)            ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

up down: $(STAMP)         ## start or stop the local stack
	$(BIN)/titleshot $@

bench: $(STAMP)           ## every benchmark, one after another; each prints a table
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done
	$(BIN)/python -m benchmarks.gates

$(STAMP): requirements.lock pyproject.toml
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Titleshot needs Python 3.11 or newer: this python3 is " + sys.version.split()[0])'
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip sync --quiet --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $(STAMP)

clean:                    ## remove the environment (the state in .titleshot/ stays)
	rm -rf $(VENV)
