# All that is needed is python3 (3.11 or later), git and make. `make` alone lists the commands.
# ARGS reach the command that is run:  make ablation ARGS='-p gbas false'   make test ARGS='-k gate -x'
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3 python3.12 python3.11)
RUN := .venv/bin/python -m
# Threads that wait without spinning: where other programs share the cores, spinning ones slow everything manyfold.
export OMP_WAIT_POLICY ?= passive
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# Notebooks that train much at their defaults are run smaller, by tests/notebooks.
NBVAL := $(if $(NOTEBOOKS),$(addprefix notebooks/,$(addsuffix .ipynb,gate_explorer tradeoff report)) tests \
    --nbval-lax --nbval-current-env --nbval-cell-timeout=1800)
INSTALL = $(@D)/bin/python -m pip install --disable-pip-version-check --no-input -c $(LOCK) -e '.[all]'
# A process of tests for each core, with one thread each, and so the notebooks that they run.
WORKERS := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
CORE := $(addprefix tests/,core gating reducers models data evaluation training)

.DEFAULT_GOAL := help
.PHONY: help ablation test test-fast test-oldest test-slow fuzz reliability lab explorer report bench lint clean

help: ## list these commands
	@echo "usage: make COMMAND [ARGS='…'] [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

# Two environments: .venv with the versions of the lock, .venv-oldest with the oldest that pyproject.toml admits.
# The stamp is written last, so an installation that was interrupted is taken up again by the next command.
# A package that pip was interrupted in has a dist-info without INSTALLER and would pass for complete.
.venv/.installed: LOCK := constraints.txt
.venv-oldest/.installed: LOCK := constraints-oldest.txt
.venv-oldest/.installed: CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3)
.venv/.installed: constraints.txt
.venv-oldest/.installed: constraints-oldest.txt
.venv/.installed .venv-oldest/.installed: pyproject.toml
	@if ! $(@D)/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    found=; \
	    for python in $(CANDIDATES); do \
	        if $$python -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	        then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "Found no Python 3.11 or later with its venv module among: $(CANDIDATES)." >&2; \
	        echo "Install one (Debian, Ubuntu: apt install python3-venv), or name one: make PYTHON=python3.12" >&2; \
	        exit 1; \
	    fi; \
	    echo "Making $(@D) with $$($$found --version)"; \
	    $$found -m venv --clear $(@D) || exit 1; \
	fi
	@find $(@D) -name '*.dist-info' ! -exec test -e '{}/INSTALLER' ';' -prune -exec rm -rf '{}' +
	@echo "Installing msvit and all it uses into $(@D): about two minutes and 6 GB the first time, seconds later."
	@echo "Nothing more is printed until it is done; it can be interrupted and started again."
	@$(INSTALL) -qq || { echo "That failed. The same with all messages: $(INSTALL)" >&2; exit 1; }
	@touch $@

# Executes notebooks/$(1).ipynb. The copy gets its name when it is whole; a failed one is kept for reading. All of it
# goes to results/, which git ignores; with ARGS='-p out reports/…' tables and figures go where they are committed.
define execute
	@mkdir -p results/$(1)
	$(RUN) papermill --log-output notebooks/$(1).ipynb results/$(1)/unfinished.ipynb $(ARGS) || \
	    { echo "It failed; results/$(1)/unfinished.ipynb shows where." >&2; exit 1; }
	@mv results/$(1)/unfinished.ipynb results/$(1)/$(1).ipynb
	@echo "Wrote results/$(1)/$(1).ipynb"
endef

ablation: .venv/.installed ## train the method with and without its parts, and compare (minutes)
	@echo "Running the ablation: about three minutes on two cores"
	$(call execute,ablation)

test: .venv/.installed ## run the tests (minutes)
	@echo "Running the tests and every notebook: ten minutes or so on two cores"
	OMP_NUM_THREADS=1 $(RUN) pytest $(NBVAL) $(WORKERS) $(ARGS)

test-fast: .venv/.installed ## run the tests that take under two minutes, without notebooks and browser
	OMP_NUM_THREADS=1 $(RUN) pytest -m 'not (slow or notebook or browser or long)' $(WORKERS) $(ARGS)

test-oldest: .venv-oldest/.installed ## run the core's tests with the oldest versions that pyproject.toml admits
	@echo "Running the core's tests in .venv-oldest: several minutes on two cores"
	.venv-oldest/bin/python -m pytest $(CORE) $(ARGS)

test-slow: .venv/.installed ## run the tests that take longer than the suite can afford
	$(RUN) pytest -m slow $(ARGS)

fuzz: .venv/.installed ## bend settings, pictures and folders at random: make fuzz EXAMPLES=10000
	MSVIT_FUZZ_EXAMPLES=$(or $(EXAMPLES),1000) $(RUN) pytest tests/fuzz $(ARGS)

reliability: .venv/.installed ## kill runs, bend files, and write reports/reliability.md (an hour or so)
	.venv/bin/python benchmarks/reliability.py $(ARGS)

# In a container one is root, which JupyterLab refuses unless it is told, and its pages are for its host:
# make lab IP=0.0.0.0 listens to other machines too; the token stays.
IP ?= 127.0.0.1
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
lab: .venv/.installed ## open JupyterLab on its start page, for this machine only and with a token
	$(RUN) jupyterlab $(AS_ROOT) --ServerApp.ip=$(IP) --LabApp.default_url=/lab/tree/notebooks/start.ipynb $(ARGS)

# A page cannot end its kernel when it goes (Voila refuses its request), so idle ones are ended here; a page that is
# open keeps its kernel. Voila's template asks another host for icons; the browser is told to ask none.
ONLY_HERE := default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'
explorer: .venv/.installed ## open the gate explorer as a page, for this machine only and with a token
	$(RUN) voila notebooks/gate_explorer.ipynb --Voila.ip=$(IP) --Voila.auto_token=True \
	    --MappingKernelManager.cull_idle_timeout=120 --MappingKernelManager.cull_interval=20 \
	    --Voila.tornado_settings="{'headers': {'Content-Security-Policy': \"$(ONLY_HERE)\"}}" $(ARGS)

report: .venv/.installed ## put all runs together in one page, results/report/index.html
	$(call execute,report)

bench: .venv/.installed ## time MSViT and reducers against dense timm (minutes)
	@echo "Timing, all rows in turns: several minutes on two cores"
	$(RUN) msvit.cli bench $(ARGS)

lint: .venv/.installed ## check style, format, and that notebooks are stored without outputs
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(if $(NOTEBOOKS),$(RUN) nbstripout --verify --keep-id $(NOTEBOOKS))

clean: ## remove both environments and the tools' caches; runs and reports stay
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache build dist msvit.egg-info
	find . -name __pycache__ -prune -exec rm -rf '{}' +
