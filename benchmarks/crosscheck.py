"""Our open loop against k9-load's (PyPI, a Rust engine with constant arrival rates) and our closed loop against wrk's.

Each tool in turn asks the same running service the same requests. Install k9-load in an environment of its own, wrk by apt.

    python -m benchmarks.crosscheck --url http://127.0.0.1:8000 --redis redis://127.0.0.1:6379/0 --k9 k9env/bin/k9 --rate 100
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from adrank_bench.load import LoadError, Target, measure
from adrank_bench.measured import LoadPlan
from adrank_bench.traffic import bodies, draw
from service.settings import load_settings

from .service import show

STATS = {"p50_ms": "med", "p90_ms": "p(90)", "p99_ms": "p(99)", "p99.9_ms": "p(99.9)", "max_ms": "max"}
BODIES = 500


def ours(target: Target, requests: Sequence[bytes], rate: float | None, seconds: float, connections: int) -> dict[str, Any]:
    """Our own figures."""
    values = measure(target, [target.request(body) for body in requests], LoadPlan(rate, seconds, 0, connections)).as_dict()
    return {
        "tool": "adrank bench",
        "loop": values["loop"],
        "requests_per_s": values["requests_per_s"],
        **{name: values[name] for name in STATS},
    }


def k9(program: str, url: str, requests: Sequence[bytes], rate: float, seconds: float, connections: int) -> dict[str, Any]:
    """What k9-load measures: constant arrivals, as many users as we have connections."""
    arrivals = {"executor": "constant-arrival-rate", "rate": round(rate), "timeUnit": "1s", "duration": f"{seconds:g}s"}
    step = {"method": "POST", "url": f"{url}/rank", "headers": {"Content-Type": "application/json"}, "body": "{{ asked.body }}"}
    plan = {
        "options": {"scenarios": {"load": {**arrivals, "preAllocatedVUs": connections, "maxVUs": connections}}},
        "feeders": {"asked": {"rows": [{"body": body.decode()} for body in requests], "mode": "sequential"}},
        "flows": {"default": [{"request": step}]},
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plan.json").write_text(json.dumps(plan))
        summary = Path(folder) / "summary.json"
        words = ["run", "--summary-export", str(summary), "--summary-trend-stats", ",".join([*STATS.values(), "count"]), "plan.json"]
        _run([program, *words], folder)
        metrics = json.loads(summary.read_text())["metrics"]
    found = metrics["http_req_duration"]
    values = found.get("values", found)
    dropped = metrics.get("dropped_iterations", {})
    return {
        "tool": "k9-load",
        "loop": "open",
        "requests_per_s": round(values["count"] / seconds, 1),
        **{name: round(values[stat], 3) for name, stat in STATS.items()},
        "dropped": dropped.get("values", dropped).get("count", 0),
    }


def wrk(url: str, requests: Sequence[bytes], seconds: float, connections: int) -> dict[str, Any]:
    """What wrk measures: a closed loop, one thread. Its script gets the bodies from a file, one a line."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bodies").write_bytes(b"\n".join(requests))
        (Path(folder) / "script.lua").write_text(WRK)
        words = ["-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", "script.lua", f"{url}/rank"]
        text = _run(["wrk", *words], folder)
    rate = next(line.split()[1] for line in text.splitlines() if line.startswith("Requests/sec:"))
    return {"tool": "wrk", "loop": "closed", "requests_per_s": float(rate)}


WRK = """
local asked, n = {}, 0
for line in io.lines("bodies") do asked[#asked + 1] = line end
request = function()
  n = n % #asked + 1
  return wrk.format("POST", nil, {["Content-Type"] = "application/json"}, asked[n])
end
"""


def _run(words: Sequence[str], folder: str) -> str:
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise click.ClickException(f"{words[0]} cannot be run: {error.strerror}; install it, or name another with --k9") from error
    if done.returncode:
        raise click.ClickException(f"{words[0]} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True)
@click.option("--redis", help="The service's store.")
@click.option("--k9", "program", type=click.Path(exists=True, path_type=Path), help="k9-load's program; without it, it is left out.")
@click.option("--candidates", type=int, default=50, show_default=True)
@click.option("--rate", type=float, default=100.0, show_default=True)
@click.option("--seconds", type=float, default=20.0, show_default=True)
@click.option("--connections", type=int, default=64, show_default=True)
def main(url: str, redis: str | None, program: Path | None, candidates: int, rate: float, seconds: float, connections: int) -> None:
    """Measure one service with three tools."""
    try:
        target = Target.of(url)
        requests = bodies(draw(load_settings({"redis": redis}), candidates), candidates)[:BODIES]
        rows = [ours(target, requests, rate, seconds, connections)]
        if program:
            rows.append(k9(str(program.absolute()), url, requests, rate, seconds, connections))
            rows.append(ours(target, requests, rate, seconds, connections))
        closed = [ours(target, requests, None, seconds, 8), wrk(url, requests, seconds, 8), ours(target, requests, None, seconds, 8)]
    except LoadError as error:
        raise click.ClickException(str(error)) from error
    show({"open loop": rows, "closed loop": closed}, Console())


if __name__ == "__main__":
    main()
