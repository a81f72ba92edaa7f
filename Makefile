PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test lint clean

demo: $(INSTALLED)  ## make a world, train, serve, rank; ARGS=--once stops after one ranking
	$(BIN)/adrank demo $(ARGS)

test: $(INSTALLED)  ## everything that CI tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)  ## style, types and the rules between the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv build *.egg-info data/demo

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
