"""`make compose-test`: docker-compose.yml on a real engine, from nothing to nothing, and a table of what was seen.

Everything is taken down again, with its volumes, also after a failure or Ctrl-C. Grafana is left out where its image cannot be had.
"""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from engine import Stack, WrongError, answer, eventually, facts, need
from images import DOCKER, GRAFANA, OURS, PYTHON, asked, bytes_of, is_there
from load import SteadyLoad, slow_request

PROJECT = "adrank-test"
SERVICES = ["redis", "world", "ranker", "joiner", "traffic", "prometheus"]
URL, PROMETHEUS = "http://127.0.0.1:8000", "http://127.0.0.1:9090"
REQUEST = {"user": {"id": "u1"}, "context": {"slot": "feed", "position": "1"}, "candidates": [f"a{i}" for i in range(20)]}
LARGEST = 450_000_000
TEMPORARY = "/tmp"  # noqa: S108  # the containers' own, a tmpfs
UNUSABLE_SECONDS = 30.0


def ranking() -> dict[str, object] | None:
    """A good ranking: 200, all candidates, nothing gone without."""
    told = answer(f"{URL}/rank", REQUEST)
    return told if told[""] == 200 and len(told["ads"]) == 20 and not told["degraded"] else None


def comes_up(stack: Stack) -> str:
    """Nothing there, then a good ranking."""
    began = time.monotonic()
    stack.do("up", "-d", *stack.services)
    eventually("a good ranking", ranking)
    return f"a good ranking {time.monotonic() - began:.0f} s after `up`, with the images there"


def is_small(_stack: Stack) -> str:
    """The service's image is small on its base."""
    sizes = {name: bytes_of(image) - bytes_of(PYTHON) for name, image in OURS.items() if bytes_of(image)}
    need(sizes["service"] < LARGEST, f"the service's image has {sizes['service'] / 1e6:.0f} MB on its base")
    return ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in sizes.items()) + " on their base"


