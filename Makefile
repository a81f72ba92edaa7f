PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PROGRAMS := $(patsubst %,tests/test_bench_%.py,fleet gpu peers scoring service streaming)
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
K8S := build/k8s-tools/installed

.PHONY: demo test bench-test console-test lint bench k8s-test rollout-test redis-test types peers-test parity-test scale-test trackers-test bench-peers reference lock images compose-test site dist clean

demo: $(INSTALLED)  ## make a world, train, serve, rank; ARGS=--once stops after one ranking
	$(BIN)/adrank demo $(ARGS)

test: $(INSTALLED)  ## everything that CI tests
	$(TEST) $(PROGRAMS:%=--ignore=%) $(ARGS)

bench-test: $(INSTALLED)  ## that the programs of benchmarks/ measure what they say
	$(TEST) $(PROGRAMS) $(ARGS)

console-test: $(INSTALLED)  ## the console in a real browser; needs Chromium
	$(BIN)/python -m pytest tests/test_console.py tests/test_console_pages.py $(ARGS)

lint: $(INSTALLED)  ## style, types and the rules between the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)  ## scoring, service and growth, on this machine; tables, and JSON in data/bench
	$(BIN)/python -m benchmarks.scoring --rounds 9 --json data/bench/scoring.json
	$(BIN)/python -m benchmarks.service --rounds 2 --seconds 1.5 --tail 5 --json data/bench/service.json
	$(BIN)/python -m benchmarks.growth --seconds 1 --json data/bench/growth.json

bench-peers: $(INSTALLED)  ## adrank beside FastAPI, LitServe, BentoML, Ray Serve and MLServer, each in an environment of its own; a table and a plot
	for peer in 'litserve==0.2.19' 'bentoml==1.4.40' 'ray[serve]==2.60.0' 'mlserver==1.7.1 uvloop<0.22'; do at=build/bench-peers/$${peer%%[[=]*}; \
		$(PYTHON) -m venv $$at && $$at/bin/python -m pip install --quiet --disable-pip-version-check $$peer \
		$$(grep -E '^(hiredis|msgspec|numpy|onnxruntime|orjson|pydantic-settings|redis|tomli[-_]w)==' constraints.txt) || echo "$$peer cannot be installed"; done
	$(BIN)/python -m benchmarks.peers --json data/bench/peers.json --plot docs/images/peers.png $(ARGS)

k8s-test: $(INSTALLED) $(K8S)  ## the manifests: rendered, held against the schemas of two versions and the operator's, and checkov
	REQUIRE_TOOLS=1 $(BIN)/python -m pytest tests/test_kubernetes.py $(ARGS)

rollout-test: $(INSTALLED) $(K8S)  ## rolls rankers behind a proxy, under load; and shows what is lost without each precaution
	REQUIRE_TOOLS=1 $(BIN)/python -m pytest -s tests/test_rollout.py $(ARGS)

reference: $(INSTALLED)  ## renews docs/reference.md from the code
	$(BIN)/python docs/reference.py

types: $(INSTALLED)  ## TypeScript types of the HTTP API, build/types/adrank.ts, compiled with docs/client.ts; needs npm
	mkdir -p build/types && cp docs/client.ts build/types
	$(BIN)/python -c 'import json, service.app as app; from service.settings import Settings; print(json.dumps(app.create_app(Settings(redis="memory://")).openapi()))' > build/types/openapi.json
	cd build/types && npm install --silent --no-audit --no-fund openapi-typescript@7.13.0 typescript@5.9.3
	cd build/types && npx openapi-typescript openapi.json --default-non-nullable=false --output adrank.ts && npx tsc --strict --noEmit --target es2022 --module esnext --moduleResolution bundler client.ts

lock: $(INSTALLED)  ## renews docker/*.txt, what the images install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/python docker/lock.py

images:  ## adrank/service and adrank/training; ARGS=service-gpu another
	$(PYTHON) docker/images.py $(ARGS)

compose-test: images  ## docker-compose.yml on a real engine: up, degraded, back, restarted under load, down, up again
	$(PYTHON) docker/compose_test.py $(ARGS)

redis-test: $(INSTALLED)  ## fail-overs and resharding beside a service under load: how long they take, what is lost
	PYTHONPATH=. $(BIN)/python tests/redis_trouble.py $(ARGS)

peers-test:  ## the blocks of other libraries, with the same weights, give the same numbers; in an environment of its own
	$(PYTHON) -m venv build/peers
	build/peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' fuxictr==2.3.10
	build/peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps deepctr-torch==0.3.0  # without the TensorFlow it asks for
	build/peers/bin/python -m pytest tests/peers $(ARGS)

scale-test: $(INSTALLED)  ## what runs on Ray, an extra, on one that is started here
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/scale $(ARGS)

trackers-test:  ## adrank train --log-to, read back from TensorBoard's files and from a server of MLflow, in environments of their own
	$(PYTHON) -m venv build/mlflow-server
	build/mlflow-server/bin/python -m pip install --quiet --disable-pip-version-check mlflow==3.17.2  # with bounds that are not ours
	$(PYTHON) -m venv build/trackers
	build/trackers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tensorboard,mlflow]'
	OMP_NUM_THREADS=1 build/trackers/bin/python -m pytest tests/trackers $(ARGS)

parity-test: $(INSTALLED)  ## that /rank says what training says of real rows, and a graph what torch does, for every network
	NETWORKS=all $(BIN)/python -m pytest tests/test_parity.py tests/test_networks.py $(ARGS)

site: $(INSTALLED)  ## the pages of docs/, strictly: build/site-pages; needs npm, for the diagrams
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	npm install --silent --no-audit --no-fund --prefix build/site mermaid@11.17.2
	install -D build/site/node_modules/mermaid/dist/mermaid.min.js build/site-pages/javascripts/mermaid.min.js

dist:  ## the wheel and the source distribution, in dist/, each installed into an environment of its own: the demo runs from the wheel
	rm -rf dist build/dist build/from-*
	$(PYTHON) -m venv build/dist
	build/dist/bin/python -m pip install --quiet --disable-pip-version-check build
	build/dist/bin/python -m build --outdir dist
	for extra in client otel kafka tune mlflow tensorboard demo; do $(PYTHON) -m venv build/from-$$extra && build/from-$$extra/bin/python -m pip install --quiet \
		--disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[$$extra]" && build/from-$$extra/bin/adrank --version || exit 1; done
	cd build/from-client && bin/python -c "import adrank_client" && bin/adrank serve --help > serve.txt
	cd build/from-demo && bin/adrank demo --once --port 8134
	$(PYTHON) -m venv build/from-source
	build/from-source/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.tar.gz
	cd build/from-source && bin/adrank --version

clean:
	rm -rf .venv build dist *.egg-info data/demo data/bench

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --upgrade pip  # that of Python 3.11 takes a minute more to choose
	$(BIN)/python -m pip install --no-compile -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'  # what is imported is compiled then
	touch $@

$(K8S): k8s/requirements.txt
	$(PYTHON) -m venv build/k8s-tools
	build/k8s-tools/bin/python -m pip install --quiet --disable-pip-version-check -r k8s/requirements.txt
	touch $@
