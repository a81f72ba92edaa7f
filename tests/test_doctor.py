"""`adrank doctor` on real stores, repositories and ports: each thing that may be wrong is found, said, and gives its exit code."""

import asyncio
import json
import os
import re
import subprocess
import tempfile
import time

import bundles
import pytest
from conftest import Server, free_port
from processes import ROOT, SERVE, adrank, ended, environment, fill
from redis import Redis

from features import bundle
from features.challenger import CHALLENGER, CanaryBounds, Challenger, challenge
from service.doctor.examine import examine
from service.doctor.finding import CODES, Finding, as_dict, exit_code, table
from service.doctor.machine import check_features, check_files, check_memory
from service.doctor.store import eviction, memory, persistence, version
from service.settings import Settings
from service.store import check as store_check
from tests.test_cli import run


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith("ADRANK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ADRANK_PORT", str(free_port()))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A store as it should be, with ads, users, a log and a joiner."""
    server = Server("valkey", "--appendonly", "yes", "--dir", str(tmp_path_factory.mktemp("valkey")))
    with Redis.from_url(server.url) as redis:
        redis.config_set("maxmemory", "200mb")
        asyncio.run(fill(server.url))
        for stream in ("adrank:served", "adrank:events"):
            redis.xgroup_create(stream, "join", mkstream=True)
            redis.xadd(stream, {"v": b"x"})
            redis.xreadgroup("join", "joiner", {stream: ">"})
    yield server
    server.stop()


@pytest.fixture
def alone(tmp_path_factory):
    """A store for one test, with a folder of its own, and a client of it."""
    server = Server("valkey", "--dir", str(tmp_path_factory.mktemp("valkey")))
    with Redis.from_url(server.url) as client:
        yield server, client
    server.stop()


def of(findings, check, area=None):
    (found,) = [finding for finding in findings if finding.check == check and area in (None, finding.area)]
    return found


def assert_finding(findings, check, status, *words, area=None):
    found = of(findings, check, area)
    assert found.status == status, found
    for word in words:
        assert word in f"{found.said}; {found.fix}"


def problems(findings):
    return [finding for finding in findings if finding.status == "problem"]


def test_all_is_well(healthy, repository):
    findings = examine({"models": repository, "model": "din", "redis": healthy.url})
    assert {finding.area for finding in findings} == set(CODES)
    assert [finding for finding in findings if finding.status != "ok"] == []
    assert_finding(findings, "adrank:served", "ok", "1 of 100,000 entries", "read by a joiner")
    assert_finding(findings, "ads", "ok", "30")
    assert_finding(findings, "din", "ok", "2 goldens hold", "float32")


def test_it_changes_nothing(healthy, repository, tmp_path):
    def state():
        with Redis.from_url(healthy.url) as redis:
            kept = {key: redis.dump(key) for key in redis.scan_iter()}
            return kept, redis.info("persistence")["rdb_changes_since_last_save"]

    def files():
        return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in repository.rglob("*")}

    before = state(), files()
    assert run("doctor", "--models", repository, "--model", "din", "--redis", healthy.url)[0] == 0
    assert (state(), files()) == before


def test_people_and_programs_are_told_the_same(healthy, repository):
    code, out, complaint = run("doctor", "--models", repository, "--model", "din", "--redis", "redis://127.0.0.1:1/0", "--json")
    document = json.loads(out)
    assert (code, complaint, document["exit_code"]) == (10, "", 10)
    (wrong,) = [finding for finding in document["findings"] if finding["status"] == "problem"]
    assert (wrong["area"], wrong["check"]) == ("store", "server")
    code, out, complaint = run("doctor", "--models", repository, "--model", "din", "--redis", "redis://127.0.0.1:1/0")
    assert (code, complaint) == (10, "")
    assert "store      server" in out
    assert out.rstrip().endswith("1 problem(s), 1 skipped")
    assert "\x1b" not in out


class TestFindings:
    findings = (
        Finding("port", "listen", "problem", "it is taken", "choose another"),
        Finding("models", "din", "problem", "it is damaged " * 9, "publish it again"),
        Finding("store", "memory", "warning", "much is used"),
    )

    def test_the_first_area_with_a_problem_gives_the_code(self):
        assert exit_code(self.findings) == CODES["models"] == 11
        assert exit_code(self.findings[:1]) == 15
        assert exit_code(self.findings[2:]) == exit_code([]) == 0
        assert len(set(CODES.values())) == len(CODES)
        assert CODES["settings"] == 2
        assert as_dict(self.findings)["exit_code"] == 11

    def test_lines_are_aligned_and_fit(self):
        text = table(self.findings, 70)
        assert max(len(line.replace("\x1b[31m", "").replace("\x1b[33m", "").replace("\x1b[0m", "")) for line in text.splitlines()) <= 70
        assert text.isascii()
        assert "it is taken. Choose another." in text
        assert text.endswith("0 ok, 1 warning(s), 2 problem(s)")

    def test_the_codes_are_those_of_the_help(self):
        shown = " ".join(run("doctor", "--help")[1].split())
        for area, code in CODES.items():
            assert f"{code} {area}" in shown


class TestSettings:
    def test_each_one_that_is_wrong_is_told(self, monkeypatch, healthy, repository):
        monkeypatch.setenv("ADRANK_STORE_TIMEOUT", "5")
        monkeypatch.setenv("ADRANK_EPSILON", "2")
        monkeypatch.setenv("ADRANK_WORKERS", "none")
        findings = examine({"models": repository, "model": "din", "redis": healthy.url, "port": "0"})
        assert_finding(findings, "ADRANK_STORE_TIMEOUT", "problem", "did you mean ADRANK_STORE_TIMEOUT_MS")
        assert_finding(findings, "ADRANK_EPSILON", "problem", "less than or equal to 1")
        assert_finding(findings, "ADRANK_WORKERS", "problem", "integer")
        assert_finding(findings, "ADRANK_PORT", "problem", "greater than or equal to 1")
        assert exit_code(findings) == 2
        assert {finding.area for finding in findings} == set(CODES)  # all else is looked at nevertheless

    def test_a_store_that_cannot_be_is_not_asked_and_not_quoted(self, monkeypatch, repository):
        monkeypatch.setenv("ADRANK_REDIS", "http://:secret@host:1/")
        findings = examine({"models": repository, "model": "din"})
        assert_finding(findings, "ADRANK_REDIS", "problem", "redis://host:6379/0")
        assert_finding(findings, "server", "skipped", "ADRANK_REDIS is impossible")
        assert "secret" not in table(findings)

    def test_the_variables_of_a_kubernetes_service(self, monkeypatch, healthy, repository):
        monkeypatch.setenv("ADRANK_PORT", "tcp://10.0.0.1:8000")
        monkeypatch.setenv("ADRANK_PORT_8000_TCP_ADDR", "10.0.0.1")
        monkeypatch.setenv("ADRANK_SERVICE_HOST", "10.0.0.1")
        monkeypatch.setenv("ADRANK_JOINER_SERVICE_PORT_METRICS", "9109")
        findings = examine({"models": repository, "model": "din", "redis": healthy.url})
        wrong = problems(findings)
        assert len(wrong) == 4
        assert all("enableServiceLinks: false" in finding.fix for finding in wrong)
        assert exit_code(findings) == 2

    def test_what_is_possible_but_not_good(self, repository, healthy):
        assert_finding(examine({"models": repository, "model": "din", "redis": "memory://"}), "redis", "warning", "memory://")
        findings = examine({"models": repository, "model": "din", "redis": healthy.url.replace("//", "//:secret@")})
        assert_finding(findings, "redis", "warning", "command line")

    def test_workers_with_nowhere_to_count(self, monkeypatch, repository):
        monkeypatch.setattr(tempfile, "gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError()))
        findings = examine({"models": repository, "model": "din", "redis": "memory://", "workers": 2})
        assert_finding(findings, "TMPDIR", "problem", "set TMPDIR")


class TestStore:
    def found(self, url, repository, **more):
        return examine({"models": repository, "model": "din", "redis": url}, **more)

    def test_an_eviction_policy_that_takes_ads_away(self, alone, repository):
        server, client = alone
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert_finding(self.found(server.url, repository), "eviction", "warning", "allkeys-lru")
        client.config_set("maxmemory", "100mb")
        findings = self.found(server.url, repository)
        assert_finding(findings, "eviction", "problem", "users, ads", "set maxmemory-policy noeviction")
        assert exit_code(findings) == 10
        client.config_set("maxmemory-policy", "volatile-ttl")
        assert_finding(self.found(server.url, repository), "eviction", "warning", "users vanish")

    def test_memory_that_is_used_up(self, alone, repository):
        server, client = alone
        client.config_set("maxmemory", "100kb")
        findings = self.found(server.url, repository)
        assert_finding(findings, "memory", "warning", "no write is taken when it is full", area="store")
        assert_finding(findings, "writes", "problem", "maxmemory")

    def test_passwords(self, alone, repository, monkeypatch):
        server, client = alone
        client.config_set("requirepass", "secret")
        for given, words in (("", "was given none"), (":wrong-secret@", "refuses the user name or password")):
            monkeypatch.setenv("ADRANK_REDIS", server.url.replace("//", f"//{given}"))
            findings = examine({"models": repository, "model": "din"})
            assert_finding(findings, "server", "problem", words)
            assert exit_code(findings) == 10
            assert "secret" not in table(findings) + json.dumps(as_dict(findings))
        monkeypatch.setenv("ADRANK_REDIS", server.url.replace("//", "//:secret@"))
        findings = examine({"models": repository, "model": "din"})
        assert problems(findings) == []
        assert "secret" not in table(findings) + json.dumps(as_dict(findings))

    def test_a_user_who_may_not_do_all(self, alone, repository):
        server, client = alone
        asyncio.run(fill(server.url))
        client.execute_command("ACL", "SETUSER", "some", "on", ">word", "~adrank:*", "+@all", "-xreadgroup", "-evalsha", "-info", "-time")
        findings = self.found(server.url.replace("//", "//some:word@"), repository)
        rights = {finding.said for finding in findings if finding.check == "permissions"}
        assert rights == {
            "POST /v1/events may not: EVALSHA adrank:seen:probe, TIME",
            "adrank join may not: XREADGROUP adrank:served",
        }
        assert_finding(findings, "server", "skipped", "INFO")
        assert_finding(findings, "store", "skipped", "TIME", area="clock")
        assert_finding(findings, "ads", "ok", "30")
        client.execute_command("ACL", "SETUSER", "some", "-hscan", "-hlen", "-xlen", "-ping")
        findings = self.found(server.url.replace("//", "//some:word@"), repository)
        (grave,) = [finding for finding in findings if finding.check == "permissions" and finding.status == "problem"]
        assert "adrank serve may not: HSCAN adrank:ads:{0}, XLEN adrank:served" in grave.said
        assert_finding(findings, "ads", "skipped", "may not count")
        assert_finding(findings, "streams", "skipped", "may not read")

    def test_the_permissions_that_the_documentation_lists_are_enough(self, alone, repository):
        """Those of a service and a joiner, which `test_redis_acl` uses each of, and the doctor's own."""
        server, client = alone
        words = re.search(r"ACL SETUSER adrank on >password ([^`]+)", (ROOT / "docs" / "redis.md").read_text())[1].split()
        words += re.search(r"needs `([^`]+)`", (ROOT / "docs" / "doctor.md").read_text())[1].split()
        client.execute_command("ACL", "SETUSER", "adrank", "on", ">PASSWORD", *words)
        url = server.url.replace("//", "//adrank:PASSWORD@")
        findings = self.found(url, repository)
        assert_finding(findings, "permissions", "ok")
        assert [finding for finding in findings if finding.status == "skipped"] == []

    def test_a_replica(self, alone, healthy, repository):
        server, client = alone
        client.replicaof("127.0.0.1", healthy.port)
        findings = self.found(server.url, repository)
        assert_finding(findings, "role", "problem", f"a replica of 127.0.0.1:{healthy.port}", "name the primary")
        assert [finding.check for finding in findings if finding.check == "writes"] == []

    def test_streams_that_nobody_reads(self, alone, repository, monkeypatch):
        server, client = alone
        monkeypatch.setenv("ADRANK_LOG_KEPT", "10")
        for _ in range(5):
            client.xadd("adrank:served", {"v": b"x"})
        assert_finding(self.found(server.url, repository), "adrank:served", "warning", "5 of 10", "no joiner has ever read")
        for _ in range(4):
            client.xadd("adrank:served", {"v": b"x"})
        assert_finding(self.found(server.url, repository), "adrank:served", "warning", "nearly full")
        client.xadd("adrank:served", {"v": b"x"})
        findings = self.found(server.url, repository)
        assert_finding(findings, "adrank:served", "problem", "it is full", "run adrank join")
        assert_finding(findings, "ads", "warning", "the store has no ads")

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("redis://127.0.0.1:1/0", "cannot be reached"),
            ("redis://no-such-host.invalid:6379/0", "Name or service not known"),
            ("unix:///no/such/socket", "No such file"),
        ],
    )
    def test_a_store_that_is_not_there(self, repository, url, words):
        findings = self.found(url, repository)
        assert_finding(findings, "server", "problem", words)
        assert not [each for each in findings if each.said.endswith(".")]
        assert_finding(findings, "store", "skipped", area="clock")
        assert exit_code(findings) == 10

    def test_tls_to_a_plain_port(self, healthy, repository):
        findings = self.found(healthy.url.replace("redis:", "rediss:"), repository)
        assert_finding(findings, "server", "problem")

    def test_a_cluster_is_asked_node_by_node(self):
        port = free_port()
        server = Server(
            "valkey", "--cluster-enabled", "yes", "--cluster-config-file", f"nodes-{port}.conf", "--cluster-port", str(free_port())
        )
        try:
            with Redis.from_url(server.url) as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
                while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO") and not time.sleep(0.05):
                    pass

            looked = asyncio.run(store_check.look(f"redis+cluster://127.0.0.1:{server.port}"))
            (node,) = looked.nodes
            assert (version(node.facts).status, node.facts["role"], looked.ads) == ("ok", "master", 0)
            assert abs(node.ahead) < 5
            assert (looked.denied, looked.unwritable) == ({}, None)
        finally:
            server.stop()

    def test_what_old_and_broken_servers_say(self):
        assert version({"redis_version": "6.2.14"}).status == "problem"
        assert version({"redis_version": "7.0.15"}).said == "Redis 7.0.15"
        assert version({}).status == "problem"
        assert eviction({}).status == "warning"
        assert memory({"used_memory": 80, "maxmemory": 100}).status == "warning"
        assert persistence({"aof_enabled": 1, "aof_last_write_status": "err"}).status == "problem"


