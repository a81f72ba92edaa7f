"""`make images`: builds the images of docker-compose.yml, with what this machine needs to reach its package index.

pip's configuration and the CA bundle come from the environment (`PIP_*`, pip.conf, `SSL_CERT_FILE`) and go to the build as secrets, so no
image holds them. Public images that cannot be pulled are made by `docker/base.sh`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCKER = os.environ.get("DOCKER", "docker")
PYTHON = "python:3.11-slim-bookworm"
PUBLIC = (PYTHON, "redis:7.4-bookworm", "prom/prometheus:v3.5.0")
GRAFANA = "grafana/grafana:12.2.0"
"""No package of Debian's has it, so it is pulled or left out."""
OURS = {"service": "adrank/service", "training": "adrank/training", "service-gpu": "adrank/service-gpu"}
REACHING = ("index-url", "extra-index-url", "trusted-host", "timeout", "proxy", "retries")
"""Of pip's settings, those that hold inside a build too; others name files of this machine."""


class ImageError(RuntimeError):
    """An image could not be had; the message says which."""


def run(*words: str, **environment: str) -> None:
    """Run the engine's client, and show what it says.

    Raises:
        ImageError: it failed.
    """
    if subprocess.run([*words], cwd=ROOT, env={**os.environ, **environment}, check=False).returncode:
        raise ImageError(f"{' '.join(words[:3])} … failed; its words are above")


def asked(*words: str) -> str:
    """What a program says, "" if it fails."""
    done = subprocess.run([*words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def is_there(image: str) -> bool:
    """Whether the engine has an image, or can pull it."""
    if asked(DOCKER, "image", "inspect", image):
        return True
    print(f"pulling {image}", flush=True)
    return bool(asked(DOCKER, "pull", image))


def provide_public() -> None:
    """Have the public images: pulled, or stand-ins."""
    missing = [image for image in PUBLIC if not is_there(image)]
    if missing:
        print(f"cannot be pulled, so stand-ins are made of Debian's packages: {', '.join(missing)}", flush=True)
        run("docker/base.sh", *([] if PYTHON in missing else [PYTHON]), *missing)


def pip_settings(listed: str) -> str:
    """A pip.conf of what `pip config list` says, without what names files of this machine."""
    settings = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        texts = [text for text in value.strip("'\"").replace("\\n", " ").split() if not text.startswith(("file:", "/", "."))]
        if key in REACHING and texts and section in ("global", "install", "download", ":env:"):
            settings[key] = " ".join(texts)
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())


@contextmanager
def secrets() -> Iterator[list[str]]:
    """Options that hand the build this machine's pip.conf and CA bundle."""
    with tempfile.TemporaryDirectory(prefix="adrank-build-") as folder:
        conf = Path(folder) / "pip.conf"
        conf.write_text(pip_settings(asked(sys.executable, "-m", "pip", "config", "list")), "utf-8")
        options = ["--secret", f"id=pip,src={conf}"]
        bundle = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
        if bundle and Path(bundle).is_file():
            options += ["--secret", f"id=ca,src={bundle}"]
        yield options


def provide_torch() -> None:
    """Put PyTorch's CPU build into `docker/wheels` where pip finds it in a folder."""
    lines = (ROOT / "docker/torch.txt").read_text("utf-8").splitlines()
    pin = next(line.split()[0] for line in lines if line.startswith("torch=="))
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-index", "--dest", "docker/wheels")
    asked(*pip, "--python-version", "3.11", "--only-binary", ":all:", pin)


def build(names: Sequence[str]) -> None:
    """Build some of our images."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    revision = asked("git", "rev-parse", "HEAD").strip() or "unknown"
    if "training" in names:
        provide_torch()
    with secrets() as options:
        for name in names:
            began = time.monotonic()
            labels = ["--build-arg", f"VERSION={version}", "--build-arg", f"REVISION={revision}"]
            words = ["--file", f"docker/{name}.Dockerfile", "--tag", OURS[name], "--tag", f"{OURS[name]}:{version}", *labels, *options, "."]
            run(DOCKER, "build", *words, DOCKER_BUILDKIT="1")
            size = (bytes_of(OURS[name]) - bytes_of(PYTHON)) / 1e6
            print(f"{OURS[name]}: {size:,.0f} MB on its base, in {time.monotonic() - began:.0f} s", flush=True)


def bytes_of(image: str) -> int:
    """The size of an image, its base's layers included."""
    told = asked(DOCKER, "image", "inspect", image)
    return int(json.loads(told)[0]["Size"]) if told else 0


def main(names: Sequence[str]) -> None:
    """Build the images named, or those that docker-compose.yml starts by default."""
    unknown = set(names) - set(OURS)
    if unknown:
        raise ImageError(f"no such image: {', '.join(sorted(unknown))}; there are {', '.join(OURS)}")
    if not asked(DOCKER, "version"):
        raise ImageError(f"no container engine answers to {DOCKER}; start it, or name its client in DOCKER")
    provide_public()
    build(names or ["service", "training"])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ImageError, OSError) as error:
        sys.exit(f"make images: {error}")
