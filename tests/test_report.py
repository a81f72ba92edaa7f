"""The report of a training: its numbers against scikit-learn, scipy and plain Python, and a page in which everything is text."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import small
import small_log
from markupsafe import escape
from matplotlib.figure import Figure
from playwright.sync_api import sync_playwright
from scipy.stats import binomtest
from sklearn import metrics as sklearn

from benchmarks.console import CHROMIUM, FLAGS
from tests.test_cli import refused, run
from training.datasets.log import open_log
from training.datasets.prepared import Prepared, open_prepared
from training.fit import predict
from training.position import Curve
from training.report import charts, files
from training.report.files import report_files, tell_verdict
from training.report.numbers import by_user, findings, moments, thinned, timings, worst
from training.report.page import page
from training.retrain.drift import make_reference
from training.train import Trained

HOSTILE = "<img src=x onerror=alert(1)>{{ 7 * 7 }}$\\frac$"


class Seen(HTMLParser):
    """A page's tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text = list[tuple[str, dict[str, str | None]]](), ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Trained, Any]:
    """A log that kept half of its non-clicks, with hostile values and users who can be told; its training, and train by field."""
    folder = tmp_path_factory.mktemp("report")
    small.data_set(folder, (400, 150, 400))
    ads = pl.read_parquet(folder / "ads.parquet").with_columns(pl.col("ad.genre").replace("news", HOSTILE))
    ads.write_parquet(folder / "ads.parquet")
    for i, path in enumerate(sorted(folder.glob("*/*.parquet"))):
        frame = pl.read_parquet(path)
        slot = pl.when(pl.col("context.slot") == "side").then(pl.lit(HOSTILE)).otherwise(pl.col("context.slot"))
        named = frame.with_columns(slot.alias("context.slot"), user_id="person-" + pl.col("user_id"))
        age = (
            pl.when(pl.col("user.age") == "25").then(pl.lit("new")).otherwise(pl.col("user.age"))
            if "test" in str(path)
            else pl.col("user.age")
        )
        named.with_columns(age, ts=pl.int_range(len(frame)) * 60 + i * 86_400).write_parquet(path)
    (folder / "data.toml").write_text("negative_sampling = 0.5\n")
    data = open_prepared(folder)
    curve = Curve.of(np.array([0.2, 0.1]), np.full(2, 0.1), np.full(2, 200.0))
    trained = replace(small.quick(data, "deepfm", epochs=3), examination=curve)
    return data, trained, json.loads(make_reference(data, trained.encoder.vocabularies))


@pytest.fixture(scope="module")
def found(made: Any) -> dict[str, Any]:
    return findings(*made, small.quiet())


def rows_of(made: Any) -> tuple[pl.DataFrame, np.ndarray, np.ndarray]:
    """The test split as it is on disk, its labels, and p(click)."""
    data, trained, _ = made
    raw = pl.read_parquet(data.folder / "test" / "0.parquet")
    return raw, raw["label"].to_numpy(), trained.calibration.on_log(predict(trained.network, trained.held_out))


def test_curves_bins_and_segments_are_scikit_learns_and_scipys(made: Any, found: dict[str, Any]) -> None:
    raw, labels, p = rows_of(made)
    for name, area in (
        ("roc", sklearn.roc_auc_score(labels, p)),
        ("precision_recall", sklearn.auc(*sklearn.precision_recall_curve(labels, p)[1::-1])),
    ):
        x, y = np.array(found[name]).T
        assert np.trapezoid(y, x) == pytest.approx(area, abs=0.01), name
    assert found["metrics"]["test"]["auc"] == pytest.approx(sklearn.roc_auc_score(labels, p))
    assert sum(each["rows"] for each in found["reliability"]) == 400
    for each in found["reliability"]:
        exact = binomtest(round(each["rate"] * each["rows"]), round(each["rows"])).proportion_ci(0.95, "exact")
        assert (each["low"], each["high"]) == pytest.approx((exact.low, exact.high))
    assert found["segments"]["field"] == "context.slot"
    assert {each["value"] for each in found["segments"]["values"]} == {"feed", HOSTILE}
    for each in found["segments"]["values"]:
        some = (raw["context.slot"] == each["value"]).to_numpy()
        expected = (int(some.sum()), labels[some].mean(), p[some].mean(), sklearn.roc_auc_score(labels[some], p[some]))
        assert (each["rows"], each["rate"], each["p"], each["auc"]) == pytest.approx(expected)


