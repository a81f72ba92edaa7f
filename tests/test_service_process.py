"""The real server in processes of its own, on real stores: what only shows there."""

import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Client, until, until_ready
from processes import ROOT, fill, serving

pytestmark = pytest.mark.anyio
TIMEOUT_MS = 100


@pytest.fixture
async def filled(server):
    await fill(server.url)
    return server


def test_the_service_imports_neither_torch_nor_what_traces():
    command = [sys.executable, "-c", "import sys, service.app; print(*sys.modules)"]
    loaded = set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    assert "service.api.edge" in loaded
    assert not loaded & {"torch", "onnx", "polars", "sklearn", "training"}
    assert not loaded & {"opentelemetry.sdk.trace", "opentelemetry.exporter", "service.telemetry.tracing"}


async def test_two_workers_are_counted_together_and_drain(repository, filled):
    async with serving(repository, filled.url, workers=2) as client:
        for _ in range(30):  # a new connection each, so that both workers get some
            async with Client(base_url=client.base_url) as once:
                assert (await once.rank())["degraded"] == []
        async with Client(base_url=client.base_url) as once:
            # The other worker writes its own now and then.
            await once.until_metric('adrank_requests_total{model="din",outcome="ok",route="/rank"}', 30)
            assert await once.metric('adrank_requests_total{model="din",outcome="ok",route="/rank"}') == 30
            assert await once.metric("adrank_candidates_count") == 30
            assert await once.metric('adrank_p_click_count{model="din"}') == 60
            assert await once.metric("adrank_catalogue_ads") == 30
            assert await once.metric("adrank_inflight_requests") == 0
        workers = {int(pid) for pid in re.findall(r"Started server process \[(\d+)\]", client.log.read_text())}
        assert len(workers) == 2

        victim = workers.pop()
        (folder,) = re.findall(r"PROMETHEUS_MULTIPROC_DIR=([^\0]+)", Path(f"/proc/{victim}/environ").read_text())
        files = {path.name for path in Path(folder).glob("*.db")}
        assert {name.rpartition("_")[2] for name in files} == {"0.db", "1.db"}  # of the places of workers, not of processes
        os.kill(victim, signal.SIGKILL)
        await until(lambda: len(re.findall(r"loaded and warm", client.log.read_text())) >= 2 * 3)
        async with Client(base_url=client.base_url) as once:
            await until_ready(once)
            assert await once.metric('adrank_requests_total{model="din",outcome="ok",route="/rank"}') == 30
            assert await once.metric("adrank_inflight_requests") == 0
            text = (await once.get("/metrics")).text
            assert text.count('adrank_model_info{model="din"') == 1
            assert {path.name for path in Path(folder).glob("*.db")} == files

        asking = asyncio.create_task(client.rank(candidates=[f"a{i}" for i in range(5_000)]))
        await asyncio.sleep(0.02)
        client.process.terminate()
        assert len((await asking)["ads"]) == 5_000
        client.process.wait(90)
        log = client.log.read_text()
        assert "Traceback" not in log
        assert "u1" not in log
    assert not Path(folder).exists()


async def by_user(client, users):
    """Without the store's help: what each user must be answered, since all that the store has is sent along."""
    answers = {}
    for i in users:
        whom = {"id": f"u{i}", "features": {"age": ("25", "35")[i % 2], "income": float(i)}, "history": [{"ad_id": f"a{i % 30}"}]}
        answers[i] = (await client.rank(whom, ["a1", "a2", "a3"]))["ads"]
    return answers


async def test_the_store_is_stopped_paused_and_started_again_while_requests_run(repository, filled):
    async with serving(repository, filled.url, store_timeout_ms=TIMEOUT_MS) as client:
        full = await by_user(client, range(60))
        reasons, took, stop = {}, {}, asyncio.Event()
        phase = "up"

        async def ask(i):
            while not stop.is_set():
                i, at, began = (i + 7) % 60, phase, time.monotonic()
                answer = await client.rank(f"u{i}", ["a1", "a2", "a3"])
                if at == phase:
                    took.setdefault(at, []).append(time.monotonic() - began)
                if answer["degraded"] and at == phase:
                    reasons.setdefault(at, set()).update(entry["reason"] for entry in answer["degraded"])
                elif not answer["degraded"] and phase != "started":  # the server that is started again knows no users
                    assert answer["ads"] == full[i]

        asking = [asyncio.create_task(ask(i)) for i in range(8)]
        await asyncio.sleep(0.5)
        for phase, change in (("paused", filled.pause), ("resumed", filled.resume), ("stopped", filled.stop), ("started", filled.start)):
            await asyncio.to_thread(change)
            if phase in ("paused", "stopped"):
                assert (await until_ready(client, "degraded"))["store"]["status"] == "down"
                await asyncio.sleep(0.5)
            elif phase == "resumed":
                await until_ready(client, "ready")
        # It kept nothing, but the service still has the ads, and says so until they are loaded again.
        async with asyncio.timeout(90):
            while True:
                report = await until_ready(client, "degraded")
                if (report["catalogue"]["reason"], report["store"]["status"]) == ("store_emptied", "up"):
                    break
                await asyncio.sleep(0.05)
        assert report["catalogue"]["ads"] == 30
        await fill(filled.url)
        await until_ready(client, "ready")
        stop.set()
        await asyncio.gather(*asking)
        assert "store_timeout" in reasons["paused"]
        assert "store_unreachable" in reasons["stopped"]
        assert "up" not in reasons
        # The timeout, and room for eight requests on a machine that is busy with other work, which may hold up some for longer.
        assert max(map(statistics.median, (took["paused"], took["stopped"]))) < TIMEOUT_MS / 1000 + 1
        assert max(map(max, (took["paused"], took["stopped"]))) < 10  # and none hangs
        for reason in ("store_timeout", "store_unreachable"):
            assert await client.metric(f'adrank_degraded_total{{reason="{reason}",stage="history"}}') > 0
        assert await by_user(client, range(60)) == full
        assert await client.metric("adrank_inflight_requests") == 0


async def test_callers_who_hang_up_break_nothing_and_nobody_gets_anothers_answer(repository, filled):
    async with serving(repository, filled.url, store_timeout_ms=2000, max_inflight=400) as client:
        full = await by_user(client, range(40))
        body = json.dumps({"user": {"id": "u1"}, "candidates": [f"a{i}" for i in range(200)]}).encode()
        head = f"POST /rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()

        async def hang_up(i):
            reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
            writer.write((head + body)[: len(head) + (len(body) if i % 2 else 9)])
            await writer.drain()
            await asyncio.sleep(0.002 * (i % 5))
            writer.transport.abort()
            del reader

        async def ask(i):
            answer = await client.rank(f"u{i}", ["a1", "a2", "a3"], request_id=f"r{i}")
            assert (answer["request_id"], answer["degraded"], answer["ads"]) == (f"r{i}", [], full[i])

        for _ in range(4):
            await asyncio.gather(*(each(i) for i in range(40) for each in (hang_up, ask)))
        async with asyncio.timeout(90):
            while await client.metric("adrank_inflight_requests"):
                await asyncio.sleep(0.05)
        assert "Traceback" not in client.log.read_text()
