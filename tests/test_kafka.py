"""Kafka on both sides of the loop: `adrank bridge`, and `adrank join --to-kafka`. The broker is librdkafka's mock cluster, in a process of
its own: it speaks the protocol, keeps what it is sent in memory, and can be stopped for a while.
"""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time

import bundles
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from joining import T0, Joining, Writer, ranking
from processes import ROOT, ended, environment, fill, serving
from test_cli import run

from features.events import unpack_event
from features.state import StoreError
from features.streams import EVENTS, SERVED
from training.join import to_kafka
from training.join.to_kafka import KafkaTopic

pytestmark = pytest.mark.anyio
MOCK = """
import time
from confluent_kafka import Producer
cluster = Producer({"test.mock.num.brokers": 1})
broker = next(iter(cluster.list_topics(timeout=30).brokers.values()))
print(f"{broker.host}:{broker.port}", flush=True)
time.sleep(600)
"""


class Broker:
    def __init__(self, process):
        self.process, self.address = process, process.stdout.readline().strip()
        self.settings = {"bootstrap.servers": self.address}
        self.producer = Producer(self.settings)

    def send(self, topic, *values):
        for value in values:
            self.producer.produce(topic, value if isinstance(value, bytes) else json.dumps(value).encode())
        assert self.producer.flush(30) == 0

    def messages(self, topic, count):
        """All messages of a topic, once there are so many."""
        consumer, found, until = Consumer({**self.settings, "group.id": "looks"}), [], time.monotonic() + 60
        consumer.assign([TopicPartition(topic, partition, 0) for partition in self.producer.list_topics(topic).topics[topic].partitions])
        while len(found) < count and time.monotonic() < until:
            found += [message for message in consumer.consume(1000, 0.2) if not message.error()]
        found += [message for message in consumer.consume(1000, 0.3) if not message.error()]
        consumer.close()
        return found

    @contextlib.contextmanager
    def away(self):
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def broker():
    with ended(subprocess.Popen([sys.executable, "-c", MOCK], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)) as process:
        yield Broker(process)


@contextlib.contextmanager
def bridging(broker, service, *options):
    quick = {"SESSION_TIMEOUT_MS": 4000, "HEARTBEAT_INTERVAL_MS": 500, "BOOTSTRAP_SERVERS": broker.address}
    given = environment() | {f"RDKAFKA_{name}": str(value) for name, value in quick.items()}
    command = [sys.executable, "-m", "adrank", "bridge", "--topic", "clicks", "--service", service, *options]
    with ended(subprocess.Popen(command, env=given, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)) as process:
        yield process


@pytest.mark.parametrize("shared_server", ["valkey"], indirect=True)
async def test_what_kafka_took_is_done_once_whatever_is_killed_or_away(repository, shared_server, broker):
    streams, ids = Writer(shared_server.url), [f"e{i}" for i in range(400)]
    who = {"ts": time.time(), "user_id": "u1", "ad_id": "a1", "request_id": "r"}
    streams.redis.flushall()
    await fill(shared_server.url)

    def clicks(first, last):
        return [{"type": "click", "event_id": each, **who} for each in ids[first:last]]

    def taken():
        return [unpack_event(entry[b"v"]).event_id for _, entry in streams.redis.xrange(EVENTS)]

    async def until(count):
        async with asyncio.timeout(60):
            while len(taken()) < count:
                await asyncio.sleep(0.02)

    async with serving(repository, shared_server.url, max_events=60) as service:  # so that batches are halved
        broker.send("clicks", *clicks(0, 100), b"{torn", {"type": "click", "event_id": "bare"}, *clicks(0, 50))
        with bridging(broker, str(service.base_url)) as process:
            await until(1)
            process.kill()  # before it has committed, or after
        with bridging(broker, str(service.base_url), "--dead-letters", "dead") as process:
            broker.send("clicks", *clicks(100, 200), {"type": "click", "event_id": "late", "ts": 1, "user_id": "u1", "ad_id": "a1"})
            await until(200)
            service.process.send_signal(signal.SIGSTOP)
            broker.send("clicks", *clicks(200, 300))
            await asyncio.sleep(0.5)
            service.process.send_signal(signal.SIGCONT)
            with broker.away():
                await asyncio.sleep(1.5)
            broker.send("clicks", *clicks(300, 400))
            await until(400)
            process.send_signal(signal.SIGTERM)
            out, err = await asyncio.to_thread(process.communicate, timeout=60)
        assert (process.returncode, "Traceback" in err) == (0, False), err
        assert sorted(taken()) == sorted(ids)
        assert "moved: " in out
    letters = {message.value(): dict(message.headers()) for message in broker.messages("dead", 1)}
    late = next(headers for value, headers in letters.items() if b"late" in value)
    assert (late["reason"], late["from"].startswith(b"clicks/")) == (b"too_old", True)
    assert letters.get(b"{torn", {"reason": b"not_json"})["reason"] == b"not_json"  # it was taken by either


@pytest.mark.parametrize("shared_server", ["valkey"], indirect=True)
async def test_rankings_go_to_kafka_before_they_are_acknowledged(repository, shared_server, broker, tmp_path, monkeypatch):
    streams, joining = Writer(shared_server.url), Joining(shared_server.url, tmp_path / "log", repository, click_window=0.3, lateness=0)
    streams.redis.flushall()
    monkeypatch.setattr(to_kafka, "FLUSH_SECONDS", 1.0)
    joining.forward = KafkaTopic(broker.settings, "rankings").send
    streams.add(ranking("r1"), (SERVED, b"torn"), ranking("r2", T0 + 1, tensors={"ad_ids": b"12345678"}))
    await joining.once()
    with broker.away():
        streams.add(ranking("r3", T0 + 2))
        with pytest.raises(StoreError, match="Kafka does not take rankings into rankings"):
            await joining.once()
        assert streams.redis.xpending(SERVED, "join")["pending"] == 1
    await joining.once(everything=True)
    assert streams.lengths()[0] == 0
    found = {}
    for message in broker.messages("rankings", 3):
        record = json.loads(message.value())
        found[record["entry"]] = record
        assert message.key() == record["request_id"].encode()
    assert sorted(record["request_id"] for record in found.values()) == ["r1", "r2", "r3"]
    r1 = next(record for record in found.values() if record["request_id"] == "r1")
    assert (r1["ad_ids"], r1["ads"]["a1"], r1["shown"]) == (["a1", "a2", "a3"], bundles.ADS["a1"], 3)
    assert set(joining.rows()["request_id"]) == {"r1", "r2", "r3"}


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({}, "RDKAFKA_BOOTSTRAP_SERVERS is not set: it names Kafka's brokers"),
        ({"RDKAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1", "RDKAFKA_SASL_PASWORD": "x"}, 'No such configuration property: "sasl.pasword"'),
    ],
)
def test_settings_that_cannot_be_are_a_sentence(monkeypatch, variables, sentence):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, err = run("bridge", "--topic", "clicks")
    assert (code, sentence in err, "Traceback" in err) == (2, True, False), err
