"""The score that the service returns is the score that training's own evaluation gives the same row, on real rows of ML-1M."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import small
from conftest import Client, Server, running

from features.state import Ad, UserState
from service.settings import Settings
from service.store.redis import RedisStore
from training.datasets import movielens
from training.datasets.encoded import encode_split
from training.datasets.prepared import Prepared, open_prepared, write_split, write_tables
from training.datasets.states import ads
from training.export.export import export
from training.networks import NETWORKS
from training.networks.contract import CLICK
from training.train import Trained, predict

SOURCE = Path(__file__).parent.parent.parent / "shared" / "data" / "ml-1m"
pytestmark = [pytest.mark.anyio, pytest.mark.skipif(not SOURCE.is_dir(), reason=f"MovieLens-1M is not in {SOURCE}")]
TOLERANCE = 1e-5
"""Both sides encode with the same code and compute in float32, torch there and ONNX Runtime here, with sums in another order: that
comes to about 1e-7. A wrong id, or a history off by one, moves a probability by 1e-3 and more."""
QUICK = ("deepfm", "din")
ASKED = os.environ.get("NETWORKS", " ".join(QUICK)).replace("all", " ".join(NETWORKS))
FAMILIES = tuple(family for family in ASKED.split() if NETWORKS[family].own_heads == (CLICK,))
"""Two in every run; `make parity-test` has all that learn from clicks alone."""
ROWS = 200


@dataclass(frozen=True)
class Trial:
    """200 rows of the test split, two models that were trained, and what each says of the rows."""

    data: Prepared
    rows: pl.DataFrame
    users: dict[str, dict[str, str]]
    models: Path
    expected: dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def trial(unexplained: None, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    folder = tmp_path_factory.mktemp("parity")
    movielens.prepare(_some(folder / "source"), folder / "whole")
    data, rows = _part(open_prepared(folder / "whole"), folder / "part")
    users = {row.pop("user_id"): {name[5:]: value for name, value in row.items()} for row in data.table("user").to_dicts()}
    expected = {}
    for family in FAMILIES:
        epochs = 40 if family == "deeplight" else 1  # it is pruned for 800 steps, of which an epoch here has 24
        trained = small.quick(data, family, epochs=epochs, batch=512, learning_rate=0.01)
        export(data, trained, folder / "models", family, small.quiet())
        expected[family] = _of_training(data, trained)
    return Trial(data, rows, users, folder / "models", expected)


def _some(folder: Path) -> Path:
    """The source with the ratings of every fourth user."""
    shutil.copytree(SOURCE, folder)
    (folder / "ratings.dat").chmod(0o644)
    ratings = (SOURCE / "ratings.dat").read_text().splitlines(keepends=True)
    (folder / "ratings.dat").write_text("".join(line for line in ratings if int(line.partition("::")[0]) % 4 == 0))
    return folder


def _part(whole: Prepared, out: Path) -> tuple[Prepared, pl.DataFrame]:
    """A few of the train and valid rows, to be quick, and 200 rows of test: of empty, short and full histories, and of new users."""
    out.mkdir()
    write_tables(out, whole.schema, whole.table("ad"), whole.table("user"))
    train = next(whole.frames("train")).sample(12_000, seed=1)
    test = pl.concat(whole.frames("test"))
    length, new = pl.col("history").list.len(), ~pl.col("user_id").is_in(train["user_id"].unique().to_list())
    kinds = ((length == 0, 20), (length.is_between(1, 49) & new, 60), (length.is_between(1, 49) & ~new, 40), (length == 50, 80))
    rows = pl.concat([test.filter(kind).sample(count, seed=2) for kind, count in kinds])
    for split, frame in (("train", train), ("valid", next(whole.frames("valid")).head(1_000)), ("test", rows)):
        write_split(out, split, [frame])
    return open_prepared(out), rows


def _of_training(data: Prepared, trained: Trained) -> np.ndarray[Any, Any]:
    """As `train` measures a split, and here checked against what it measured."""
    rows = encode_split(data, "test", trained.encoder)
    p_click = trained.calibration.on_log(predict(trained.network, rows))
    clicked = np.where(rows.labels > 0, p_click, 1 - p_click)
    assert -np.log(clicked).mean() == pytest.approx(trained.metrics["test"].log_loss, abs=1e-9)
    return p_click


def test_the_rows_are_of_every_kind(trial: Trial) -> None:
    lengths = trial.rows["history"].list.len()
    assert (len(trial.rows), lengths.min(), lengths.max(), (lengths == 0).sum(), (lengths == 50).sum()) == (ROWS, 0, 50, 20, 80)
    known = set(next(trial.data.frames("train"))["user_id"])
    assert 60 <= (~trial.rows["user_id"].is_in(list(known))).sum() < ROWS
    for p_click in trial.expected.values():
        assert p_click.std() > 0.01
        assert len(np.unique(p_click.round(6))) > 150


@pytest.fixture
async def store(server: Server, trial: Trial) -> AsyncIterator[RedisStore]:
    """A real Valkey with the ads."""
    store = RedisStore(server.url, timeout=10, ttl=1000, on_damaged=lambda: None)
    await store.put_ads(ads(trial.data))
    yield store
    await store.close()


@asynccontextmanager
async def serving(trial: Trial, server: Server) -> AsyncIterator[Client]:
    async with running(Settings(models=trial.models, redis=server.url, store_timeout_ms=10_000)) as client:
        yield client


async def scores(client: Client, family: str, user: dict[str, Any], ad_id: str) -> float:
    """p(click) of one ad among others."""
    others = [other for other in ("1", "50", "2858", "no-such-ad") if other != ad_id]
    answer = await client.rank(user, [*others[:2], ad_id, *others[2:]], options={"model": family})
    assert answer["degraded"] == []
    assert answer["model"]["name"] == family
    found = {ad["ad_id"]: ad["p_click"] for ad in answer["ads"]}
    assert len(found) == len(others) + 1
    return float(found[ad_id])


async def differences(trial: Trial, client: Client, store: RedisStore | None) -> dict[str, float]:
    """The largest of the 200 differences, with each row's state in the store, or else sent along."""
    got: dict[str, list[float]] = {family: [] for family in FAMILIES}
    for row in trial.rows.iter_rows(named=True):
        user: dict[str, Any] = {"id": row["user_id"]}
        features, history = trial.users[row["user_id"]], row["history"]
        if store is None:
            user |= {"features": features, "history": [{"ad_id": ad_id} for ad_id in history]}
        else:
            await store.put_users([(row["user_id"], UserState(features, history, range(len(history))))])
        for family in FAMILIES:
            got[family].append(await scores(client, family, user, row["ad_id"]))
    return {family: float(np.abs(np.array(got[family]) - trial.expected[family]).max()) for family in FAMILIES}


