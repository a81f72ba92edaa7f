"""What each side loads, in a fresh process. That the service loads no torch is in test_service_process.py."""

import ast
import inspect
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from prometheus_client import CollectorRegistry, Histogram, values
from uvicorn import Server
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tests.test_datasets import ROOT

FRAMEWORKS = {"torch", "onnx", "onnxruntime", "polars", "sklearn", "rich", "fastapi", "starlette", "pydantic", "redis", "prometheus_client"}
SIDES = {"training", "service"}


def loaded(code: str) -> set[str]:
    """Top-level names that a fresh process has loaded after the code."""
    program = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_the_contract_needs_no_framework_and_neither_side() -> None:
    names = loaded("import features.bundle, features.encode, features.state")
    assert "features" in names
    assert names & (FRAMEWORKS | SIDES) == set()


def test_the_command_line_loads_nothing_until_it_runs() -> None:
    assert loaded("import adrank\nadrank.cli(['--help'], standalone_mode=False)") & (FRAMEWORKS | SIDES | {"numpy"}) == set()


def test_what_hands_out_connections_loads_nothing_that_only_its_workers_need() -> None:
    """With one worker it sets how many threads numpy starts, which has to be before it is there."""
    assert loaded("import service.serving.workers") & {"numpy", "onnxruntime", "fastapi", "redis", "prometheus_client"} == set()


@pytest.mark.parametrize("command", ["train", "tune", "retrain", "benchmark models"])
def test_a_shell_completes_the_names_of_networks_and_loads_none(command: str) -> None:
    from training.networks import NETWORKS  # noqa: PLC0415

    program = "from click.shell_completion import ShellComplete\nimport adrank\n"
    program += "shell = ShellComplete(adrank.cli, {}, 'adrank', '_ADRANK_COMPLETE')\n"
    program += f"found = shell.get_completions({[*command.split(), '--model']}, 'd')\n"
    program += f"assert {{each.value for each in found}} == {{{', '.join(repr(name) for name in NETWORKS if name[0] == 'd')}}}"
    assert loaded(program) & FRAMEWORKS == set()


def test_training_never_loads_the_service() -> None:
    assert loaded("import training.simulation, training.datasets.states, training.join.sink") & {"service", "fastapi", "redis"} == set()


def test_the_joiner_loads_no_torch() -> None:
    found = loaded("import training.join, service.store.streams, service.telemetry.metrics")
    assert found & {"torch", "sklearn", "scipy", "onnxruntime", "fastapi"} == set()


def test_no_two_classes_have_one_name() -> None:
    """So that a search for a class finds it: `grep 'class NAME'`."""
    folders = ("adrank_*", "benchmarks", "docker", "features", "grafana", "service", "training")
    sources = [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    assert len(sources) > 200
    classes = [node.name for path in sources for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    assert [name for name, count in Counter(classes).items() if count > 1] == []


PROTOCOL = ("cycle", "expect_100_continue", "flow", "headers", "keep_alive", "parser", "scope", "url", "_unset_keepalive_if_required")


def in_protocol(name: str) -> str:
    return re.search(rf"\b{name}\b", inspect.getsource(HttpToolsProtocol))[0]


INTERNAL = {
    "prometheus-client": lambda: (Histogram("h", "", registry=CollectorRegistry())._buckets[0].inc, values.MultiProcessValue),
    "redis": lambda: None,  # named in test_redis_client.py
    "torch": lambda: (torch.Tensor._indices, torch.Tensor._values),
    "uvicorn": lambda: [Server.startup, Server.shutdown, Server.on_tick, Server.handle_exit, *map(in_protocol, PROTOCOL)],
}
"""What is used of libraries beside what they document."""


@pytest.mark.parametrize("library", INTERNAL)
def test_what_a_library_does_not_document_is_there_and_its_version_bounded(library: str) -> None:
    INTERNAL[library]()
    assert re.search(rf'^    "{library}[^",]*,<\d', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
