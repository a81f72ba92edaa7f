"""docker-compose.yml is valid, names what exists, and opens nothing that need not be open; `make compose-test` is what runs it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import adrank
from service.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
FILE = ROOT / "docker-compose.yml"
COMPOSED: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSED["services"]
sys.path.insert(0, str(ROOT / "docker"))
import images  # noqa: E402

each_service = pytest.mark.parametrize("name", SERVICES)


def words(name: str) -> list[str]:
    """A service's command."""
    command = SERVICES[name].get("command", [])
    return shlex.split(command) if isinstance(command, str) else list(map(str, command))


def lint(*command: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_file_is_valid() -> None:
    done = lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", FILE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_yaml_is_clean() -> None:
    done = lint("yamllint", "--strict", FILE, "prometheus/prometheus.yml", "grafana/provisioning")
    assert done.returncode == 0, done.stdout


@each_service
def test_every_setting_is_one(name: str) -> None:
    given = {key: value for key, value in SERVICES[name].get("environment", {}).items() if key.startswith("ADRANK")}
    assert set(given) <= {PREFIX + field.upper() for field in Settings.model_fields}
    settings = Settings(**{key.removeprefix(PREFIX).lower(): value for key, value in given.items()})
    if "ADRANK_REDIS" in given:
        assert settings.redis == "redis://redis:6379/0"
    assert "ADRANK_HOST" not in given  # the image says it, for a container alone


@pytest.mark.parametrize("name", ["ranker", "ranker-gpu", "joiner"])
def test_every_command_of_ours_parses(name: str) -> None:
    command, *rest = words(name) or ["serve"]
    context = adrank.cli.commands[command].make_context(command, rest)
    if name == "joiner":
        assert (context.params["metrics_host"], context.params["metrics_port"]) == ("0.0.0.0", 9109)
        assert {context.params["folder"], context.params["models"]} <= {Path(mount.split(":")[1]) for mount in SERVICES[name]["volumes"]}


@pytest.mark.parametrize("name", ["world", "traffic"])
def test_every_script_is_there(name: str) -> None:
    program, path = SERVICES[name]["entrypoint"]
    assert program == "python"
    mounts = {target: source for source, target, *_ in (mount.split(":") for mount in SERVICES[name]["volumes"])}
    assert (ROOT / mounts[str(Path(path).parent)] / Path(path).name).is_file()


@each_service
def test_every_file_that_is_mounted_is_there(name: str) -> None:
    for mount in SERVICES[name].get("volumes", []):
        source, _, *mode = mount.split(":")
        if source.startswith("."):
            assert mode == ["ro"]
            assert (ROOT / source).exists() or source == "./grafana/dashboards"  # which a generator makes
        else:
            assert source in COMPOSED["volumes"]


@each_service
def test_a_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["logging"]["options"]["max-size"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert not {"privileged", "cap_add", "network_mode", "pid"} & set(service)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    if not service["image"].startswith("adrank/"):
        assert int(service["user"].split(":")[0]) > 0


@each_service
def test_what_is_waited_for_is_there_and_can_be_waited_for(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        if how["condition"] == "service_healthy":
            ours = SERVICES[other]["image"] == "adrank/service"  # the image has a check
            assert ours or SERVICES[other]["healthcheck"]
        else:
            assert how["condition"] == "service_completed_successfully"
            assert SERVICES[other]["restart"] == "no"


def test_redis_forgets_nothing() -> None:
    given = " ".join(words("redis"))
    assert "--maxmemory-policy noeviction" in given
    assert "--appendonly yes" in given
    most, limit = re.findall(r"--maxmemory (\d+)mb", given)[0], SERVICES["redis"]["mem_limit"]
    assert (limit, int(most) <= 512) == ("1g", True)  # a fork to rewrite the log needs room beside it


def test_every_image_is_built_or_provided() -> None:
    names = {service["image"] for service in SERVICES.values()}
    assert names == {*images.OURS.values(), *images.PUBLIC, images.GRAFANA} - {images.PYTHON}
    for path in (ROOT / "docker").glob("*.Dockerfile"):
        assert f"\nARG BASE={images.PYTHON}\n" in path.read_text()
    for service in SERVICES.values():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_prometheus_scrapes_what_answers() -> None:
    scraped = yaml.safe_load((ROOT / "prometheus/prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in scraped["scrape_configs"] if "static_configs" in job}
    assert targets == {"adrank": ["ranker:8000"], "adrank-joiner": ["joiner:9109"], "prometheus": ["127.0.0.1:9090"]}
    [gpu] = [job["dns_sd_configs"][0] for job in scraped["scrape_configs"] if "dns_sd_configs" in job]
    assert (gpu["names"], gpu["port"]) == (["ranker-gpu"], 8000)
    mounted = {mount.split(":")[1] for mount in SERVICES["prometheus"]["volumes"]}
    assert set(scraped["rule_files"]) <= mounted


def test_the_gpu_is_asked_for_in_its_profile_alone() -> None:
    assert [name for name, service in SERVICES.items() if "profiles" in service] == ["ranker-gpu"]
    [device] = SERVICES["ranker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_the_dashboards_find_their_source() -> None:
    [source] = yaml.safe_load((ROOT / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["uid"], source["url"]) == ("prometheus", "prometheus", "http://prometheus:9090")
    [provider] = yaml.safe_load((ROOT / "grafana/provisioning/dashboards/adrank.yml").read_text())["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in SERVICES["grafana"]["volumes"]
