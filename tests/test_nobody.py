"""What means missing, nobody and padding means so on both sides: in a prepared log, in its metrics, in a request and in the store."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from features.encode import Encoder, Request, encode_request
from features.events import Event
from features.schema import Schema, parse_schema
from features.state import MemoryStore, UserState
from features.values import plain, plain_all
from features.vocabulary import fingerprint
from service.feedback.ingest import Ages, Intake
from service.ranking.query import Query
from service.ranking.ranker import _usable
from service.telemetry.metrics import Metrics
from tests.test_datasets import patient, rows
from tests.test_plausible import HISTORY, SCHEMA, ZEROS, line, prepare
from training.datasets.ads import ad_table
from training.datasets.encoded import encode_split
from training.datasets.prepared import Prepared, open_prepared
from training.datasets.states import user_states
from training.datasets.vocabularies import learn_vocabularies
from training.evaluate import gauc

SETTINGS = f'missing = ["NULL", "-1"]\nnobody = "{ZEROS}"\nhistory = "past"\npadding = "0"\n'


def learned(folder: Path, table: str) -> tuple[Prepared, Encoder]:
    prepare(folder, table, SETTINGS, SCHEMA + HISTORY)
    data = open_prepared(folder / "out")
    return data, Encoder(data.schema, learn_vocabularies(data))


cells = st.sampled_from(["NULL", "-1", "ios", "0", ZEROS, "-1.0", "a1"])


@settings(patient, max_examples=15, phases=[Phase.generate])  # to shrink such a log takes minutes
@given(st.lists(st.tuples(cells, cells, st.sampled_from([-1, -1.0, 0.5, 2]), cells, cells), min_size=10, max_size=20))
def test_a_request_with_the_cells_of_a_row_encodes_as_the_row(tmp_path_factory: pytest.TempPathFactory, log) -> None:
    folder = tmp_path_factory.mktemp("log")
    table = "".join(
        line(i, user=user, os=os, price=price, topics=f"{topic}|x", past=f"0|{past}|a2|0")
        for i, (user, os, price, topic, past) in enumerate(log)
    )
    data, encoder = learned(folder, table)
    encoded = encode_split(data, "train", encoder)
    for i, (user, os, price, topic, past) in enumerate(log[: len(encoded)]):
        sent = {0: {"price": price, "topics": [topic, "x"]}}
        request = Request(plain(user), {}, {"os": os}, plain_all(["0", past, "a2", "0"]), [f"a{i % 7}"], sent)
        feeds, _ = encode_request(ad_table(data, encoder), request)
        user_part, history, ad, _ = encoded.batch(np.array([i]))
        assert feeds["user_ids"].tolist() == user_part.ids.tolist()
        assert feeds["ad_ids"].tolist() == ad.ids.tolist()
        assert feeds["ad_numbers"].tolist() == ad.numbers.tolist()
        assert feeds["history_ids"][0].tolist() == history.ids[history.rows][0].tolist()


def test_rows_of_nobody_are_no_group(tmp_path: Path) -> None:
    table = "".join(line(i, user=ZEROS if i % 2 else "u", click=i % 3 == 0) for i in range(40)).replace("True", "1").replace("False", "0")
    data, encoder = learned(tmp_path, table)
    encoded = encode_split(data, "train", encoder)
    assert len(np.unique(encoded.users)) == 1 + len(encoded) // 2
    p = np.random.default_rng(0).random(len(encoded))
    known = np.arange(len(encoded)) % 2 == 0
    assert gauc(encoded.labels, p, encoded.users) == gauc(encoded.labels[known], p[known], encoded.users[known])


def test_a_log_that_holds_the_ids_of_nobody_is_read_as_one_that_holds_none(tmp_path: Path) -> None:
    data, _ = learned(tmp_path, "".join(line(i, user=ZEROS if i % 2 else "u") for i in range(40)))
    for path in (tmp_path / "out").glob("*/*.parquet"):
        frame = pl.read_parquet(path)
        frame.with_columns(user_id=pl.when(pl.col("user_id") == "").then(pl.lit(ZEROS)).otherwise(pl.col("user_id"))).write_parquet(path)
    assert set(rows(tmp_path / "out")["user_id"]) == {"u", ""}
    assert [user for user, _ in user_states(data)] == ["u"]
    assert learn_vocabularies(data).categories["user_id"].values == ("u",)


def test_a_blank_user_is_no_value(tmp_path: Path) -> None:
    prepare(tmp_path, "".join(line(i, user="" if i % 2 else "u") for i in range(40)))
    assert learn_vocabularies(open_prepared(tmp_path / "out")).categories["user_id"].values == ("u",)


def with_nobody() -> Schema:
    return parse_schema(
        f'nobody = ["{ZEROS}"]\n{SCHEMA}{HISTORY}'.replace('\nname = "shop"', "").replace("nobody", 'name = "shop"\nnobody', 1)
    )


def test_what_is_stored_of_nobody_is_not_used(tmp_path: Path) -> None:
    encoder = Encoder(with_nobody(), learned(tmp_path, "".join(line(i) for i in range(20)))[1].vocabularies)
    model, stored = SimpleNamespace(bundle=SimpleNamespace(encoder=encoder)), UserState({}, ["a1"], [1])
    assert _usable(model, Query(user_id="u", ad_ids=["a1"]), stored, []).ad_ids == ["a1"]
    assert list(_usable(model, Query(user_id=ZEROS, ad_ids=["a1"]), stored, []).ad_ids) == []


@pytest.mark.anyio
async def test_events_of_nobody_are_joined_and_nothing_is_kept_of_them() -> None:
    store, encoder = MemoryStore(), SimpleNamespace(schema=with_nobody(), tallies=[])
    intake = Intake(store, Metrics(), lambda: [encoder], Ages(1e6, 1e6))
    events = [
        Event("click", "1", time.time(), user_id=ZEROS, ad_id="a1", request_id="r"),
        Event("click", "2", time.time(), user_id=ZEROS, ad_id="a1"),
        Event("user", "3", time.time(), user_id=ZEROS, features={"age": "25"}),
        Event("click", "4", time.time(), user_id="u", ad_id="a1"),
    ]
    outcomes = await intake.take(events)
    assert [outcome.reason or outcome.status for outcome in outcomes] == ["accepted", "nobody", "nobody", "accepted"]
    assert [outcome.status for outcome in await intake.take(events[:1])] == ["duplicate"]
    assert await store.get_user(ZEROS) is None
    assert (await store.get_user("u")).ad_ids == ["a1"]


def test_fingerprints_cover_what_means_missing_and_are_as_they_were_without(tmp_path: Path) -> None:
    _, encoder = learned(tmp_path, "".join(line(i) for i in range(20)))
    texts = [
        SCHEMA + HISTORY,
        SCHEMA.replace("[context.os]", '[context.os]\nmissing_values = ["NULL"]') + HISTORY,
        SCHEMA + HISTORY + 'padding = ["0"]\n',
        with_nobody().to_toml(),
    ]
    assert len({fingerprint(parse_schema(text), encoder.vocabularies) for text in texts}) == len(texts)
    assert all(parse_schema(parse_schema(text).to_toml()) == parse_schema(text) for text in texts)
    assert not any(name in parse_schema(texts[0]).canonical() for name in ("missing_values", "nobody", 'padding":'))
