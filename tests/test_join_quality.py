"""Calibration, entropy and drift of the newest impressions, as numbers and on the joiner's live page."""

import urllib.request
from collections.abc import Iterator

import bundles
import numpy as np
import polars as pl
import pytest
import small
from conftest import free_port
from joining import T0, Joining, Writer, click, conversion, ranking

from features.bundle import load_bundle
from features.streams import FIGURES_BYTES
from service.store.redis import RedisStore
from service.telemetry.metrics import JoinMetrics
from training.datasets.vocabularies import learn_vocabularies
from training.evaluate import measure
from training.join import quality as join_quality
from training.join.figures import figures_in, thinned
from training.join.quality import OTHER, Window, Windows
from training.retrain.drift import LEAST_ROWS, REFERENCE, make_reference

pytestmark = pytest.mark.anyio


def log_rows(p, label, position=None, model="din", version=1, **columns) -> pl.DataFrame:
    count = len(p)
    base = {"p_click": np.asarray(p, float), "label": np.asarray(label, np.int8), "position": position or [1] * count}
    return pl.DataFrame({**base, "model": [model] * count, "version": [version] * count, **columns})


def test_a_window_tells_what_measuring_its_rows_tells(tmp_path):
    random = np.random.default_rng(1)
    p = random.random(5_000)
    label, position = (random.random(5_000) < p * 0.8).astype(int), random.integers(1, 30, 5_000)
    window = Window(tmp_path)
    for part in np.array_split(np.arange(5_000), 7):
        window.add("din", log_rows(p[part], label[part], position[part].tolist()))
    quality = window.quality()
    expected = measure(label, p, np.zeros(5_000))
    assert quality.calibration == pytest.approx(expected.calibration_ratio)
    assert quality.normalised_entropy == pytest.approx(expected.normalised_entropy)
    assert list(quality.by_place) == [*map(str, range(1, 11)), "more"]
    assert quality.by_place["3"] == pytest.approx(p[position == 3].sum() / label[position == 3].sum())
    assert quality.by_place["more"] == pytest.approx(p[position > 10].sum() / label[position > 10].sum())


def test_a_window_forgets_whole_files_once_the_newer_ones_are_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(join_quality, "IMPRESSIONS", 10)
    window = Window(tmp_path)
    window.add("din", log_rows([0.9] * 6, [1] * 6))
    window.add("din", log_rows([0.5] * 6, [1] * 6))
    assert window.quality().calibration == pytest.approx((0.9 + 0.5) / 2)
    window.add("din", log_rows([0.5] * 4, [1] * 4))
    assert window.quality().calibration == pytest.approx(0.5)


