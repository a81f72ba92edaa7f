"""Networks that are given ages, and that an age that was served is the age that they are trained on."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import logs
import numpy as np
import onnxruntime
import polars as pl
import pytest
import small
import torch

from features.schema import parse_schema
from features.served import pack_served, unpack_served
from features.state import Ad, MemoryStore, UserState
from features.streams import SERVED, Entry
from service.catalogue.catalogue import Catalogue
from service.feedback.impression_log import ServedLog, served
from service.ranking.executor import Inline
from service.ranking.query import Query, Ranking
from service.ranking.ranker import Ranker
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.test_ages import NOW, SCHEMA, data_set
from training.calibrate import Calibration
from training.datasets.encoded import encode_split
from training.datasets.log import open_log
from training.datasets.prepared import Prepared
from training.datasets.states import ads
from training.export.export import ServedNetwork, export, random_feeds, score, scores_of, to_onnx
from training.export.graph import feeds_of
from training.join.raw import LogColumns, impressions_of
from training.networks import NETWORKS
from training.networks.ages import BUCKETS, AgeVectors
from training.networks.contract import Fields, Network, RequestTensors
from training.skew import find_skew

AGED = ("dien", "bst")
"""The networks that look at ages."""
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


# --- the networks


def request(requests: int = 3, candidates: int = 5) -> RequestTensors:
    random = torch.Generator().manual_seed(3)
    user, history, ad = small.parts(SCHEMA, requests=requests, candidates=candidates)
    ages = (2 ** (torch.rand(requests, 4, generator=random) * 30)).floor()
    return RequestTensors(user, history, ad, ages * history.behaviours())


def test_ages_fall_into_buckets_of_powers_of_two() -> None:
    block = AgeVectors(3)
    ages = torch.tensor([[0, 0.5, 1, 1.9, 2, 3, 4, 3600, 2**29, 2**30, 1.8e9]])
    assert block.buckets(ages)[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 12, 30, 31, 31]
    assert torch.equal(block(ages)[0, 7], block.table.weight[12])
    assert len(block.table.weight) == BUCKETS


@pytest.mark.parametrize("family", NETWORKS)
def test_every_network_takes_requests_with_ages(family: str) -> None:
    network, asked = small.network(family, SCHEMA), request()
    with torch.no_grad():
        logits = network(asked)["click"]
        older = network(asked._replace(ages=asked.ages * 64))["click"]
        padded = asked._replace(ages=torch.where(asked.history.behaviours(), asked.ages, 5e6))
        assert torch.allclose(network(padded)["click"], logits, **CLOSE)
    assert bool(((older - logits).abs().amax() > 1e-2) == (family in AGED))


@pytest.mark.parametrize("family", AGED)
def test_the_vectors_of_ages_are_trained(family: str) -> None:
    network, asked = small.network(family, SCHEMA).train(), request(24, 1)
    network(asked)["click"].square().sum().backward()
    assert network.ages.table.weight.grad.abs().sum() > 0


def test_with_ages_the_order_of_a_bst_does_not_count_but_time_does() -> None:
    network, asked = small.network("bst", SCHEMA), request().first(2)
    turned = asked._replace(history=small.Part(asked.history.ids.flip(1), asked.history.numbers.flip(1)))
    with torch.no_grad():
        logits = network(asked)["click"]
        assert torch.allclose(network(turned._replace(ages=asked.ages.flip(1)))["click"], logits, **CLOSE)
        assert (network(turned)["click"] - logits).abs().amax() > 1e-2


def test_an_exported_network_gives_what_torch_gives_of_ages() -> None:
    ours = ServedNetwork(small.network("bst", SCHEMA), Calibration(0.3, -0.2), parse_schema(SCHEMA)).eval()
    session = onnxruntime.InferenceSession(to_onnx(ours), providers=["CPUExecutionProvider"])
    inputs = {entry.name: entry.shape for entry in session.get_inputs()}
    assert len(inputs["history_ages"]) == 2
    for requests, behaviours, candidates in ((1, 1, 1), (2, 9, 3)):
        feeds = random_feeds(parse_schema(SCHEMA), {}, requests, behaviours, candidates, seed=behaviours)
        feeds["history_ages"][0, 0] = 2.0**20  # the edge of a bucket
        assert np.abs(session.run(["p_click"], feeds)[0] - score(ours, feeds)).max() < 1e-5


# --- from the service's clock to training


@pytest.fixture(scope="module")
def trained(traced_export: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Path]:
    """A data set and the repository of a BST that was trained on it."""
    folder = tmp_path_factory.mktemp("ages")
    (folder / "data").mkdir()
    data = data_set(folder / "data")
    export(data, small.quick(data, "bst", embedding_l2=0.0), folder / "models", "bst", small.quiet())
    return data, folder / "models"


async def ranked(data: Prepared, repository: Path, sent: bool) -> list[Ranking]:
    """Each test row as a request at its time, with the history in the store or sent along."""
    models, metrics, store, now = bundles.loaded(Settings(models=repository)), Metrics(), MemoryStore(), [0.0]
    bundle = models.loaded["bst"].bundle
    catalogue = Catalogue(store, {bundle.fingerprint: bundle.encoder}, metrics)
    await store.put_ads(Ad(ad.ad_id, ad.features) for ad in ads(data))
    await catalogue.load()
    ranker, made = Ranker(store, metrics, Inline(), clock=lambda: now[0]), list[Ranking]()
    ranker.use(models, catalogue)
    for number, row in enumerate(next(data.frames("test")).iter_rows(named=True)):
        now[0] = row["ts"] + 0.75
        times = [0 if ts is None else ts for ts in row["history_ts"]]
        features = {name: row[f"user.{name}"] for name in ("age", "interests", "income") if row[f"user.{name}"] is not None}
        asked = Query(
            user_id=row["user_id"], context={"slot": row["context.slot"]}, ad_ids=[row["ad_id"], "a5"][: 1 + (row["ad_id"] != "a5")]
        )
        asked.request_id = f"r{number}"
        if sent:
            asked.user, asked.history, asked.history_ts = features, row["history"], times
        else:
            await store.put_users([(row["user_id"], UserState(features, row["history"], times))])
        made.append(await ranker.rank(asked, metrics.begin("/rank")))
    ranker.close()
    return made


def score_of(ranking: Ranking, ad_id: str) -> float:
    return dict(zip(ranking.ad_ids, ranking.p_click, strict=True))[ad_id]


@pytest.mark.parametrize("sent", [False, True], ids=["stored", "sent"])
def test_a_row_is_ranked_as_it_is_evaluated(trained: tuple[Prepared, Path], sent: bool) -> None:
    data, repository = trained
    bundle = bundles.loaded(Settings(models=repository)).loaded["bst"].bundle
    rows, scored = scores_of(bundle, data, "test", small.quiet())
    made = asyncio.run(ranked(data, repository, sent))
    off = [abs(score_of(each, row) - p) for each, row, p in zip(made, next(data.frames("test"))["ad_id"], scored["click"], strict=True)]
    assert max(off) < 1e-5
    assert rows.ages is not None
    older = replace(rows, ages=rows.ages * 64)  # the ages matter
    assert not np.allclose(session_scores(bundle, older), scored["click"], atol=1e-3)


def session_scores(bundle: Any, rows: Any) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(bundle.path / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(["p_click"], feeds_of(bundle.schema, rows, np.arange(len(rows))))[0][:, 0]


def test_an_age_that_was_served_is_the_age_that_is_trained_on(trained: tuple[Prepared, Path], tmp_path: Path) -> None:
    data, repository = trained
    made = asyncio.run(ranked(data, repository, sent=False))
    records = [unpack_served(pack_served(served(each, each.encoded.request.ts, 10, with_tensors=True))) for each in made]
    encoder = made[0].model.bundle.encoder
    for each, record in zip(made, records, strict=True):
        assert np.array_equal(record.feeds(encoder)["history_ages"], each.encoded.feeds["history_ages"])
    entries = [Entry("1-1", pack_served(replace(record, positions=[]))) for record in records]
    written = pl.concat(impressions_of(entries, SERVED, LogColumns(encoder.schema)).frames.values())
    assert written["tensors.history_ages"].to_list()[0] == made[0].encoded.feeds["history_ages"][0].tolist()
    log = open_log(logs.write_log(tmp_path / "log", records, encoder.schema), shares=(1, 0, 0))
    (frame,) = log.between(-np.inf, np.inf, ["request_id"])
    for path in (tmp_path / "log").rglob("hour=*/*.parquet"):  # the joiner's own times in place of those of the tests' log
        own = pl.read_parquet(path).drop("history_ts", "ts")
        times = written.select("request_id", "history_ts", "ts").unique("request_id")
        own.join(times, on="request_id", maintain_order="left").write_parquet(path)
    log = open_log(tmp_path / "log", shares=(1, 0, 0))
    (frame,) = log.between(-np.inf, np.inf, ["request_id"])
    rows, of = encode_split(log, "train", encoder), {record.request_id: each for record, each in zip(records, made, strict=True)}
    assert rows.ages is not None
    for i, request_id in enumerate(frame["request_id"]):
        given = of[request_id].encoded.feeds["history_ages"][0]
        assert rows.ages[i, : len(given)].tolist() == given.tolist()
    skew = find_skew(log, repository)
    assert not skew.found
    assert skew.fields["history_ts"].rows == len(frame)


def test_a_record_is_of_the_time_that_ages_were_counted_from(trained: tuple[Prepared, Path]) -> None:
    made = asyncio.run(ranked(*trained, sent=False))[:3]

    async def logged() -> list[float]:
        store = MemoryStore()
        log = ServedLog(store, Metrics(), Settings(log_share=1.0), lambda: 0.5)
        log.start()
        for each in made:
            log.put(each)
        await log.close()
        return [unpack_served(record).ts for record in store.served]

    assert asyncio.run(logged()) == [each.encoded.request.ts for each in made]
    assert made[0].encoded.request.ts == NOW + 0.75


def test_fields_know_of_ages() -> None:
    assert Fields.of(parse_schema(SCHEMA), small.vocabularies(SCHEMA)).ages
    assert not Fields.of(small.schema(), small.vocabularies()).ages
    assert isinstance(small.network("bst", SCHEMA), Network)
