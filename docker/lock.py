"""`make lock`: what the images install, pinned with hashes, at the versions of `constraints.txt`.

PyTorch is apart from the rest of training: `torch.txt` has the hashes of its usual builds and of its CPU build, which is the one in
`docker/wheels/` or else that of the last lock. `training.Dockerfile` takes the CPU build where it lies there or on an index that pip was
told of, and else a usual one, with the CUDA packages of `cuda.txt`.
"""

import hashlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docker"
UV = (
    sys.executable,
    "-m",
    "uv",
    "pip",
    "compile",
    "--quiet",
    "--universal",
    "--python-version",
    "3.11",
    "--generate-hashes",
    "--no-emit-index-url",
)
PLAIN = ("--no-header", "--no-annotate", "--no-sources", "--no-emit-find-links", "--constraint", "constraints.txt")
HEADER = "# Made by `make lock` from pyproject.toml and constraints.txt.\n"
CUDA = re.compile(r"nvidia-|cuda-|triton$")
SERVING = ("otel",)
"""Extras that the images have too, where the project has them."""
Lock = dict[str, str]
"""By name: a pin with its hashes, as many lines."""


def locked(source: str, *words: str) -> Lock:
    """What uv resolves a project's file, or requirements given as text, to."""
    is_file = (ROOT / source).is_file()
    command = [*UV, *PLAIN, *words, source if is_file else "-"]
    done = subprocess.run(command, cwd=ROOT, input=None if is_file else source, stdout=subprocess.PIPE, text=True, check=True)
    return read(done.stdout)


def serving(project: Mapping[str, Any]) -> list[str]:
    """The extras of `SERVING` that a project has."""
    return [extra for extra in SERVING if extra in project["optional-dependencies"]]


def read(text: str) -> Lock:
    """The pins of a lock file."""
    pins = re.findall(r"^[^\s#].*(?:\n[ ]+--hash.*)*", text, re.MULTILINE)
    return {pin.partition("==")[0]: pin for pin in pins}


def chosen(lock: Mapping[str, str], keep: Callable[[str], object]) -> Lock:
    """The pins whose names are to be kept."""
    return {name: pin for name, pin in lock.items() if keep(name)}


def write(name: str, lock: Mapping[str, str]) -> None:
    """Write a lock file."""
    (FOLDER / name).write_text(HEADER + "\n".join(lock.values()) + "\n", "utf-8")


def with_cpu_build(pin: str, before: str) -> str:
    """A pin of PyTorch with the hashes of its CPU build too: of the wheels at hand, or those that the last lock of this version had."""
    version = pin.partition("==")[2].split()[0]
    wheels = sorted((FOLDER / "wheels").glob(f"torch-{version}+cpu-*.whl"))
    if wheels:
        more = ["    --hash=sha256:" + hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]
    else:
        more = [line.removesuffix(" \\") for line in before.splitlines()[1:]] if f"=={version} " in before else []
    return " \\\n".join([pin, *(line for line in more if line.strip() not in pin)])


def main() -> None:
    """Write all lock files."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = [word for extra in serving(document["project"]) for word in ("--extra", extra)]
    write("build.txt", locked("\n".join(document["build-system"]["requires"])))
    write("service.txt", locked("pyproject.toml", *extras))
    # Both packages of ONNX Runtime write the same folder, so there must be one alone.
    write("service-gpu.txt", chosen(locked("pyproject.toml", "--extra", "gpu", *extras), lambda name: name != "onnxruntime"))
    path = FOLDER / "torch.txt"
    before = read(path.read_text("utf-8")).get("torch", "") if path.exists() else ""
    training = locked("pyproject.toml", "--extra", "train", *extras)
    write(path.name, {"torch": with_cpu_build(training.pop("torch"), before)})
    write("cuda.txt", chosen(training, CUDA.match))
    write("training.txt", chosen(training, lambda name: not CUDA.match(name)))


if __name__ == "__main__":
    try:
        main()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"make lock: {error}")
