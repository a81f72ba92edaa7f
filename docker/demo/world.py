"""The one-shot job of docker-compose.yml: makes the demo's world, trains on its log and loads its users and ads, each if it is not there.

Started again after it was broken off, or with a volume lost, it does what is missing.
"""

import asyncio
import sys
import time
from pathlib import Path

from adrank_demo.demo import NETWORKS
from features.state import Store, StoreError
from service.app import open_store
from service.settings import load_settings
from training.datasets.prepared import open_prepared
from training.loading import fill_store
from training.progress import progress_bar
from training.retrain.publish import train_and_publish
from training.simulation import make_world, write_log

DATA, MODEL = Path("/data/world"), "din"
STORE_TIMEOUT_MS = 2_000.0


async def is_filled(store: Store, users: int) -> bool:
    """Whether the store has been filled before: with every user, who are written after the ads."""
    try:
        for user in range(users):
            if await store.get_user(f"u{user}") is None:
                return False
        return True
    finally:
        await store.close()


def main() -> None:
    """Do what is missing, and say what was done."""
    began, world = time.monotonic(), make_world()
    settings = load_settings({"store_timeout_ms": STORE_TIMEOUT_MS})
    done = []
    with progress_bar() as progress:
        if not DATA.exists():
            write_log(world, DATA)
            done.append("made the world")
        if not (settings.models / MODEL / "current").exists():
            train_and_publish(open_prepared(DATA), MODEL, settings.models, MODEL, dict(NETWORKS[MODEL]), progress)
            done.append(f"trained {MODEL}")
        if not asyncio.run(is_filled(open_store(settings), len(world.age))):
            asyncio.run(fill_store(open_store(settings), open_prepared(DATA), progress))
            done.append("loaded users and ads")
    print(f"{', '.join(done) or 'nothing to do'}, in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except StoreError as error:
        sys.exit(f"the store does not answer: {error}")