class TestClock:
    @pytest.mark.parametrize(("off", "status"), [(0, "ok"), (-20, "warning"), (20, "warning"), (-400, "problem"), (400, "problem")])
    def test_a_clock_that_is_off(self, healthy, repository, off, status):
        findings = examine({"models": repository, "model": "din", "redis": healthy.url}, clock=lambda: time.time() + off)
        assert_finding(findings, "store", status, *(["ahead of" if off > 0 else "behind"] if off else []), area="clock")
        assert exit_code(findings) == (14 if status == "problem" else 0)


class TestModels:
    def found(self, models, **flags):
        return examine({"models": models, "redis": "memory://", **flags})

    def test_none_yet(self, tmp_path):
        assert_finding(self.found(tmp_path / "absent"), "repository", "problem", "is not there", "waits unready")
        findings = self.found(tmp_path)
        assert_finding(findings, "repository", "problem", "has no model yet")
        assert exit_code(findings) == 11

    def test_a_file_in_its_place(self, tmp_path):
        (tmp_path / "file").touch()
        findings = self.found(tmp_path / "file")
        assert_finding(findings, "models", "problem", "is not a folder")
        assert exit_code(findings) == 2

    @pytest.mark.parametrize(
        ("files", "words"),
        [
            ({bundle.MODEL: b"nonsense"}, "cannot be loaded"),
            ({bundle.MODEL: bundles.model(bias=0.01)}, "golden 0 is off by"),
            ({bundle.GOLDENS: b"[1]"}, "goldens.json cannot be read"),
        ],
    )
    def test_a_bundle_that_cannot_be_used(self, tmp_path, files, words):
        bundles.publish(tmp_path, "bad", files=files)
        bundles.publish(tmp_path, "good")
        findings = self.found(tmp_path)
        assert_finding(findings, "bad", "problem", words)
        assert_finding(findings, "good", "ok")
        assert exit_code(findings) == 11

    def test_one_that_was_changed_and_one_that_is_gone(self, tmp_path):
        (bundles.publish(tmp_path, "changed") / bundle.MODEL).write_bytes(b"x")
        bundles.publish(tmp_path, "gone").rename(tmp_path / "elsewhere")
        bundles.publish(tmp_path, "torn")
        (tmp_path / "torn" / bundle.CURRENT).write_text("x")
        findings = self.found(tmp_path, precision="int8")
        assert_finding(findings, "changed", "problem", "its digest differs", "publish it again")
        assert_finding(findings, "gone", "problem", "manifest.json")
        assert_finding(findings, "torn", "problem", "does not name a version")

    def test_a_chosen_model_that_is_not_there(self, repository, monkeypatch):
        monkeypatch.setenv("ADRANK_MODEL", "absent")
        assert_finding(self.found(repository), "repository", "problem", "has only din, other")

    def test_challengers(self, tmp_path):
        first = bundles.publish(tmp_path)
        second = bundles.publish(tmp_path, bias=0.1, make_current=False)
        challenge(tmp_path, "din", Challenger(int(second.name), "canary", 0.1, CanaryBounds()))
        assert_finding(self.found(tmp_path), "din, challenger", "ok", second.name, "canary for 0.1 of the users")
        (second / bundle.MODEL).write_bytes(b"x")
        assert_finding(self.found(tmp_path), "din, challenger", "problem", "digest differs")
        (first.parent / CHALLENGER).write_text("{}")
        assert_finding(self.found(tmp_path), "din, challenger", "problem", "does not name a challenger")

    def test_int8_that_a_bundle_does_not_have(self, repository):
        assert_finding(self.found(repository, precision="int8"), "din", "warning", "it was not asked for")

    def test_a_volume_that_may_not_be_read(self, tmp_path):
        bundles.publish(tmp_path / "models")
        (tmp_path / "models").chmod(0)
        done = adrank("doctor", "--models", tmp_path / "models", "--redis", "memory://")
        (tmp_path / "models").chmod(0o755)
        assert done.returncode == 11, done.stderr
        assert "cannot be read: Permission denied" in " ".join(done.stdout.split())
        assert done.stderr == ""


