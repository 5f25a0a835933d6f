# The verbs of jmemserve. ARGS= is passed on: make serve ARGS="--mesh colocated --port 50052".
# PYTHON= names the interpreter for the virtual environment; otherwise tools/find-python chooses one and says which.

.DEFAULT_GOAL := help
.PHONY: help serve demo test test-slow test-gpu test-cuda check format proto bench bench-gpu clean

VENV := .venv
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python
ARGS ?=
export PYTHON

help:
	@echo "make serve      serve the demo model on 127.0.0.1:50051 (flags by ARGS=\"...\")"
	@echo "make demo       start a server, send prompts that share a prefix, print what comes back, stop"
	@echo "make test       the test suite"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-gpu   the tests that need a GPU (installs JAX for CUDA)"
	@echo "make test-cuda  what compilers make for GPUs; needs none (installs JAX for CUDA)"
	@echo "make check      formatting, lint and types"
	@echo "make format     put the code into the form that check asks for"
	@echo "make proto      regenerate the gRPC code from jmemserve/server/jmemserve.proto"
	@echo "make bench      benchmarks/serve.py (flags by ARGS=\"...\")"
	@echo "make bench-gpu  kernels and engine on one accelerator; result files in benchmarks/results"
	@echo "make clean      remove the virtual environment and everything built"

# Made again when pyproject.toml changes, or when the environment's own interpreter has gone.
$(INSTALLED): pyproject.toml setup.py $(wildcard jmemserve/kernels/cpu/native/*)
	@if [ -n "$$PYTHON" ] || ! $(RUN) -c "" 2>/dev/null; then \
	    python=$$(tools/find-python) && "$$python" -m venv --clear $(VENV); \
	fi
	$(RUN) -m pip install --disable-pip-version-check --editable ".[test]"
	@$(RUN) -m jmemserve.kernels.cpu
	@touch $@

serve: $(INSTALLED)
	@exec $(RUN) -m jmemserve.serve $(ARGS)

demo: $(INSTALLED)
	@exec $(RUN) tools/demo.py $(ARGS)

test: $(INSTALLED)
	@$(RUN) -m pytest -m "not slow" $(ARGS)

test-slow: $(INSTALLED)
	@$(RUN) -m pytest -m slow $(ARGS)

# JAX for CUDA is some gigabytes, so only these verbs bring it.
test-gpu: $(INSTALLED)
	$(RUN) -m pip install --disable-pip-version-check --quiet --editable ".[test,cuda]"
	@JAX_PLATFORMS=cuda,cpu $(RUN) -m pytest -m gpu $(ARGS)

test-cuda: $(INSTALLED)
	$(RUN) -m pip install --disable-pip-version-check --quiet --editable ".[test,cuda]"
	@$(RUN) -m pytest -m cuda $(ARGS)

check: $(INSTALLED)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

proto: $(INSTALLED)
	$(RUN) -m jmemserve.server.genproto

bench: $(INSTALLED)
	@$(RUN) benchmarks/serve.py $(ARGS)

# PYTHON=, or the environment if its JAX finds an accelerator, or what the machine has installed: often there is no network.
bench-gpu:
	@exec tools/bench-gpu "$$PYTHON" $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
