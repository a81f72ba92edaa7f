"""The Dockerfiles pass their linters, and their lock files agree with what is tested."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import free_port
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent
sys.path.insert(0, str(DOCKER))
import healthy  # noqa: E402
import images  # noqa: E402
import lock  # noqa: E402

DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
LINUX = {
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "implementation_name": "cpython",
}
PYTHON = {"python_version": "3.11", "python_full_version": "3.11.9", "platform_python_implementation": "CPython"}
LOCKS = {"service.txt": [], "training.txt": ["train"]}
UNTESTED = re.compile(r"nvidia-|cuda-|triton$|onnxruntime-gpu$|setuptools$")
"""What is in a lock and not in constraints.txt: packages of a GPU, and what builds the wheel."""


def holds(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**LINUX, **PYTHON, "extra": extra})


def pins(name: str) -> dict[str, str]:
    """Versions by name, of those that hold on Linux with Python 3.11."""
    found = [Requirement(pin.splitlines()[0].removesuffix("\\")) for pin in lock.read((DOCKER / name).read_text()).values()]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in found if holds(r)}


def constraints() -> dict[str, str]:
    lines = (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in lines}


def needed(requirements, extras) -> list[Requirement]:
    return [r for r in map(Requirement, requirements) if any(holds(r, extra) for extra in extras or [""])]


def lint(*words) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_is_clean(path: Path) -> None:
    done = lint(BIN / "hadolint", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_are_clean() -> None:
    done = lint(BIN / "shellcheck", *DOCKER.glob("*.sh"))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", sorted(path.name for path in DOCKER.glob("*.txt")))
def test_what_is_locked_is_what_is_tested(name: str) -> None:
    tested = constraints()
    locked = {package: version for package, version in pins(name).items() if not UNTESTED.match(package)}
    assert locked == {package: tested.get(package, "not in constraints.txt") for package in locked}


@pytest.mark.parametrize("name", sorted(path.name for path in DOCKER.glob("*.txt")))
def test_every_pin_has_a_hash(name: str) -> None:
    text = (DOCKER / name).read_text()
    assert "://" not in text
    for package, pin in lock.read(text).items():
        assert re.fullmatch(rf"{re.escape(package)}==\S+( ;[^\\]+)?( \\\n    --hash=sha256:[0-9a-f]{{64}})+", pin), pin


@pytest.mark.parametrize(("name", "extras"), LOCKS.items())
def test_a_lock_has_all_that_is_needed(name: str, extras: list[str]) -> None:
    """From pyproject.toml on, by what each package that is installed here says it needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(text for extra in extras + lock.serving(project) for text in project["optional-dependencies"][extra]),
    ]
    locked = pins(name) | (pins("torch.txt") | pins("cuda.txt") if extras else {})
    reached, left = set(), needed(wanted, [])
    while left:
        requirement = left.pop()
        package = canonicalize_name(requirement.name)
        assert package in locked, f"{requirement} is not in docker/{name}: make lock"
        assert requirement.specifier.contains(locked[package]), f"{requirement}, but docker/{name} has {locked[package]}: make lock"
        if (package, frozenset(requirement.extras)) not in reached:
            reached.add((package, frozenset(requirement.extras)))
            left += needed(importlib.metadata.requires(package) or [], requirement.extras)
    assert reached


def test_the_gpu_lock_has_one_onnx_runtime_for_cuda_13_and_cudnn_9() -> None:
    locked = pins("service-gpu.txt")
    assert "onnxruntime" not in locked
    assert locked["onnxruntime-gpu"] == constraints()["onnxruntime"]
    assert locked["nvidia-cuda-runtime"].startswith("13.")
    assert locked["nvidia-cudnn-cu13"].startswith("9.")


def test_torch_is_locked_in_its_cpu_build_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = "torch==2.13.0 \\\n    --hash=sha256:aa"
    monkeypatch.setattr(lock, "FOLDER", tmp_path)
    before = f"{pin} \\\n    --hash=sha256:cpu"
    assert lock.with_cpu_build(pin, before) == before
    assert lock.with_cpu_build(pin.replace("2.13.0", "2.14.0"), before).count("--hash") == 1
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").write_bytes(b"")
    assert lock.with_cpu_build(pin, before).splitlines()[2].startswith("    --hash=sha256:e3b0c442")


def test_builds_get_of_pips_settings_what_holds_there() -> None:
    listed = "\n".join(
        [
            ":env:.cert='/etc/ca.pem'",
            "global.index-url='https://index.example/simple'",
            "global.extra-index-url='file:///mnt/simple\\nhttps://more.example/simple'",
            "global.find-links='/mnt/wheels'",
            ":env:.timeout='60'",
        ]
    )
    expected = "[global]\nindex-url = https://index.example/simple\nextra-index-url = https://more.example/simple\ntimeout = 60\n"
    assert images.pip_settings(listed) == expected


def test_the_context_holds_no_more_than_is_copied() -> None:
    allowed = [line[1:].split("/")[0] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for path in DOCKERFILES:
        copied = re.findall(r"^COPY (?!--from)(.+) \S+$", path.read_text(), re.MULTILINE)
        assert {source.split("/")[0] for line in copied for source in line.split()} <= set(allowed)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.split(".")[0] for package in packages} <= set(allowed)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_a_number_and_ends_when_told(path: Path) -> None:
    text = path.read_text().rpartition("\nFROM ")[2]
    assert "\nUSER 10001:10001\n" in text
    assert "\nSTOPSIGNAL SIGTERM\n" in text
    assert json.loads(re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)[0]) == ["adrank"]
    assert "curl" not in text
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in text


@pytest.mark.parametrize(("path", "code", "said"), [("/livez", 0, "alive"), ("/nowhere", 1, "404"), ("/readyz", 1, "no answer")])
def test_the_health_check_tells_what_it_heard(path: str, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Answers(BaseHTTPRequestHandler):
        timeout = 10  # whoever connects and says nothing would keep the only thread

        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/livez" else 404)
            self.end_headers()
            self.wfile.write(b"alive" if self.path == "/livez" else b"404")

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        port = free_port() if path == "/readyz" else server.server_port
        try:
            assert healthy.main(path, port) == code
        finally:
            server.shutdown()
            thread.join()
    assert said in capsys.readouterr().out


def test_make_images_says_so_where_there_is_no_engine() -> None:
    done = subprocess.run(
        [sys.executable, DOCKER / "images.py"], env={**os.environ, "DOCKER": "/bin/false"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("make images: no container engine answers to /bin/false")
