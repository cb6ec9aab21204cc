# make test     every check that this machine can run
# make demo     the small model with and without the patch, on the real ComfyUI
# make bench    kernels on this machine's GPU, checked first, then timed
# make build    the CUDA kernels, for the GPUs of this machine or: make build ARCHS=8.9,12.0
# make setup    what the above need, in .venv and .comfy; each runs it by itself
# make lint | format | workflows | clean

PYTHON ?= python3
# more arguments for pytest: make test PYTEST="-k blocks"
PYTEST ?=
# more arguments for the benchmark: make bench BENCH=--quick
BENCH ?=
# compute capabilities to build for, if not this machine's own
ARCHS ?=

VENV   := .venv
PY     := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: test demo bench build setup browser lint format workflows clean
.DELETE_ON_ERROR:

# The binary is built for this machine's GPUs, or where it has none for some card, so that its bindings are tested.
test: lint setup
	$(PY) install.py --archs $(or $(ARCHS),$(shell $(PY) -c 'from csrc.build import choose_archs; print(",".join(choose_archs(None)))' 2>/dev/null),8.9)
	$(PY) -m pytest $(PYTEST)

demo: setup
	$(PY) demo/run.py

bench: $(STAMPS)/tools
	$(PY) benchmarks/bench.py $(BENCH)
	$(PY) benchmarks/tables.py

build: $(STAMPS)/tools
	$(PY) install.py $(if $(ARCHS),--archs $(ARCHS))

setup: $(STAMPS)/comfyui browser

# torch comes first: everything later has to accept the one that is there.
$(STAMPS)/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q torch==2.13.0
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/tools: tests/requirements.txt $(STAMPS)/torch
	$(PY) -m pip install -q -r tests/requirements.txt
	@touch $@

$(STAMPS)/comfyui: tests/comfy/runtime.py $(STAMPS)/tools
	$(PY) tests/comfy/runtime.py setup
	@touch $@

# The browser tests drive the system's Chromium. Where there is none and it cannot be installed, they skip and say so.
browser:
	@command -v chromium || command -v google-chrome || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; \
	else \
	    echo "No Chromium here, so the browser tests will be skipped. To run them: sudo apt-get install chromium"; \
	fi

lint: $(STAMPS)/tools
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMPS)/tools
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Draws workflows/*.json and their thumbnails anew through the real frontend.
workflows: setup
	$(PY) tests/browser/build_workflows.py

clean:
	rm -rf $(VENV) .comfy demo/output csrc/build sage_kernels/_C* .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