def is_confined(stack: Stack) -> str:
    """No root, no writing, no capability, nothing that the service does not need; and the metrics of both workers all the same."""
    for service in ("ranker", "joiner", "traffic"):
        status = stack.inside(service, "cat", "/proc/self/status").stdout
        need("\nUid:\t10001\t10001" in status, f"{service} does not run as 10001")
        need("CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status, f"{service} has capabilities:\n{status}")
        need("Read-only" in stack.inside(service, "touch", "/opt/here").stderr, f"{service} can write to its root")
    for package in ("torch", "onnx", "polars", "pip"):
        need(stack.inside("ranker", "python", "-c", f"import {package}").returncode == 1, f"the service's image has {package}")
    need(stack.inside("ranker", "sh", "-c", "command -v gcc || command -v cc || command -v make").returncode, "it has a compiler")
    need("adrank-metrics-" in stack.inside("ranker", "ls", TEMPORARY).stdout, "two workers have no folder for their metrics")
    return "uid 10001, no capability, root read-only, no torch, onnx, polars, pip or compiler; 2 workers' metrics in /tmp"


def is_bound_to_loopback(stack: Stack) -> str:
    """Every published port is one of 127.0.0.1."""
    ports = {service: facts(stack.container(service))["HostConfig"]["PortBindings"] or {} for service in stack.services}
    bound = [(service, binding) for service, published in ports.items() for each in published.values() for binding in each]
    need(all(binding["HostIp"] == "127.0.0.1" for _, binding in bound), f"published elsewhere than on 127.0.0.1: {bound}")
    return ", ".join(f"{service} 127.0.0.1:{binding['HostPort']}" for service, binding in bound)


def click() -> dict[str, object]:
    """A batch of one click."""
    now = time.time()
    return {"events": [{"type": "click", "event_id": f"test-{now}", "ts": round(now, 3), "user_id": "u1", "ad_id": "a1"}]}


def takes_events(_stack: Stack) -> str:
    """A click is taken, and once."""
    once = click()
    told = [answer(f"{URL}/v1/events", once) for _ in range(2)]
    statuses = [(one[""], one["events"][0]["status"]) for one in told]
    need(statuses == [(202, "accepted"), (202, "duplicate")], f"events were answered with {statuses}")
    return "a click is accepted, and a duplicate when it is sent again"


def query(expression: str) -> list[float]:
    """The values that Prometheus has for an expression."""
    told = answer(f"{PROMETHEUS}/api/v1/query?query={expression}")
    return [float(series["value"][1]) for series in told["data"]["result"]]


def is_scraped(_stack: Stack) -> str:
    """Prometheus has the service's and the joiner's series, and the rules evaluate."""
    for job in ("adrank", "adrank-joiner"):
        eventually(f"{job} is scraped", lambda job=job: query(f'up{{job="{job}"}}') == [1.0])  # type: ignore[misc]
    for name in ("adrank_requests_total", "adrank_join_rankings_total"):
        eventually(f"{name} is more than 0", lambda name=name: sum(query(name)) > 0)  # type: ignore[misc]

    def rules() -> list[str] | None:
        groups = answer(f"{PROMETHEUS}/api/v1/rules")["data"]["groups"]
        found = [rule for group in groups for rule in group["rules"]]
        need(found, "Prometheus has no rules")
        need(not [rule for rule in found if rule["health"] == "err"], f"rules that fail: {found}")
        return [rule["name"] for rule in found] if all(rule["health"] == "ok" for rule in found) else None

    return f"service and joiner scraped, {len(eventually('all rules are evaluated', rules))} rules evaluated without an error"


def does_without_redis(stack: Stack) -> str:
    """Redis is gone: still 200, and it says so; Redis is back: as before, with what it held."""
    before = click()
    need(answer(f"{URL}/v1/events", before)[""] == 202, "a click was not taken")
    stack.do("stop", "redis")
    began = time.monotonic()
    told = eventually("a ranking", lambda: answer(f"{URL}/rank", REQUEST))
    need(told[""] == 200 and told["degraded"], f"without Redis a ranking was answered with {told}")
    need(answer(f"{URL}/readyz")[""] == 200, "without Redis the service is not ready")
    need(answer(f"{URL}/v1/events", click())[""] == 503, "without Redis an event was not refused")
    took, began = time.monotonic() - began, time.monotonic()
    stack.do("start", "redis")
    eventually("a ranking that is not degraded", ranking)
    back = time.monotonic() - began
    again = answer(f"{URL}/v1/events", before)["events"][0]["status"]
    need(again == "duplicate", f"a click from before Redis was stopped is {again} when it is sent again")
    for service in ("ranker", "joiner"):
        need(facts(stack.container(service))["RestartCount"] == 0, f"{service} ended when Redis did")
    reasons = ", ".join(sorted({each["reason"] for each in told["degraded"]}))
    return f"200 and degraded ({reasons}), events refused with 503, in {took:.1f} s; whole {back:.1f} s after `start`, no event forgotten"


def restarts_under_load(stack: Stack) -> str:
    """One replica is restarted: what is in flight is answered, and what comes while there is none fails, for a bounded time."""
    with SteadyLoad(URL, REQUEST) as load:
        time.sleep(2)
        began = time.monotonic()
        with slow_request(URL, REQUEST) as finish:
            stop = subprocess.Popen([DOCKER, "stop", "--time", "30", stack.container("ranker")], stdout=subprocess.DEVNULL)
            eventually("the service stops listening", lambda: load.failing)
            status = finish()
        need(status == 200, f"a request that was in flight when SIGTERM came was answered with {status}")
        need(stop.wait(60) == 0, "the ranker could not be stopped")
        code = facts(stack.container("ranker"))["State"]["ExitCode"]
        need(code == 0, f"the ranker ended with {code} when it was told to end")
        took = time.monotonic() - began
        stack.do("start", "ranker")
        eventually("a good ranking", ranking)
        time.sleep(2)
    need(set(load.failures) <= {"no connection", "503"}, f"failures under load: {load.failures}")
    need(load.longest_gap < UNUSABLE_SECONDS, f"for {load.longest_gap:.0f} s nothing was answered")
    failed = ", ".join(f"{count} {kind}" for kind, count in load.failures.items())
    return (
        f"a request in flight got its 200; of {load.sent} at {load.rate:g}/s failed: {failed}; {load.longest_gap:.1f} s without an answer, "
        f"{took:.1f} s of it until it had ended, with exit code 0"
    )


def tells_its_health(stack: Stack) -> str:
    """HEALTHCHECK: unhealthy without a model, and healthy when one comes."""
    name = f"{PROJECT}-health"
    checks = ("--health-interval=1s", "--health-start-period=1s", "--health-retries=2")
    confined = ("--read-only", f"--tmpfs={TEMPORARY}", "--cap-drop=ALL", "--network=none", f"--volume={stack.project}_models:/from:ro")
    settings = ("--env=ADRANK_REDIS=memory://", f"--env=ADRANK_MODELS={TEMPORARY}/models")
    need(asked(DOCKER, "run", "--detach", "--rm", f"--name={name}", *checks, *confined, *settings, OURS["service"]), "it does not start")
    try:
        states = []
        for state in ("unhealthy", "healthy"):
            eventually(f"the container is {state}", lambda state=state: facts(name)["State"]["Health"]["Status"] == state, 60)  # type: ignore[misc]
            states.append(state)
            asked(DOCKER, "exec", name, "cp", "-r", "/from", f"{TEMPORARY}/models")
    finally:
        asked(DOCKER, "rm", "--force", name)
    return "HEALTHCHECK: unhealthy while there is no model, healthy when one has come; without any network"


def keeps_its_volumes(stack: Stack) -> str:
    """Down and up again: the same model and the same users, without training."""
    versions = [answer(f"{URL}/rank", REQUEST)["model"]["version"]]
    rows = eventually("rankings are counted", lambda: sum(query("adrank_join_rankings_total")))
    stack.do("down")
    began = time.monotonic()
    stack.do("up", "-d", *stack.services)
    eventually("a good ranking", ranking)
    took = time.monotonic() - began
    versions.append(answer(f"{URL}/rank", REQUEST)["model"]["version"])
    need(versions[0] == versions[1], f"another version after down and up: {versions}")
    need("nothing to do" in stack.do("logs", "world"), "the job made again what was there")
    again = eventually("Prometheus remembers", lambda: sum(query("max_over_time(adrank_join_rankings_total[1h])")))
    need(again >= rows, "Prometheus lost what it had")
    return f"the same version {took:.0f} s after `up`, nothing trained or loaded again, Prometheus remembers"


STEPS: tuple[Callable[[Stack], str], ...] = (
    comes_up,
    is_small,
    is_confined,
    is_bound_to_loopback,
    takes_events,
    is_scraped,
    does_without_redis,
    restarts_under_load,
    tells_its_health,
    keeps_its_volumes,
)


def check_ports() -> None:
    """Refuse before anything is started.

    Raises:
        WrongError: a port is taken.
    """
    for port in (8000, 9090, 3000):
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                raise WrongError(f"port {port} is in use; is the stack up already?") from None


def main() -> int:
    """Go through all steps; the exit code is 1 where one failed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    has_grafana = is_there(GRAFANA)
    stack = Stack(PROJECT, [*SERVICES, *(["grafana"] if has_grafana else [])])
    seen: list[tuple[str, str]] = []
    try:
        check_ports()
        print(f"with {' '.join(stack.program)}" + ("" if has_grafana else "; without Grafana, whose image cannot be had"), flush=True)
        stack.do("down", "--volumes")
        for step in STEPS:
            seen.append((step.__name__, step(stack)))
            print(f"{seen[-1][0]:22} {seen[-1][1]}", flush=True)
    except WrongError as wrong:
        print(f"FAILED {STEPS[min(len(seen), len(STEPS) - 1)].__name__}: {wrong}", flush=True)
        print(asked(*stack.program, "--project-name", PROJECT, "logs", "--tail", "20", "ranker", "joiner", "world"), flush=True)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stack.do("down", "--volumes", "--timeout", "30")
    table = "\n".join(f"| {name.replace('_', ' ')} | {what} |" for name, what in seen)
    print(f"\n| step | seen |\n|---|---|\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
