"""What is configured wrongly is one line and exit code 2, or is waited for and mends itself."""

import asyncio
import contextlib
import re
import signal
import subprocess
import sys

import bundles
import httpx
import pytest
import small
from conftest import Client, Server, free_port, until, until_ready
from processes import PATIENCE, SERVE, adrank, ended, environment, fill, without_privileges
from redis import Redis

from tests.test_cli import refused, run

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def locked():
    """A store with a password."""
    server = Server("valkey", "--requirepass", "secret")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small.data_set(tmp_path_factory.mktemp("small"), rows=(130, 60, 60)).folder


def with_password(server, password):
    return server.url.replace("//", f"//:{password}@")


def one_line(done, *words):
    """The process complained in one line, of its own, and ended with exit code 2."""
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"Error: [^\n]+\n", done.stderr), done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr


async def logged(log, text, times):
    """Waits until the log has a text so many times, and sees that it is not said more often."""
    await until(lambda: log.read_text().count(text) >= times)
    await asyncio.sleep(0.5)
    assert log.read_text().count(text) == times


def nobody_is_told(report, *words):
    """Neither addresses and paths nor what libraries say."""
    for word in words:
        assert str(word) not in str(report), word


class TestRefused:
    """What no waiting would mend."""

    def test_of_serve(self, locked, repository, tmp_path):
        (tmp_path / "file").touch()
        good = ("serve", "--redis", "memory://", "--models", repository, "--model", "din", "--port", free_port())
        one_line(adrank(*good, "--port", locked.port, "--workers", 2), f"127.0.0.1 port {locked.port}: Address already in use; choose")
        refused(run(*good, "--port", locked.port), f"127.0.0.1 port {locked.port}: Address already in use; choose another with")
        refused(run(*good, "--device", "cuda", "--workers", 2), "device cuda is not available")
        refused(run(*good, "--models", tmp_path / "file"), "file is not a folder; name another with --models")
        refused(run(*good, "--host", "no-such-host.invalid"), "Name or service not known")
        one_line(adrank(*good, ADRANK_PORT_8000_TCP="tcp://10.0.0.1:8000"), "enableServiceLinks: false")

    @pytest.mark.parametrize(
        "wrong",
        [
            "tempfile._candidate_tempdir_list = lambda: ['/proc/nowhere']\n",  # as where the root file system may not be written
            "resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, 2**19))\n",  # as on a disk that is full
        ],
    )
    def test_of_workers_that_have_no_room_for_their_metrics(self, repository, wrong):
        code = (
            f"import resource, tempfile, sys, adrank\n{wrong}"
            f"adrank.main(['serve', '--models', {str(repository)!r}, '--model', 'din', '--redis', 'memory://', '--workers', '2', "
            f"'--port', '{free_port()}'])"
        )
        done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert "set TMPDIR" in done.stderr.splitlines()[-1]

    def test_of_the_joiner(self, locked, repository, tmp_path):
        (tmp_path / "file").touch()
        (tmp_path / "closed").mkdir(mode=0o555)
        good = ("join", "--redis", with_password(locked, "secret"), "--models", repository, "--name", "din", "--log", tmp_path / "log")
        one_line(adrank(*good, "--log", tmp_path / "closed" / "log"), "cannot be used as a log", "Permission denied")
        done = adrank(*good, "--redis", with_password(locked, "wrong"), "--once")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1].startswith("Error: the store refuses the user name or password")
        assert "wrong" not in done.stderr
        refused(
            run(*good, "--metrics-port", locked.port),
            f"--metrics-port {locked.port} cannot be listened on at 127.0.0.1: Address already in use",
        )
        refused(run(*good, "--log", tmp_path / "file"), "is a file")
        refused(
            run(*good, "--models", tmp_path / "none", "--log", tmp_path / "fresh", "--once"),
            "has no live version of din to take the log's schema from",
        )
        refused(run(*good, "--redis", "memory://"), "no streams to join")
        refused(run(*good, "--redis", "redis://127.0.0.1:1/0", "--once"), "the store cannot be reached")
        assert "Invalid value for '--window'" in run(*good, "--window", -1)[2]

    def test_of_commands_that_ask_the_store_once(self, locked, data):
        wrong = with_password(locked, "wrong")
        refused(run("load", "--data", data, "--redis", f"redis://127.0.0.1:{free_port()}/0"), "the store cannot be reached")
        refused(run("load", "--data", data, "--redis", "http://x"), "ADRANK_REDIS: expected a URL such as redis://")
        refused(run("load", "--data", data, "--redis", wrong), "Error: the store refuses the user name or password of its URL")
        refused(run("bench", "--redis", wrong), "the store refuses the user name or password of its URL")
        refused(run("bench", "--redis", locked.url), "was given none")

    def test_of_commands_that_write(self, locked, data, tmp_path):
        (tmp_path / "file").touch()
        inside, none = tmp_path / "file" / "models", tmp_path / "none"
        train = ("train", "--data", data, "--model", "deepfm", "--epochs", "1", "--models")
        refused(run(*train, inside), "cannot publish deepfm in .*file is not a folder that may be written; name another with --models")
        refused(run(*train, tmp_path / "file"), "is a file")
        refused(run("retrain", "--log", data, "--models", inside, "--name", "din"), "file")
        refused(run("retrain", "--log", none, "--models", tmp_path / "models", "--name", "din"), "none is not a prepared data set")
        refused(run("promote", "--models", none, "--name", "din"), "there is no model din in")
        refused(run("promote", "--models", tmp_path / "file", "--name", "din"), "is a file")
        refused(run("demo", "--port", locked.port, "--dir", tmp_path / "demo"), "Address already in use")
        refused(run("demo", "--port", free_port(), "--dir", inside), "cannot write to")