async def test_stored_users_are_scored_as_in_training(trial: Trial, server: Server, store: RedisStore) -> None:
    async with serving(trial, server) as client:
        for family, off in (await differences(trial, client, store)).items():
            assert off < TOLERANCE, family


async def test_sent_histories_are_scored_as_in_training_and_so_are_those_of_ads_that_left(
    trial: Trial, server: Server, store: RedisStore
) -> None:
    candidates = {"1", "50", "2858", *trial.rows["ad_id"]}
    gone = sorted(set(trial.rows["history"].explode().drop_nulls()) - candidates)
    assert len(gone) > 500
    features = {ad.ad_id: ad.features for ad in ads(trial.data)}
    async with serving(trial, server) as client:
        for family, off in (await differences(trial, client, None)).items():
            assert off < TOLERANCE, family

        await store.put_ads(Ad(ad_id, features[ad_id], active=False) for ad_id in gone)
        async with asyncio.timeout(90):
            while await client.metric("adrank_catalogue_ads") != len(features) - len(gone):
                await asyncio.sleep(0.05)
        answer = await client.rank("nobody", [gone[0], "1"])
        assert {ad["ad_id"]: ad.get("known", True) for ad in answer["ads"]} == {gone[0]: False, "1": True}
        for family, off in (await differences(trial, client, store)).items():
            assert off < TOLERANCE, family


async def test_another_state_is_another_score(trial: Trial, server: Server, store: RedisStore) -> None:
    """The comparison can fail: a history without its newest behaviour is off by more than the tolerance."""
    row = trial.rows.row(-1, named=True)
    user = {"id": row["user_id"], "features": trial.users[row["user_id"]]}
    async with serving(trial, server) as client:
        for family in QUICK:  # others need not look at a history
            history = [{"ad_id": ad_id} for ad_id in row["history"]]
            whole = await scores(client, family, {**user, "history": history}, row["ad_id"])
            shorter = await scores(client, family, {**user, "history": history[:-1]}, row["ad_id"])
            assert abs(whole - trial.expected[family][-1]) < TOLERANCE < abs(shorter - trial.expected[family][-1])