class TestMachine:
    def found(self, repository, cgroup, **flags):
        return examine({"models": repository, "model": "din", "redis": "memory://", **flags}, cgroup)

    def test_more_threads_than_processors(self, repository, tmp_path):
        (tmp_path / "cpu.max").write_text("100000 100000")
        assert_finding(self.found(repository, tmp_path, workers=1), "threads", "ok", "1 processor(s) by quota")
        assert_finding(self.found(repository, tmp_path, workers=2), "threads", "warning", "lower --workers to 1")
        findings = self.found(repository, tmp_path, workers=4)
        assert_finding(findings, "threads", "problem", "4 worker(s) x 1 request(s) x 1 thread(s) = 4")
        assert exit_code(findings) == 13

    def test_a_limit_that_is_too_low_and_no_room_to_load(self, repository, tmp_path):
        (tmp_path / "memory.max").write_text(str(90 * 2**20))
        (tmp_path / "memory.current").write_text(str(80 * 2**20))
        findings = self.found(repository, tmp_path)
        assert_finding(findings, "memory", "problem", "the limit is 90 MB", area="resources")
        assert_finding(findings, "din", "skipped", "is not loaded")
        (tmp_path / "memory.max").write_text("max")
        assert_finding(self.found(repository, tmp_path), "memory", "ok", "no limit", area="resources")

    def test_a_model_that_fits_but_not_twice(self):
        assert check_memory(Settings(), 200 * 2**20, 0, 350 * 2**20).status == "warning"
        assert check_memory(Settings(), 200 * 2**20, 0, 600 * 2**20).status == "ok"
        assert check_memory(Settings(workers=2), 200 * 2**20, 0, 350 * 2**20).status == "problem"

    def test_what_is_kept_of_ads_counts_as_far_as_it_is_kept(self):
        assert check_memory(Settings(), 0, 100_000, 300 * 2**20).status == "problem"  # 130 + 67 + 162 MB
        assert check_memory(Settings(ad_side_mib=160), 0, 100_000, 300 * 2**20).status == "ok"

    def test_open_files(self):
        assert [check_files(limit).status for limit in (-1, 100_000, 1_024, 64)] == ["ok", "ok", "warning", "problem"]

    def test_a_device_that_is_not_there(self, repository, tmp_path):
        findings = self.found(repository, tmp_path, device="cuda")
        assert_finding(findings, "cuda", "problem", "not available")
        assert_finding(findings, "din", "ok")  # the models are tried on the processor
        assert exit_code(findings) == 12

    def test_features_of_the_processor(self, tmp_path):
        (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t: sse2 avx_vnni\n")
        assert "avx_vnni" in check_features(Settings(precision="int8"), tmp_path / "cpuinfo").said
        assert check_features(Settings(precision="int8"), tmp_path / "absent").status == "warning"
        assert check_features(Settings(), tmp_path / "absent").status == "ok"


class TestPort:
    def test_taken_by_something_else(self, repository, healthy):
        findings = examine({"models": repository, "model": "din", "redis": "memory://", "port": healthy.port})
        assert_finding(findings, "listen", "problem", "Address already in use", "choose another")
        assert exit_code(findings) == 15

    def test_a_host_that_is_none(self, repository):
        assert_finding(
            examine({"models": repository, "model": "din", "redis": "memory://", "host": "no-such-host.invalid"}),
            "listen",
            "problem",
            "not known",
        )

    def test_taken_by_adrank(self, repository, tmp_path):
        port = free_port()
        settings = {"models": tmp_path / "models", "redis": "memory://", "port": port}
        with ended(subprocess.Popen(SERVE, env=environment(**settings), stderr=subprocess.DEVNULL)):
            flags = {"models": repository, "redis": "memory://", "port": port}
            found = eventually(lambda: of(examine(flags), "listen"), "unready")
            assert "waiting for one to be published" in found.said
            assert exit_code([found]) == 15
            bundles.publish(tmp_path / "models")
            assert eventually(lambda: of(examine(flags), "listen"), "which is ready").status == "ok"


def eventually(ask, word, seconds=90):
    until = time.monotonic() + seconds
    while word not in (found := ask()).said and time.monotonic() < until:
        time.sleep(0.1)
    assert word in found.said
    return found
