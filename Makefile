# make lab    set up everything and open JupyterLab with the live views
# make test   set up everything and run every check: lint, types, unit tests, a real browser
# Both start from a fresh clone; nothing but Python 3.11 or newer is assumed. `make help` lists the rest.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt $(shell git ls-files server workbench jupyter-config extension 2>/dev/null)
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Empty: JupyterLab takes 8888, or the next free port. `make lab PORT=9000` insists on 9000.
PORT ?=
ARGS ?=

define no_network
echo
echo "Installing failed; pip's last lines above say why."
echo "  - No network, or a proxy in the way?  Check that 'pip download six' works, then run make again: it resumes."
echo "  - No space left?                      About 4 GB are needed here (more with a CUDA build of torch)."
exit 1
endef

.PHONY: help lab test lint types unit browser python-tests extension-checks screenshots clean

help:
	@grep -E '^# make|^[a-z-]+:.*## ' Makefile | sed -E 's/^# //; s/:.*## /\t/'

lab: $(VENV)/lab-installed  ## set up and open JupyterLab with the first lesson
	@inference-workbench lab $(if $(PORT),--port $(PORT)) $(ARGS)

test: lint types extension-checks python-tests  ## everything that CI runs

lint: $(VENV)/dev-installed  ## ruff, formatting and import rules
	@ruff check .
	ruff format --check .
	lint-imports

types: $(VENV)/dev-installed  ## mypy --strict
	@mypy

extension-checks: $(VENV)/dev-installed  ## TypeScript: eslint, tsc and unit tests
	@cd extension
	jlpm install --immutable > ../$(VENV)/jlpm.log || { cat ../$(VENV)/jlpm.log; exit 1; }
	jlpm lint:check
	jlpm test

python-tests: $(VENV)/dev-installed $(VENV)/chromium  ## pytest, browser tests included
	@pytest $(ARGS)

unit: $(VENV)/dev-installed  ## pytest without the browser
	@pytest -m "not browser" $(ARGS)

browser: $(VENV)/dev-installed $(VENV)/chromium  ## only the tests in a real Chromium
	@pytest -m browser $(ARGS)

screenshots: $(VENV)/dev-installed $(VENV)/chromium  ## take the pictures in docs/images again
	@python docs/screenshots.py

# -- setting up -------------------------------------------------------------------------------------------------------

$(VENV)/created:
	@python=
	for candidate in $${PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
	    python=$$candidate
	    break
	  fi
	done
	if [ -z "$$python" ]; then
	  echo "Python 3.11 or newer (with the venv module) was not found. Install it, or say where: make PYTHON=/path/to/python3"
	  echo "On Debian and Ubuntu the module is in the package python3-venv."
	  exit 1
	fi
	echo "Making an environment in $(VENV) with $$("$$python" --version)"
	"$$python" -m venv $(VENV)
	pip install --quiet --upgrade pip || { $(no_network); }
	touch $@

$(VENV)/lab-installed: $(VENV)/created $(SOURCES)
	@echo "Installing Inference Workbench: torch, JupyterLab and the extension (a few minutes the first time)"
	rm -rf workbench/inference_workbench/labextension workbench/inference_workbench/static
	pip install -c constraints.txt '.[server,lab]' 2> $(VENV)/pip.log | grep --line-buffered -E '^(Collecting|Building|Installing|Successfully)' | cut -c1-110 || { tail -n 40 $(VENV)/pip.log; $(no_network); }
	touch $@

$(VENV)/dev-installed: $(VENV)/lab-installed
	@echo "Installing what the tests need"
	pip install --quiet -c constraints.txt --group dev 2> $(VENV)/pip.log || { tail -n 40 $(VENV)/pip.log; $(no_network); }
	touch $@

$(VENV)/chromium: $(VENV)/dev-installed tests/browser/install_chromium.sh
	@bash tests/browser/install_chromium.sh
	touch $@

clean:  ## remove everything that was built here (not the model cache)
	@rm -rf $(VENV) build dist extension/lib extension/node_modules workbench/inference_workbench/labextension workbench/inference_workbench/static