def test_what_is_found_by_user_is_what_scikit_learn_finds_user_by_user(made: Any, found: dict[str, Any]) -> None:
    raw, labels, p = rows_of(made)
    of_users = [np.flatnonzero(raw["user_id"] == user) for user in raw["user_id"].unique()]
    random = np.random.default_rng(0)
    assert [each["k"] for each in found["users"]] == [1, 5, 10]
    for each in found["users"]:
        k, some = each["k"], [rows for rows in of_users if len(rows) > each["k"] and len(set(labels[rows])) == 2]
        tops = [labels[rows[np.argsort(-p[rows])[:k]]] for rows in some]
        assert (each["users"], each["hr"]) == (len(some), pytest.approx(np.mean([top.any() for top in tops])))
        gains = [sklearn.ndcg_score(labels[rows][None], p[rows][None], k=k) for rows in some if k < len(rows)]
        assert each["ndcg"] == pytest.approx(np.mean(gains))
        drawn = [labels[random.permutation(rows)[:k]].any() for rows in some for _ in range(100)]
        assert each["chance_hr"] == pytest.approx(np.mean(drawn), abs=0.05)
    shuffled = [
        sklearn.ndcg_score(labels[rows][None], random.permutation(len(rows))[None], k=5) for rows in of_users[:2] for _ in range(100)
    ]
    two = np.concatenate(of_users[:2])
    alone = by_user(labels[two], p[two], np.repeat([0, 1], [*map(len, of_users[:2])]))
    assert alone[1]["chance_ndcg"] == pytest.approx(np.mean(shuffled), abs=0.05)


