PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test lint bench redis-test clean

demo: $(INSTALLED)  ## make a world, train, serve, rank; ARGS=--once stops after one ranking
	$(BIN)/adrank demo $(ARGS)

test: $(INSTALLED)  ## everything that CI tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 2 --dist loadfile $(ARGS)

lint: $(INSTALLED)  ## style, types and the rules between the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)  ## scoring, service and growth, on this machine; tables, and JSON in data/bench
	$(BIN)/python -m benchmarks.scoring --rounds 9 --json data/bench/scoring.json
	$(BIN)/python -m benchmarks.service --rounds 2 --seconds 1.5 --tail 5 --json data/bench/service.json
	$(BIN)/python -m benchmarks.growth --seconds 1 --json data/bench/growth.json

redis-test: $(INSTALLED)  ## fail-overs and resharding beside a service under load: how long they take, what is lost
	PYTHONPATH=. $(BIN)/python tests/redis_trouble.py $(ARGS)

clean:
	rm -rf .venv build *.egg-info data/demo data/bench

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