@contextlib.asynccontextmanager
async def starting(tmp_path, **settings):
    """A server that is not ready, a client of it, and its log."""
    port, log = free_port(), tmp_path / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(SERVE, env=environment(port=port, **settings), stderr=out, preexec_fn=without_privileges)  # noqa: PLW1509
    try:
        async with Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            yield client, log
    finally:
        process.terminate()
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert "Traceback" not in log.read_text()


async def unready(client, word):
    """What /readyz says, once it says that."""
    async with asyncio.timeout(90):
        while True:
            with contextlib.suppress(httpx.TransportError):
                answer = await client.get("/readyz")
                if word in " ".join(answer.json()["reasons"]):
                    assert answer.status_code == 503
                    return answer.json()
            await asyncio.sleep(0.05)


class TestWaitedFor:
    """What may mend itself: the service answers, is unready, says why, and says it once in its log."""

    async def test_a_wrong_password(self, server, repository, tmp_path):
        await fill(server.url)
        with Redis.from_url(server.url) as redis:
            redis.config_set("requirepass", "secret")
        async with starting(tmp_path, models=repository, redis=with_password(server, "mended")) as (client, log):
            readiness = {"store": {}, "catalogue": {}}
            async with asyncio.timeout(PATIENCE):
                while {readiness[part].get("reason") for part in ("store", "catalogue")} != {"store_denied"}:
                    readiness = await unready(
                        client, "the store refuses the service's user or password, or the user lacks a permission; the"
                    )
            await logged(log, "refuses the user name or password", 1)
            with Redis.from_url(with_password(server, "secret")) as redis:
                redis.config_set("requirepass", "mended")
            await until_ready(client, "ready")
            assert "mended" not in log.read_text()

    async def test_a_store_that_is_not_there_yet(self, server, repository, tmp_path):
        await fill(server.url)
        server.stop()
        async with starting(tmp_path, models=repository, redis=server.url) as (client, log):
            readiness = await unready(client, "the store cannot be reached")
            assert readiness["store"]["reason"] == "store_unreachable"
            await logged(log, "cannot be reached", 1)
            nobody_is_told(readiness, server.port, "127.0.0.1", "Errno", "onnect call")
            await asyncio.to_thread(server.start)
            await until_ready(client)

    async def test_a_user_who_lacks_a_permission(self, server, repository, tmp_path):
        await fill(server.url)
        with Redis.from_url(server.url) as redis:
            redis.execute_command("ACL", "SETUSER", "some", "on", ">word", "~adrank:*", "+@all", "-hscan")
            url = server.url.replace("//", "//some:word@")
            async with starting(tmp_path, models=repository, redis=url) as (client, log):
                nobody_is_told(await unready(client, "or the user lacks a permission"), "hscan", "some has")
                await logged(log, "lacks a permission: User some has no permissions to run the 'hscan' command", 1)
                redis.execute_command("ACL", "SETUSER", "some", "+hscan", "-getrange")
                readiness = await until_ready(client, "degraded")
                nobody_is_told(readiness, "getrange")
                async with asyncio.timeout(90):
                    while "'getrange' command" not in log.read_text():
                        await client.get("/readyz")
                        await asyncio.sleep(0.1)
                redis.execute_command("ACL", "SETUSER", "some", "+getrange")
                await until_ready(client, "ready")
            assert "word" not in log.read_text().replace("password", "")

    async def test_a_repository_that_is_not_there_then_may_not_be_read(self, tmp_path):
        workers = 2
        models = tmp_path / "volume" / "models"
        async with starting(tmp_path, models=models, redis="memory://", workers=workers) as (client, log):
            nobody_is_told(await unready(client, "no model is usable; waiting for one to be published"), models)
            await logged(log, f"the repository is {models}", workers)
            models.mkdir(parents=True, mode=0o300)
            await unready(client, "the model repository cannot be read")
            await logged(log, "cannot be read, so what is loaded stays", workers)
            models.chmod(0o755)
            bundles.publish(models)
            await until_ready(client)

    async def test_one_model_that_may_not_be_read_does_not_stop_the_others(self, tmp_path):
        models = tmp_path / "models"
        bundles.publish(models, "closed")
        (models / "closed").chmod(0)
        async with starting(tmp_path, models=models, redis="memory://", model="open") as (client, log):
            nobody_is_told(await unready(client, "closed: no_version: it does not say which version is live"), models, "Permission")
            bundles.publish(models, "open")
            assert (await until_ready(client))["models"]["refused"]["closed"].startswith("no_version: ")
            assert "Permission denied" in log.read_text()
        (models / "closed").chmod(0o755)

    def test_of_the_joiner(self, server, repository, tmp_path):
        with Redis.from_url(server.url) as redis:
            redis.config_set("requirepass", "secret")
        words = ("join", "--models", repository, "--name", "din", "--log", tmp_path / "log", "--redis", with_password(server, "mended"))
        command = [sys.executable, "-m", "adrank", *map(str, words)]
        with ended(subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)) as process:
            lines = iter(process.stderr.readline, "")
            assert "waiting: the store refuses the user name or password" in next(line for line in lines if "waiting" in line)
            with Redis.from_url(with_password(server, "secret")) as redis:
                redis.config_set("requirepass", "mended")
            assert "going on" in next(line for line in lines if "waiting" in line or "going on" in line)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