def test_of_equal_scores_no_click_comes_first_by_luck() -> None:
    [one] = by_user(np.array([1.0, 0.0, 0.0]), np.full(3, 0.5), np.zeros(3, np.int64))
    assert (one["k"], one["users"], one["hr"], one["ndcg"]) == (1, 1, 0.0, 0.0)
    assert (one["chance_hr"], one["chance_ndcg"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert by_user(np.array([1.0, 0.0]), np.array([0.1, 0.2]), np.array([0, 1])) == []  # a row each
    assert thinned(np.zeros(0), np.zeros(0)) == []


def test_the_worst_rows_the_times_and_the_fields_are_those_of_the_files(made: Any, found: dict[str, Any]) -> None:
    data = made[0]
    raw, labels, p = rows_of(made)
    losses = -np.where(labels > 0, np.log(p), np.log1p(-p))
    highest = np.argsort(-losses)[:10]
    assert [each["loss"] for each in found["worst"]] == pytest.approx(losses[highest].tolist())
    assert [each["ad_id"] for each in found["worst"]] == raw["ad_id"].to_numpy()[highest].tolist()
    assert all(set(each["features"]) <= {"context.slot", "ad.genre", "ad.tags", "ad.price"} for each in found["worst"])
    whole = pl.concat([pl.read_parquet(data.folder / split / "0.parquet").select("ts", "label") for split in ("train", "valid", "test")])
    first, last = whole["ts"].min(), whole["ts"].max()
    for each in found["moments"]:
        half = (last - first) / 40 / 2
        here = whole.filter(
            (pl.col("ts") >= each["ts"] - half - 1e-6)
            & ((pl.col("ts") < each["ts"] + half - 1e-6) | (pl.col("ts") == last) & (each["ts"] + half >= last - 1))
        )
        clicks = int(here["label"].sum())
        assert each["rate"] == pytest.approx(clicks / (clicks + 2 * (len(here) - clicks))), each
    fields = {each["field"]: each for each in found["fields"]}
    ages = raw["user.age"]
    missing = (ages.is_null() | (ages == "new")).mean()  # its `missing` is "unknown"
    assert fields["user.age"]["unknown"] == pytest.approx(missing)
    assert fields["ad.price"]["missing"] == pytest.approx(
        (pl.read_parquet(data.folder / "train" / "0.parquet")["ad_id"] == "a0").mean(), abs=0.03
    )
    assert (fields["context.slot"]["values"], fields["user.user_id"]["missing"]) == (4, None)
    assert [each["number"] for each in found["epochs"]] == [1, 2, 3]
    assert found["splits"]["train"]["rows"] == 400


def test_times_are_those_of_the_last_training_with_its_epochs_together() -> None:
    progress = small.quiet()  # which a demo shares by several trainings
    before, ours = {"learning vocabularies": 9, "epoch 1": 9}, {"learning vocabularies": 1, "epoch 1": 2, "epoch 12": 3, "encoding": 4}
    for step, seconds in (*before.items(), *ours.items()):
        task = progress.add_task(step, total=1)
        progress.tasks[task].finished_time = seconds
    assert timings(progress) == {"learning vocabularies": 1, "epochs": 5, "encoding": 4}


def test_the_page_is_text_alone_loads_nothing_and_tells_of_no_user(found: dict[str, Any]) -> None:
    text = page(found)
    seen = Seen(text)
    assert len(text) < 300_000
    assert {"script", "img", "link", "iframe", "object", "base"} & {tag for tag, _ in seen.tags} == set()
    attributes = [(name, value or "") for _, attrs in seen.tags for name, value in attrs.items()]
    assert [name for name, _ in attributes if name.startswith("on") or name in ("src", "href")] == []
    assert all(value.startswith("#") for name, value in attributes if name == "xlink:href")
    assert "url(h" not in text
    assert seen.text.count(HOSTILE) > 1
    assert "person-" not in text
    assert sum(tag == "svg" for tag, _ in seen.tags) >= 8
    assert all(
        part in seen.text
        for part in (
            "Reliability",
            "Examination by place",
            "Learning curve",
            "By context.slot",
            "NDCG@K",
            "Importance",
            "Where it was most wrong",
        )
    )


def test_what_became_of_a_training_is_at_the_top_of_its_page(found: dict[str, Any]) -> None:
    written = {"report.html": page(found).encode()}
    tell_verdict(written, "Not made live", False, ["the first <b>reason</b>", HOSTILE])
    seen, html = Seen(written["report.html"].decode()), written["report.html"].decode()
    assert "Not made livethe first <b>reason</b>" + HOSTILE in seen.text
    assert html.index("<li>") < html.index("<main>")
    assert str(escape(HOSTILE)) in html
    none: dict[str, bytes] = {}
    tell_verdict(none, "Made live", True)
    assert none == {}


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_test_split_of_one_class_has_a_report_with_less_in_it(made: Any, label: float) -> None:
    data, trained, reference = made
    one = replace(trained, held_out=replace(trained.held_out, labels=np.full(400, label, np.float32)))
    told = findings(data, one, reference, small.quiet())
    json.dumps(told, allow_nan=False)
    assert (told["roc"], told["importance"]["fields"], told["users"]) == ([], [], [])
    seen = Seen(page(told))
    assert "Reliability" in seen.text
    assert "ROC" not in seen.text


def test_of_a_log_rows_are_those_of_its_window(tmp_path: Path) -> None:
    log = open_log(small_log.write(tmp_path / "log"), since=small_log.START + 7_200)
    raw = pl.concat(log.frames("test"))
    p = np.random.default_rng(0).uniform(0.01, 0.99, len(raw))
    right = np.where(raw["label"].to_numpy() > 0, p, 1 - p)
    assert [(each["ad_id"], each["p"]) for each in worst(log, raw["label"].to_numpy(), p)] == [
        (raw["ad_id"][i], p[i]) for i in np.argsort(right)[:10].tolist()
    ]
    whole = pl.concat(pl.concat(log.frames(split)) for split in ("train", "valid", "test"))
    found = moments(log)
    assert len(found) == 40
    assert found[0]["ts"] > small_log.START + 7_200
    assert np.mean([each["rate"] for each in found]) == pytest.approx(whole["label"].mean(), abs=0.02)


def test_what_fails_while_it_is_drawn_is_said_and_costs_no_training(made: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    made[1].settings["report"], said = True, small.quiet()
    monkeypatch.setattr(said.console, "quiet", False)
    monkeypatch.setattr(files, "findings", lambda *_: json.loads("no JSON"))
    assert report_files(*made, said) == {}
    assert "there is no report.html, since it cannot be made: JSONDecodeError" in capsys.readouterr().out
    monkeypatch.setitem(made[1].settings, "report", False)
    assert report_files(*made, small.quiet()) == {}


def test_a_field_that_is_not_there_is_refused_before_the_training(made: Any) -> None:
    words = ("train", "--data", made[0].folder, "--model", "deepfm", "--segment", "context.none")
    refused(run(*words), "context.none is no field that rows can be told apart by; the data set has ")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seconds", [1, 119, 200, 5_400, 86_000, 3e6, 6.2e7, 3e8])
def test_times_are_told_apart_whether_a_log_has_seconds_or_years(seconds: float) -> None:
    axes = Figure().add_subplot()
    charts.rates(axes, [{"ts": 1_764_500_000 + seconds * i / 10, "rate": 0.1, "low": 0.05, "high": 0.2} for i in range(11)])
    axes.figure.canvas.draw()
    first, last = axes.get_xlim()
    assert 2 <= sum(first <= at <= last for at in axes.get_xticks()) <= 8


def test_a_curve_that_hardly_moves_is_flat() -> None:
    axes = Figure().add_subplot()
    charts.learning(axes, [{"number": n, "valid_auc": 0.60422 - n * 1e-5} for n in (1, 2)], {"valid_auc": "valid"}, "AUC")
    low, high = axes.get_ylim()
    assert (high - low, low + high) == pytest.approx((0.002, 2 * 0.604205))


def test_nothing_is_cut_on_a_desk_and_a_phone_scrolls_tables_alone(found: dict[str, Any]) -> None:
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        sheet = browser.new_page(viewport={"width": 1280, "height": 900})
        sheet.set_content(page(found).replace(str(escape(HOSTILE)), "side"))
        assert (
            sheet.locator("section > div").evaluate_all("all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => e.ariaLabel)") == []
        )
        sheet.set_viewport_size({"width": 375, "height": 800})
        assert sheet.evaluate("document.documentElement.scrollWidth") == 375
        edges = "all => all.map(e => [e, e.closest('section')].map(e => e.getBoundingClientRect()))"
        texts = sheet.locator("svg text").evaluate_all(edges)
        assert texts
        assert all(card["left"] <= text["left"] and text["right"] <= card["right"] for text, card in texts)
        heights = sheet.locator("[aria-label=Importance] tbody tr").evaluate_all("all => all.map(e => e.clientHeight)")
        assert max(heights) < 32, "a field's name is broken"
        browser.close()
