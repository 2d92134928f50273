# Jasmine: `make demo` or `make test` on a fresh machine; nothing else is needed first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
# The pins are for Python 3.11; so is the wheel that renders CoinRun.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

# Some images set it. Then all that is imported is compiled again at every start: half of what a short process takes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo world test chaos lint lock
setup: $(STAMP)

# Installed only when the pins or the package's own metadata changed.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v[:2] != (3, 11) and f"error: the pinned packages are for Python 3.11, and {sys.executable} is {v.major}.{v.minor}; set PYTHON=python3.11")'
	@echo "setting up $(VENV) (once, about a minute) ..."
	@scripts/system_packages.sh
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps -r requirements.lock
	@VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --editable .
	@touch $(STAMP)

demo: setup
	@$(BIN)/python scripts/demo.py

# From nothing to a sampled video: data, tokenizer, latent actions, dynamics, GIF.
world: setup
	@$(BIN)/python scripts/world.py

# ARGS="-k resume" chooses. Tests of jobs of several processes come at the end, whatever the others say: they mostly wait, and
# suffer from neighbours that compute. In each part the order is the one in which what takes longest in one piece comes early. Of
# pytest's exit codes 1 is "some failed" and 5 "none was chosen"; others end it at once.
#
# AGAIN=1, as in CI: what fails is run once more, alone, and fails for good at the first that fails again. That is not to forget it:
# the first failure stays in the output, and the last lines name those who passed only then. Of what failed once in sixteen hundred,
# more than half was the product's fault (docs/lab-notes.md).
WORKERS ?= 2
JOB_WORKERS ?= 3
AGAIN ?=
test: setup
	@failed=0; \
	tests() { $(BIN)/python -m pytest --dist loadgroup "$$@" $(ARGS); }; \
	part() { tests "$$@" || case $$? in 1) failed=1;; 5) ;; *) exit 1;; esac; }; \
	part -n $(WORKERS) --jobs without --no-loadscope-reorder; \
	part -n $(JOB_WORKERS) --jobs only; \
	if ((failed)) && test -n "$(AGAIN)"; then \
	    echo "==== what failed, once more, alone ===="; \
	    tests -n 1 --last-failed --last-failed-no-failures none --maxfail 1 -v && failed=0; \
	    ((failed)) || echo "==== passed, but the tests above only the second time: look for the cause in what they printed the first ===="; \
	fi; \
	exit $$failed

# About an hour for each of four campaigns; FAULTS=10 SEED=3 makes shorter and other ones. One that fails keeps its folder.
# WRITE=docs/reliability.md publishes their tables.
FAULTS ?= 100
SEED ?= 1
WRITE ?=
chaos: setup
	@code=0; for where in local "local --bucket" slurm "cloud_tpu --bucket"; do \
	    $(BIN)/python -m tests.chaos --backend $$where --faults $(FAULTS) --seed $(SEED) $(if $(WRITE),--write $(WRITE)) || code=1; \
	done; exit $$code

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Remakes requirements.lock from pyproject.toml, without index addresses. Commit the result.
lock: setup
	@$(BIN)/uv pip compile pyproject.toml --extra dev --extra games --python-version 3.11 --upgrade \
	    --no-annotate --no-header --no-emit-index-url --quiet --output-file requirements.lock
	@echo "requirements.lock remade; run make test"