class TestUnusualEnvironments:
    def test_a_terminal_without_our_letters(self, tmp_path):
        models = tmp_path / "modèles"
        for words in (("doctor", "--models", models, "--redis", "memory://"), ("promote", "--models", models, "--name", "din")):
            done = adrank(*words, unset=("LANG", "LC_CTYPE"), LC_ALL="C", PYTHONIOENCODING="ascii:strict", PYTHONHASHSEED="7")
            assert "Traceback" not in done.stderr
            assert done.returncode in (11, 2)

    @pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">/dev/full"])
    def test_files_that_are_closed_or_full(self, repository, closed):
        command = (
            f"exec {sys.executable} -m adrank doctor --models {repository} --model din --redis memory:// --port {free_port()} {closed}"
        )
        done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True, check=False)
        if "full" in closed:
            one_line(done, "No space left on device")
        else:
            assert (done.returncode, done.stderr) == (0, "")

    def test_neither_home_nor_name(self, repository, tmp_path):
        stranger = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
        with contextlib.suppress(OSError):
            if subprocess.run([*stranger, "true"], capture_output=True, check=False).returncode == 0:
                variables = {name: value for name, value in environment().items() if name not in ("HOME", "USER", "LOGNAME")}
                words = ["doctor", "--models", str(repository), "--model", "din", "--redis", "memory://", "--port", str(free_port())]
                command = [*stranger, sys.executable, "-m", "adrank", *words]
                done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
                assert (done.returncode, done.stderr) == (0, "")
                return
        pytest.skip("no user namespaces here")

    def test_nothing_is_written_at_home(self, repository, tmp_path):
        (tmp_path / "home").mkdir()
        done = adrank(
            "doctor",
            "--models",
            repository,
            "--model",
            "din",
            "--redis",
            "memory://",
            "--port",
            free_port(),
            unset=("ORT_DISABLE_TELEMETRY",),
            HOME=str(tmp_path / "home"),
        )
        assert done.returncode == 0
        assert list((tmp_path / "home").iterdir()) == []  # nor is a session told to ONNX Runtime's maker
