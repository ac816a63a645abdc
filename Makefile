# Everything happens in .venv and var/ of this folder. `make` alone lists the targets.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DAG := fashion_mnist_training
# Two workers; a group, see tests/conftest.py, stays on one, and the groups start in their order.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder
# The tests start hundreds of processes: each would compile the code again where PYTHONDONTWRITEBYTECODE is set.
COMPILE := $(BIN)/python -m compileall -q ridgeline components dags torture

.DEFAULT_GOAL := help
.PHONY: help install run ui audit test test-fast torture screenshots test-containers up down logs backup restore lint format bench constraints clean

help: ## List the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: $(INSTALLED) ## Install Ridgeline and its tools into .venv (other targets do so first)

run: $(INSTALLED) ## Run the whole pipeline; ARGS="--set train.epochs=3"
	@$(BIN)/python -P -m ridgeline.airflow.local run $(DAG) $(ARGS)

ui: $(INSTALLED) ## Start Airflow's web interface; ARGS="--port 8090"
	@exec $(BIN)/python -P -m ridgeline.airflow.local ui $(ARGS)

test: $(INSTALLED) ## Run all tests; ARGS="-k name"
	@$(COMPILE)
	$(PYTEST) $(ARGS)

test-fast: $(INSTALLED) ## Run the tests that start no Airflow, browser or second TensorFlow; ARGS="-k name"
	@$(COMPILE)
	$(PYTEST) --ignore tests/torture -m "not airflow and not real_data and not fresh_process" $(ARGS)

torture: $(INSTALLED) ## Kill, cut, damage and load small stores for half an hour; ARGS="kills power_cut --seed 7 --scale 1"
	@$(BIN)/python -m torture $(ARGS)

screenshots: $(INSTALLED) ## Retake the README's screenshots; needs Chromium and RIDGELINE_MANUAL_DIR
	SCREENSHOT_DATA="$${RIDGELINE_MANUAL_DIR:?expected the folder of the official files}" \
	  $(BIN)/python -m pytest tests/e2e/test_browser.py
	mkdir -p docs/screenshots
	cp test-output/form.png test-output/report.png test-output/models.png docs/screenshots/

test-containers: $(INSTALLED) ## Test the stack of docker/ and its failures with podman
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/containers --exitfirst -s $(ARGS)

up: ## Start the stack of docker/ on this server; PROFILES="celery serving" MIGRATE=1
	@docker/stack up

down: ## Stop the stack; ARGS=--volumes also deletes its data
	@docker/stack down

logs: ## Follow the stack's logs; SERVICE=scheduler
	@docker/stack logs

backup: ## Write the stack's database, store and secrets into a folder; BACKUP=folder
	@docker/stack backup

restore: ## Restore a backup from a folder into empty volumes; BACKUP=folder
	@docker/stack restore

lint: $(INSTALLED) ## Check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: $(INSTALLED) ## Look for security faults in the code, and for known ones of the pinned packages
	$(BIN)/bandit --quiet --recursive --severity-level medium ridgeline components dags docker
	$(BIN)/uv tool run --quiet --constraints constraints.txt pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED) ## Compare speed and accuracy with the notebook and other loops
	$(BIN)/python -m benchmarks $(ARGS)

constraints: $(INSTALLED) ## Choose the newest versions that fit and write them to constraints.txt
	$(BIN)/uv pip compile --upgrade --universal --fork-strategy fewest --python-version 3.11 \
	  --extra server --extra s3 --extra mlflow --extra openlineage --extra beam --extra kubernetes --group dev --group tools \
	  --no-annotate --no-emit-index-url --custom-compile-command "make constraints" --quiet \
	  --output-file constraints.txt pyproject.toml

clean: ## Delete .venv, caches and test output; var/ and data/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .grimp_cache dist test-output
	find . -path ./var -prune -o -type d -name __pycache__ -exec rm -rf {} +

# Without bytecode Airflow and TensorFlow take two to three times as long to start, so it is made here, even
# where PYTHONDONTWRITEBYTECODE is set. A few files of the libraries are not valid Python: templates, test data.
# An incomplete .venv, or one of another Python, is made from the start.
$(INSTALLED): pyproject.toml constraints.txt Makefile
	@fail() { echo "error: $$*" >&2; exit 1; }; \
	version() { "$$@" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo none; }; \
	supported() { case $$1 in 3.11.* | 3.12.* | 3.13.*) ;; *) false ;; esac; }; \
	if test -x $(BIN)/pip && supported "$$(version $(BIN)/python)"; then exit; fi; \
	received=$$(version $(PYTHON)); \
	supported "$$received" || fail "Expected Python 3.11, 3.12 or 3.13; received $$received ($(PYTHON))." \
	  "Name another: make PYTHON=python3.12"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || fail "Cannot make .venv: $(PYTHON) has no ensurepip." \
	  "Install it: 'apt-get install python3-venv' on Debian."; \
	$(PYTHON) -m venv --clear .venv
	@echo 'installing into .venv: a minute or two ...'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt \
	  --editable '.[server,s3,mlflow,openlineage,beam,kubernetes]' --group dev
	@$(BIN)/python -m compileall -q -j0 .venv/lib >/dev/null || true
	@touch $@
