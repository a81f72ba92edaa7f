"""The score that the service returns is the score that training's own evaluation gives the same row, on real rows of ML-1M."""

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
from training.fit import predict
from training.networks import NETWORKS
from training.networks.contract import CLICK
from training.train import Trained

SOURCE = Path(__file__).parent.parent.parent / "shared" / "data" / "ml-1m"
pytestmark = pytest.mark.anyio
TOLERANCE = 1e-5
"""Both sides encode with the same code and compute in float32, torch there and ONNX Runtime here, with sums in another order: that
comes to about 1e-7. A wrong id, or a history off by one, moves a probability by 1e-3 and more."""
QUICK = ("deepfm", "din")
ASKED = os.environ.get("NETWORKS", " ".join(QUICK)).replace("all", " ".join(NETWORKS))
FAMILIES = tuple(family for family in ASKED.split() if NETWORKS[family].own_heads == (CLICK,))
"""Two in every run; `make parity-test` has all that learn from clicks alone."""


@dataclass(frozen=True)
class Trial:
    """Rows of the test split, each with its user's features; two models that were trained, and what each says of the rows."""

    data: Prepared
    rows: pl.DataFrame
    others: tuple[str, ...]
    models: Path
    expected: dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module", params=["made", "movielens"])
def trial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """By the exporter where all networks are asked for: some have what its quick stand-in does not take."""
    request.getfixturevalue("unexplained" if "NETWORKS" in os.environ else "traced_export")
    folder = tmp_path_factory.mktemp("parity")
    (folder / "data").mkdir()
    data, rows, others = {"made": _made, "movielens": _movielens}[request.param](folder)
    expected = {}
    for family in FAMILIES:
        epochs = 40 if family == "deeplight" else 1  # it is pruned for 800 steps, of which an epoch here has 24
        trained = small.quick(data, family, epochs=epochs, batch=len(next(data.frames("train"))) // 24, learning_rate=0.01)
        export(data, trained, folder / "models", family, small.quiet())
        expected[family] = _of_training(data, trained)
    return Trial(data, rows, others, folder / "models", expected)


def _made(folder: Path) -> tuple[Prepared, pl.DataFrame, tuple[str, ...]]:
    """60 rows with a field of every kind, and values that are missing or unknown; four ads are in histories alone."""
    data = small.data_set(folder / "data", (2_400, 100, 120))
    rows = next(data.frames("test")).filter(~pl.col("ad_id").is_in(["a8", "a9", "a10", "a11"])).head(60)
    rows.write_parquet(folder / "data" / "test" / "0.parquet")
    return data, rows, ("a1", "a5", "a0", "no-such-ad")


def _movielens(folder: Path) -> tuple[Prepared, pl.DataFrame, tuple[str, ...]]:
    if not SOURCE.is_dir():
        pytest.skip(f"a set of public data is not in {SOURCE}")
    movielens.prepare(_some(folder / "source"), folder / "whole")
    data, rows = _part(open_prepared(folder / "whole"), folder / "data")
    users = data.table("user")
    return data, rows.join(users, "user_id", "left", maintain_order="left"), ("1", "50", "2858", "no-such-ad")


def _some(folder: Path) -> Path:
    """The source with the ratings of every fourth user."""
    shutil.copytree(SOURCE, folder)
    (folder / "ratings.dat").chmod(0o644)
    ratings = (SOURCE / "ratings.dat").read_text().splitlines(keepends=True)
    (folder / "ratings.dat").write_text("".join(line for line in ratings if int(line.partition("::")[0]) % 4 == 0))
    return folder


def _part(whole: Prepared, out: Path) -> tuple[Prepared, pl.DataFrame]:
    """A few of the train and valid rows, to be quick, and 80 rows of test: of empty, short and full histories, and of new users."""
    write_tables(out, whole.schema, whole.table("ad"), whole.table("user"))
    train = next(whole.frames("train")).sample(12_000, seed=1)
    test = pl.concat(whole.frames("test"))
    length, new = pl.col("history").list.len(), ~pl.col("user_id").is_in(train["user_id"].unique().to_list())
    kinds = ((length == 0, 10), (length.is_between(1, 49) & new, 20), (length.is_between(1, 49) & ~new, 20), (length == 50, 30))
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
    longest, lengths = trial.data.schema.history_length, trial.rows["history"].list.len()
    assert lengths.min() == 0 < longest <= lengths.max()
    assert len(set(lengths)) > 4
    for p_click in trial.expected.values():
        assert p_click.std() > 0.01
        assert len(np.unique(p_click.round(6))) > 0.75 * len(p_click)


@pytest.fixture
async def store(server: Server, trial: Trial) -> AsyncIterator[RedisStore]:
    """A real Valkey with the ads."""
    store = RedisStore(server.url, timeout=10, ttl=1000, on_damaged=lambda: None)
    await store.put_ads(ads(trial.data))
    yield store
    await store.close()


@asynccontextmanager
async def serving(trial: Trial, server: Server) -> AsyncIterator[Client]:
    settings = Settings(models=trial.models, redis=server.url, store_timeout_ms=10_000)
    async with running(settings) as client:
        yield client


async def scores(trial: Trial, client: Client, family: str, row: dict[str, Any], user: dict[str, Any]) -> float:
    """p(click) of a row's ad among others."""
    context = {name[8:]: value for name, value in row.items() if name.startswith("context.")}
    others = [other for other in trial.others if other != row["ad_id"]]
    ranked = [*others[:2], row["ad_id"], *others[2:]]
    answer = await client.rank({"id": row["user_id"], **user}, ranked, context=context, options={"model": family})
    assert (answer["degraded"], answer["model"]["name"]) == ([], family)
    found = {ad["ad_id"]: ad["p_click"] for ad in answer["ads"]}
    assert len(found) == len(ranked)
    return float(found[row["ad_id"]])


def state_of(row: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A row's user: features and history."""
    return {name[5:]: value for name, value in row.items() if name.startswith("user.") and value is not None}, row["history"]


def sent(features: dict[str, Any], history: list[str]) -> dict[str, Any]:
    return {"features": features, "history": [{"ad_id": ad_id} for ad_id in history]}


async def check_all(trial: Trial, client: Client, store: RedisStore | None) -> None:
    """Every row has the score of training, with its user's state in the store, or else sent along."""
    got: dict[str, list[float]] = {family: [] for family in FAMILIES}
    for row in trial.rows.iter_rows(named=True):
        features, history = state_of(row)
        if store:
            await store.put_users([(row["user_id"], UserState(features, history, range(len(history))))])
        for family in FAMILIES:
            got[family].append(await scores(trial, client, family, row, {} if store else sent(features, history)))
    for family in FAMILIES:
        assert np.abs(np.array(got[family]) - trial.expected[family]).max() < TOLERANCE, family


async def test_users_are_scored_as_in_training_stored_or_sent_and_so_are_histories_of_ads_that_left(
    trial: Trial, server: Server, store: RedisStore
) -> None:
    features = {ad.ad_id: ad.features for ad in ads(trial.data)}
    gone = sorted({*trial.rows["history"].explode()} & features.keys() - {*trial.others, *trial.rows["ad_id"]})
    assert len(gone) >= 4
    async with serving(trial, server) as client:
        await check_all(trial, client, store)
        await check_all(trial, client, None)
        await store.put_ads(Ad(ad_id, features[ad_id], active=False) for ad_id in gone)
        await client.until("/readyz", lambda said: said["catalogue"]["ads"] == len(features) - len(gone))
        answer = await client.rank("nobody", [gone[0], trial.others[0]])
        assert {ad["ad_id"]: ad.get("known", True) for ad in answer["ads"]} == {gone[0]: False, trial.others[0]: True}
        await check_all(trial, client, store)


async def test_another_state_is_another_score(trial: Trial, server: Server, store: RedisStore) -> None:
    """The comparison can fail: a history without its newest behaviour is off by more than the tolerance."""
    at = next(i for i in reversed(range(len(trial.rows))) if len(trial.rows["history"][i]) > 2)
    row = trial.rows.row(at, named=True)
    features, history = state_of(row)
    async with serving(trial, server) as client:
        for family in QUICK:  # others need not look at a history
            whole, shorter = [await scores(trial, client, family, row, sent(features, past)) for past in (history, history[:-1])]
            assert abs(whole - trial.expected[family][at]) < TOLERANCE < abs(shorter - trial.expected[family][at])