def test_without_clicks_there_is_no_ratio(tmp_path):
    window = Window(tmp_path)
    window.add("din", log_rows([0.1, 0.2], [0, 0]))
    assert np.isnan([window.quality().calibration, window.quality().normalised_entropy, window.quality().by_place["1"]]).all()
    assert window.quality().drift == {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model's bundle with the reference of its data."""
    data = small.data_set(tmp_path_factory.mktemp("data"), rows=(4_000, 100, 100))
    models, vocabularies = tmp_path_factory.mktemp("models"), learn_vocabularies(data)
    files = {"schema.toml": small.SCHEMA, "vocabularies.json": vocabularies.to_json()}
    reference = {REFERENCE: make_reference(data, vocabularies)}
    return data, models, load_bundle(bundles.publish(models, "din", files={n: t.encode() for n, t in files.items()} | reference))


def served_by(bundle, data) -> pl.DataFrame:
    """The train split as if it had been served and logged."""
    frame = next(data.frames("train")).join(data.table("ad"), on="ad_id", how="left")
    return frame.with_columns(position=pl.lit(1), p_click=pl.lit(0.5), model=pl.lit("din"), version=pl.lit(bundle.version))


def test_the_training_data_itself_has_not_drifted_and_a_changed_field_has(trained):
    data, models, bundle = trained
    window = Window(models)
    window.add("din", served_by(bundle, data))
    drift = window.quality().drift
    assert set(drift) >= {"user.age", "ad.ad_id", "history", "ad.price", "user.interests"}
    assert max(drift.values()) < 1e-9
    changed = Window(models)
    changed.add("din", served_by(bundle, data).with_columns(pl.lit("25").alias("user.age"), pl.lit(None, pl.Float64).alias("ad.price")))
    drift = changed.quality().drift
    assert min(drift["user.age"], drift["ad.price"]) > 0.25
    assert max(value for path, value in drift.items() if path not in ("user.age", "ad.price")) < 1e-9


def test_values_that_the_model_does_not_know_count_as_unseen(trained):
    data, models, bundle = trained
    window = Window(models)
    window.add("din", served_by(bundle, data).with_columns(("new" + pl.col("ad_id")).alias("ad_id")))
    assert window.quality().drift["ad.ad_id"] > 5


def test_few_rows_tell_no_drift_and_another_version_begins_anew(trained):
    data, models, bundle = trained
    rows, window = served_by(bundle, data), Window(models)
    window.add("din", rows.head(LEAST_ROWS - 1))
    assert window.quality().drift == {}
    window.add("din", rows.head(1))
    assert window.quality().drift
    window.add("din", rows.with_columns(version=pl.lit(7)))
    assert window.quality().drift == {}
    window.add("din", rows)
    assert window.quality().drift


def test_a_bundle_without_a_reference_tells_no_drift(tmp_path):
    path = bundles.publish(tmp_path, "din")
    window = Window(tmp_path)
    window.add("din", log_rows([0.5] * 2_000, [0, 1] * 1_000, version=int(path.name)))
    assert window.quality().drift == {}


def test_rows_of_models_that_the_repository_lacks_stand_together(repository):
    by_model = Windows(repository).add(
        pl.concat([log_rows([0.1], [1]), log_rows([0.2], [0], model="../x"), log_rows([0.3], [1], model="")])
    )
    assert {name: sums.rows.sum() for name, (sums, _) in by_model.items()} == {"din": 1, OTHER: 2}


def values(page: str) -> Iterator[tuple[str, float]]:
    for line in page.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            yield name, float(value)


async def test_the_live_page_tells_what_was_joined(server, tmp_path, repository):
    streams, joining, metrics, port = Writer(server.url), Joining(server.url, tmp_path / "log", repository), JoinMetrics(), free_port()
    joining.watch = metrics
    streams.add(ranking(), ranking("r2", ad_ids=[f"a{i}" for i in range(12)]), click(), click("r2", "a11"), click("r2", "a11", ts=T0 + 9))
    streams.add(click("unknown"), ranking("r3", model="unheard of"))
    stop = metrics.serve(port)
    try:
        await joining.once(everything=True)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            page = dict(values(answer.read().decode()))
    finally:
        stop()
    assert page['adrank_join_rankings_total{model="din"}'] == 2
    assert page['adrank_join_rankings_total{model="_other"}'] == 1
    assert page['adrank_join_impressions_total{model="din"}'] == 15
    assert page['adrank_join_events_total{outcome="joined",type="click"}'] == 3
    assert page['adrank_join_events_total{outcome="unknown_request",type="click"}'] == 1
    assert page['adrank_p_click_sum_total{model="din",position="1"}'] == pytest.approx(1.0)
    assert page['adrank_clicks_total{model="din",position="1"}'] == 1
    assert page['adrank_clicks_total{model="din",position="more"}'] == 1
    total = sum(0.5 / (i + 1) for i in range(3)) + sum(0.5 / (i + 1) for i in range(12))
    assert page['adrank_calibration_ratio{model="din"}'] == pytest.approx(total / 2, abs=1e-5)
    assert page['adrank_position_calibration_ratio{model="din",position="1"}'] == pytest.approx(1.0)
    assert page['adrank_normalised_entropy{model="din"}'] > 0
    assert page['adrank_join_backlog{stream="adrank:events"}'] == 0
    assert page['adrank_join_lag_seconds{stream="adrank:served"}'] == 0
    assert not [name for name in page if "drift" in name]

    await joining.once(everything=True)  # another joiner, which has counted nothing, goes on with what this one told
    store = RedisStore(server.url, timeout=5, ttl=100, on_damaged=lambda: None)
    first, second = figures_in(await store.figures())
    await store.close()
    assert first["models"]["din"]["calibration"] == pytest.approx(total / 2, abs=1e-5)
    assert (first["models"]["din"]["places"]["1"], first["models"]["din"]["places"]["2"]) == (1.0, None)
    assert (first["event click"], first["shown"]) == ({"joined": 3, "unknown_request": 1}, {"said": 3})
    assert first["stream adrank:events"] == {"backlog": 0, "lag": 0}
    assert (second["models"], second["shown"]) == ({}, {})


@pytest.mark.parametrize(("width", "kept"), [(1, 240), (20_000, 26)])
def test_what_is_told_is_bounded_and_the_newest_and_the_oldest_stay(width, kept):
    told = list[dict[str, object]]()
    for ts in range(1_000):
        told.append({"ts": ts, "text": "x" * width})
        text = thinned(told)
        assert len(text) <= FIGURES_BYTES
    times = [each["ts"] for each in figures_in(text)]
    assert kept / 3 < len(times) <= kept
    assert (times[0], times[-5:], times) == (0, [995, 996, 997, 998, 999], sorted(times))


@pytest.mark.parametrize("text", [b"", b"{}", b"[1, null]", b"[{", b"[" * 100_000])
def test_what_is_no_figures_is_told_anew(text):
    assert figures_in(text) == []


def test_fields_that_are_told_no_more_leave_the_page():
    metrics = JoinMetrics()
    metrics.drift("din", {"user.age": 0.3, "ad.genre": 0.1})
    metrics.drift("din", {"user.age": 0.2})
    found = {tuple(s.labels.values()): s.value for m in metrics.registry.collect() if m.name == "adrank_field_drift_psi" for s in m.samples}
    assert found == {("din", "user.age"): 0.2}


async def test_conversions_are_told_beside_what_was_expected_once_all_are_known(server, tmp_path, repository):
    streams, joining = Writer(server.url), Joining(server.url, tmp_path / "log", repository, conversion_window=4000.0)
    streams.add(ranking(ad_ids=("a1", "a2"), p_conversion=[0.25, 0.125]), ranking("r2", ad_ids=("a3",)), conversion(ts=T0 + 3000))
    joining.at = T0 + 1860 + 10
    await joining.once()
    assert "converted din" not in joining.counts
    for joining.at in (T0 + 4060 + 20, T0 + 4060 + 40):  # the second has nothing new
        await joining.once()
    counts = joining.counts
    assert [counts[f"{what} din"] for what in ("converted", "conversions", "p_conversion")] == [2, 1, 0.375]
    assert joining.rows()["p_conversion"].to_list() == [0.25, 0.125, None]
    metrics = JoinMetrics()
    metrics.converted("din", 2, 1, 0.375)
    assert metrics.registry.get_sample_value("adrank_p_conversion_sum_total", {"model": "din"}) == 0.375
