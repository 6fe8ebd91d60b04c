# Every target does its own set-up. Needs Python 3.11 or newer (PYTHON=... to choose one); no root, no Docker.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
UV := uv==0.13.8
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo serve doctor test test-fast check fmt bench openapi pins clean

help: ## Lists the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Installs everything into .venv, at the versions of constraints.txt.

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; install it, or say where it is: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(UV)' \
		&& $(BIN)/python -m uv pip install --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[torch,dev]' \
		|| $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[torch,dev]'
	@touch $@

demo: $(STAMP) ## Shows everything, from photos to recognised unseen classes (ARGS='--data DIR --weights FILE').
	$(BIN)/unseen demo $(ARGS)

serve: $(STAMP) ## Starts the service on 127.0.0.1:8000 and keeps it; Ctrl-C stops it.
	$(BIN)/unseen serve $(ARGS)

doctor: $(STAMP) ## Checks this machine for what the service needs.
	$(BIN)/unseen doctor

test: $(STAMP) ## Runs all tests.
	$(BIN)/python -m pytest $(ARGS)

test-fast: $(STAMP) ## Runs the tests that take moments.
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

check: $(STAMP) ## Looks at formatting, lint, types, import contracts and the OpenAPI document; changes nothing.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m service.cli openapi --check -o openapi/openapi.json

fmt: $(STAMP) ## Formats the code and mends what can be mended.
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .

bench: $(STAMP) ## Runs the benchmarks (ARGS='name ...' for some of them).
	$(BIN)/python -m bench $(ARGS)

openapi: $(STAMP) ## Writes openapi/openapi.json anew.
	@mkdir -p openapi
	$(BIN)/python -m service.cli openapi -o openapi/openapi.json

pins: $(STAMP) ## Writes constraints.txt anew, with the newest versions that fit together.
	@{ echo "# Exact versions that \`make\` installs; \`make pins\` rewrites this file. Names and versions only, no hosts."; \
		$(BIN)/python -m uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--upgrade --no-header --no-annotate --no-emit-index-url --quiet; } > .constraints.new
	mv .constraints.new constraints.txt

clean: ## Removes what tests and demos leave behind; keeps .venv and the service's data.
	rm -rf var build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: configuration
configuration: $(STAMP) ## Writes docs/configuration.md anew.
	$(BIN)/python -m service.configuration > docs/configuration.md

.PHONY: methods
methods: $(STAMP) ## Writes docs/methods.md anew.
	$(BIN)/python -m service.methods > docs/methods.md
