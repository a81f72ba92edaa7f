import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bundles
import numpy as np
import polars as pl
import pytest
import small
import small_log
from rich.progress import Progress
from test_cli import refused, run
from test_report import Seen

from features.bundle import VOCABULARIES, current_path, load_bundle, publish
from service.ranking.scorer import Scorer
from tests.test_datasets import ROOT
from training import train as training
from training.datasets.encoded import encode_split
from training.datasets.log import open_log
from training.datasets.prepared import Prepared
from training.export import export
from training.export.export import CALIBRATION, Calibration
from training.retrain import gate
from training.retrain import pipeline as retraining
from training.retrain.gate import users_of
from training.retrain.pipeline import RetrainError, RetrainRequest, open_window, retrain
from training.retrain.publish import train_and_publish
from training.retrain.report import Report
from training.train import Trained
from training.weights import WEIGHTS, start_of

pytestmark = pytest.mark.usefixtures("traced_export")
SETTINGS = {**small_log.QUICK, "epochs": "3"}


def words(settings: dict[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With three more ads than `poor` has seen."""
    return small_log.write(tmp_path_factory.mktemp("log"), ads=small.ADS + 3)


@pytest.fixture(scope="module")
def poor(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose live version of `shop` has learned next to nothing, of a log without the newest ads."""
    folder = tmp_path_factory.mktemp("poor")
    old = small_log.write(folder / "log", seed=1)
    given = {**small_log.QUICK, **small_log.NETWORK, "learning_rate": "0.0001"}
    train_and_publish(open_log(old), "deepfm", folder / "models", "shop", given, small.quiet())
    return folder / "models"


@pytest.fixture
def models(poor: Path, tmp_path: Path) -> Path:
    shutil.copytree(poor, tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture(scope="module")
def better(log: Path, poor: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The repository after a warm start, and the run's report."""
    models = tmp_path_factory.mktemp("better") / "models"
    shutil.copytree(poor, models)
    since = small_log.START
    splits, once = list[str](), encode_split
    with pytest.MonkeyPatch.context() as patch:
        for user in (training, export):
            patch.setattr(user, "encode_split", lambda data, split, *more: splits.append(split) or once(data, split, *more))
        report = retrain(RetrainRequest(log, models, "shop", since=since, holdout=0.3, settings=SETTINGS), small.quiet())
    assert sorted(splits) == ["test", "test", "train", "valid"], "once, and what is held out once more as the live version knows it"
    return models, report


def versions(models: Path) -> list[str]:
    return sorted(path.name for path in (models / "shop").iterdir() if path.name.isdigit())


def left(models: Path) -> list[str]:
    return sorted(
        path.name for path in (models / "shop").iterdir() if path.name.startswith(".") and path.name not in (".lock", ".retrain.lock")
    )


def only_report(models: Path) -> Path:
    [folder] = (models / "shop" / "reports").iterdir()
    return folder


def test_a_better_challenger_is_published(poor: Path, better: tuple[Path, Report]) -> None:
    models, report = better
    assert report.reasons == []
    assert report.comparison
    assert report.comparison["click"].champion
    assert report.comparison["click"].differences["log_loss"].high < 0
    assert report.comparison["click"].challenger.rows == 540
    bundle, champion = load_bundle(current_path(models, "shop")), load_bundle(current_path(poor, "shop"))
    assert (report.published, report.champion) == (bundle.version, champion.version)
    bundle.check_goldens(Scorer(bundle.path / "model.onnx", "cpu", 1).score)
    facts = bundle.manifest["retrain"]
    assert (facts["champion"], facts["start"], facts["seed"]) == (champion.version, "warm", 1)
    assert facts["window"]["rows"] == {"train": 1080, "valid": 180, "test": 540}
    assert facts["comparison"]["differences"]["log_loss"]["high"] < 0
    assert bundle.manifest["settings"]["embedding"] == 4  # as the champion's
    assert versions(models) == sorted([str(champion.version), str(bundle.version)])


def test_values_keep_their_ids_and_new_ones_come_after(poor: Path, better: tuple[Path, Report]) -> None:
    before, after = (load_bundle(current_path(models, "shop")).vocabularies.categories for models in (poor, better[0]))
    for name, vocabulary in before.items():
        if values := getattr(vocabulary, "values", None):
            assert after[name].values[: len(values)] == values
    new = after["ad_id"].values[len(before["ad_id"].values) :]
    assert {"a13", "a14"} <= set(new)


def test_a_report_says_what_came_of_it(better: tuple[Path, Report]) -> None:
    models, report = better
    folder = only_report(models)
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.md", "report.svg"]
    facts = json.loads((folder / "report.json").read_text())
    assert facts == json.loads(json.dumps(report.as_dict()))
    assert facts["accepted"] is True
    assert facts["metrics"]["challenger"]["log_loss"] < facts["metrics"]["champion"]["log_loss"]
    assert set(facts["differences"]) == {"auc", "gauc", "log_loss", "normalised_entropy", "calibration_error", "calibration_distance"}
    assert facts["bootstrap"] == {"resamples": 1000, "seed": 1, "level": 0.95, "of": "users", "users": 20}
    page = (folder / "report.md").read_text()
    change = r"log loss -\d+\.\d\d% \(95 % interval -\d+\.\d\d% to -\d+\.\d\d%\)"
    assert re.fullmatch(rf"\*\*Published shop {report.published}: {change} against {report.champion}\*\*", page.splitlines()[0])
    assert "| log loss |" in page
    picture = (folder / "report.svg").read_text()
    assert {"champion", "challenger", "log loss", "normalised entropy", "calibration error"} <= {
        each.text for each in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")
    }


def test_the_same_seed_gives_the_same_challenger(log: Path, models: Path, better: tuple[Path, Report]) -> None:
    words_ = ["--since", small_log.START, "--holdout", 0.3, "--epochs", 3, *words(small_log.QUICK | {"epochs": "3"})]
    code, printed, complaint = run("retrain", "--log", log, "--models", models, "--name", "shop", *words_)
    assert code == 0, complaint
    again, first = current_path(models, "shop"), current_path(better[0], "shop")
    for file in ("model.onnx", WEIGHTS, VOCABULARIES, CALIBRATION):
        assert (again / file).read_bytes() == (first / file).read_bytes(), file
    assert printed.splitlines()[-1].startswith(f"Published shop {again.name}: log loss -")


def trained_of(models: Path) -> tuple[Callable[..., Trained], dict[str, bytes]]:
    """What trains the live version again at once, on whatever data."""
    bundle = load_bundle(current_path(models, "shop"))
    calibration = Calibration(**json.loads((bundle.path / CALIBRATION).read_text()))
    network = start_of(bundle).network

    def trained(data: Prepared, *_: Any) -> Trained:
        held_out = encode_split(data, "test", bundle.encoder)
        return Trained("deepfm", network, bundle.encoder, {"click": calibration}, [], {}, {"int8": False}, held_out)

    return trained, {file: (bundle.path / file).read_bytes() for file in bundle.files}


@pytest.fixture
def trained(better: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings that end at once, with what `better` has."""
    made, files = trained_of(better[0])
    monkeypatch.setattr(retraining, "train", made)
    monkeypatch.setattr(retraining, "contents", lambda *_: (files | {"report.html": b"drawn <!-- verdict -->"}, {}))


@pytest.mark.parametrize(("gate", "code"), [("better", 3), ("not-worse", 0)])
def test_a_challenger_that_is_no_better_is_refused_with_exit_code_3_unless_that_is_enough(
    log: Path, tmp_path: Path, better: tuple[Path, Report], trained: None, gate: str, code: int
) -> None:
    models, out = tmp_path / "models", tmp_path / "report"
    shutil.copytree(better[0], models)
    before = current_path(models, "shop")
    words_ = ("--log", log, "--models", models, "--name", "shop", "--report", out, "--gate", gate, "--json")
    ended, printed, _ = run("retrain", *words_)
    assert ended == code
    report = json.loads(printed)
    assert report == json.loads((out / "report.json").read_text())
    assert report["differences"]["log_loss"] == {"value": 0.0, "low": 0.0, "high": 0.0}  # it is the champion itself
    assert report["accepted"] is (code == 0)
    assert len(versions(models)) == len(versions(better[0])) + (code == 0)
    assert left(models) == []
    if code:
        [reason] = report["reasons"]
        assert re.fullmatch(
            r"log loss (\S+) against the champion's \1, difference .*: the interval must lie below 0 \(gate better\)", reason
        )
        assert (out / "report.md").read_text().startswith("**Refused shop: log loss ")
        seen = Seen((out / "training.html").read_text())  # which no bundle has
        assert seen.text == f"drawn Refused: shop stays as it is{reason}"
        assert (current_path(models, "shop"), report["version"]) == (before, None)
    else:
        page = Seen((current_path(models, "shop") / "report.html").read_text())
        assert page.text == f"drawn Made live, in place of {before.name}"


def test_a_live_version_that_changed_meanwhile_voids_the_comparison(
    log: Path, models: Path, better: tuple[Path, Report], trained: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion = int(current_path(models, "shop").name)
    _, files = trained_of(better[0])
    ours = gate.compare.compare

    def slow(*arguments: Any) -> Any:
        publish(models, "shop", files, {})
        return ours(*arguments)

    monkeypatch.setattr(gate.compare, "compare", slow)
    with pytest.raises(
        RetrainError, match=rf"the live version of shop was {champion} and is \d+ now: the comparison is void; run it again"
    ):
        retrain(RetrainRequest(log, models, "shop", holdout=0.3), small.quiet())
    assert len(versions(models)) == 2


def test_what_was_served_by_the_champion_and_what_it_was_trained_on_is_told(
    log: Path, tmp_path: Path, models: Path, better: tuple[Path, Report], trained: None
) -> None:
    served = int(current_path(models, "shop").name)
    shutil.copytree(log, tmp_path / "log")
    shown = small_log.rewrite(tmp_path / "log", lambda frame: frame.with_columns(model=pl.lit("shop"), version=pl.lit(served, pl.Int64)))
    report = retrain(RetrainRequest(shown, models, "shop", holdout=0.3), small.quiet())
    assert report.published
    [warning] = report.warnings
    assert warning.startswith("100% of the rows that were held out were served by the live version, which chose what was shown")
    shutil.copytree(better[0], tmp_path / "other")
    report = retrain(RetrainRequest(log, tmp_path / "other", "shop", holdout=0.5), small.quiet())
    assert report.published is None
    assert [warning for warning in report.warnings if "was trained on rows up to" in warning and "it knows some" in warning]


def test_rows_without_a_user_are_users_of_their_own(tmp_path: Path) -> None:
    log = small_log.write(tmp_path / "log")
    named = users_of(open_log(log))
    assert (len(named), len(np.unique(named))) == (180, 20)
    nobody = pl.when(pl.col("user_id") == "u3").then(pl.lit("")).otherwise(pl.col("user_id"))
    small_log.rewrite(log, lambda frame: frame.with_columns(user_id=nobody))
    frame = pl.concat(map(pl.read_parquet, small_log.hours_of(log)[-4:]))
    rankings = frame.filter(pl.col("user_id") == "")["request_id"].n_unique()
    assert len(np.unique(users_of(open_log(log)))) == 19 + rankings


def test_the_first_version_needs_no_champion(log: Path, tmp_path: Path, trained: None) -> None:
    report = retrain(RetrainRequest(log, tmp_path, "shop", network="deepfm", holdout=0.3), small.quiet())
    assert report.verdict == f"Published shop {report.published}, its first version"
    assert report.training["start"] == "scratch"
    assert (tmp_path / "shop" / "current").read_text() == f"{report.published}\n"
    assert json.loads((only_report(tmp_path) / "report.json").read_text())["differences"] == {}


def test_a_first_version_that_knows_nothing_is_refused(log: Path, poor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, files = trained_of(poor)

    def off(*arguments: Any) -> Trained:
        trained = made(*arguments)
        return replace(trained, calibrations={"click": replace(trained.calibration, shift=-3.0)})

    monkeypatch.setattr(retraining, "train", off)
    monkeypatch.setattr(retraining, "contents", lambda *_: (files, {}))
    monkeypatch.setattr(gate, "scores", lambda *_: {"click": np.full(540, 0.05)})
    report = retrain(RetrainRequest(log, tmp_path, "shop", network="deepfm", holdout=0.3), small.quiet())
    assert report.published is None
    assert [reason.split(":")[0] for reason in report.reasons] == ["calibration is off", "it is no better than the click rate alone"]
    assert not (tmp_path / "shop" / "current").exists()


def test_a_poisoned_window_is_refused_before_any_training(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = small_log.rewrite(small_log.write(tmp_path / "log"), lambda frame: frame.with_columns(pl.lit("side").alias("context.slot")))

    def never(*_: Any) -> Any:
        raise AssertionError("it was trained")

    monkeypatch.setattr(retraining, "train", never)
    code, printed, _ = run("retrain", "--log", log, "--models", models, "--name", "shop")
    assert code == 3
    assert printed.splitlines()[-1].startswith("Refused shop: context.slot is 'side' in all 100% of the rows that have it")
    assert printed.count("context.slot is 'side'") == 1
    folder = only_report(models)
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.md"]
    assert json.loads((folder / "report.json").read_text())["window"]["fields"]["context.slot"] == {
        "known": 1.0,
        "value": "side",
        "varied": False,
    }


def test_the_window_before_tells_how_many_rows_to_expect(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = small_log.write(tmp_path / "log")
    since = small_log.START + 20 * 3600
    for path in small_log.hours_of(log)[20:]:
        pl.read_parquet(path).gather_every(3).write_parquet(path)
    order = RetrainRequest(log, models, "shop", since=since, settings={"least_rows": "100"})
    report = retrain(order, small.quiet())
    assert report.reasons == ["300 rows, 33% of the 900 in the window of the same length before it; rows_share asks for 50%"]
    assert "| the window before | 900 |" in (only_report(models) / "report.md").read_text()


@pytest.mark.parametrize(
    ("given", "rows", "before"),
    [
        ({}, 40, 0),
        ({"days": 1}, 24, 16),
        ({"since": small_log.START + 10 * 3600, "until": small_log.START + 15 * 3600}, 5, 5),
        ({"days": 1, "until": small_log.START + 30 * 3600}, 24, 6),
    ],
)
def test_a_window_is_a_span_of_time(log: Path, given: dict[str, int], rows: int, before: int) -> None:
    data, earlier = open_window(RetrainRequest(log, Path("models"), "shop", **given))
    assert sum(len(frame) for split in ("train", "valid", "test") for frame in data.frames(split)) == 45 * rows
    assert sum(map(len, earlier)) == 45 * before


def test_a_position_may_be_a_feature(log: Path) -> None:
    data, _ = open_window(RetrainRequest(log, Path("models"), "shop", position_as="context.slot"))
    assert set(next(data.frames("train"))["context.slot"]) == {"1", "2", "3"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set", "mystery=1"], "^Error: --set mystery: no such setting; there are embedding, .*, seed, .*, least_rows, .*, gate"),
        (["--set", "hidden=9"], "--set hidden: a warm start goes on with the live version's network as it is; leave it out, or"),
        (["--model", "din"], "--model din: a warm start goes on with the live version's network"),
        (["--model", "mlp", "--start", "scratch"], "there is no network 'mlp'; name one with --model: lr, "),
        (["--days", "3", "--since", "5"], "--days and --since both say where the window begins; leave one out"),
        (["--since", "2025-13-01"], "2025-13-01: expected a time such as 2026-11-22"),
        (["--since", "20", "--until", "10"], "the window is empty: --since 20 is not before --until 10"),
        (["--since", "2031-01-01"], "has no row from 2031-01-01 00:00:00 UTC"),
        (["--holdout", "0.6", "--valid", "0.5"], "--holdout 0.6 and --valid 0.5 are shares of the rows: above 0, together below 1"),
        (["--set", "click_rate_factor=0"], "click_rate_factor is 0.0; it must be at least 1"),
        (["--position-as", "context.page"], "context.page cannot take the position"),
        (["--name", "other"], "there is no network 'other'; name one with --model: lr, "),
    ],
)
def test_mistakes_are_a_sentence_and_exit_code_2(log: Path, models: Path, extra: list[str], message: str) -> None:
    before = versions(models)
    refused(run("retrain", "--log", log, "--models", models, "--name", "shop", *extra), message)
    assert (versions(models), left(models)) == (before, [])
    assert not (models / "shop" / "reports").exists()


def test_other_fields_need_a_start_from_scratch(tmp_path: Path, models: Path) -> None:
    log = small_log.write(tmp_path / "log")
    (log / "schema.toml").write_text((log / "schema.toml").read_text().replace("length = 4", "length = 3"))
    with pytest.raises(
        RetrainError, match=r"the fields of .*schema\.toml are not those of the live version .*, so its weights do not fit; use"
    ):
        retrain(RetrainRequest(log, models, "shop"), small.quiet())


def test_a_live_version_that_training_did_not_make_is_a_sentence(log: Path, tmp_path: Path) -> None:
    bundles.publish(tmp_path, "din")
    refused(run("retrain", "--log", log, "--models", tmp_path, "--name", "din"), "has no metrics.json, so nothing can be compared with it")


def test_a_report_that_cannot_be_written_is_a_sentence(log: Path, models: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = ("--report", tmp_path / "file" / "report")
    refused(
        run("retrain", "--log", log, "--models", models, "--name", "shop", *out, "--set", "least_rows=9999"),
        "cannot write the report to .*: Not a",
    )


@contextlib.contextmanager
def started(tmp_path: Path, *words: object) -> Iterator["subprocess.Popen[bytes]"]:
    """A retraining that is ended at last: a test that fails must leave none that trains on for hours."""
    command, env = [sys.executable, "-m", "adrank", "retrain", *map(str, words)], {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "out").open("wb") as out, subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


def until_it_says(tmp_path: Path, process: "subprocess.Popen[bytes]", text: str) -> None:
    end = time.monotonic() + 180
    while text not in (tmp_path / "out").read_text():
        assert process.poll() is None, (tmp_path / "out").read_text()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_at_once_and_what_is_left_of_one_that_was_ended(log: Path, models: Path, tmp_path: Path) -> None:
    words_ = ("--log", log, "--models", models, "--name", "shop", *words({**small_log.QUICK, "epochs": "100000", "patience": "100000"}))
    quick = ("retrain", *words_, "--set", "least_rows=99999")
    before = versions(models)
    with started(tmp_path, *words_) as first:
        until_it_says(tmp_path, first, "epoch  2")
        refused(run(*quick), rf"shop is being retrained already, by process {first.pid} on \S+ since .* UTC; wait for it, or end it")
        first.send_signal(signal.SIGTERM)
        assert first.wait(20) == 130
    assert "Traceback" not in (tmp_path / "out").read_text()
    assert (versions(models), left(models)) == (before, [])
    assert not (models / "shop" / "reports").exists()
    assert run(*quick)[0] == 3  # nothing holds it up


KILL = """
import os, signal, sys
from features import bundle
import adrank
import small
from training.export import export
export.to_onnx, export.SIZES = small.traced, (1, 7)
export.explain_graph, export.report_files = lambda *_: ({}, []), lambda *_: {}
write = bundle._write
def dying(path, data):
    if path.name.startswith(".current"):
        path.write_bytes(data[:9])
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, data)
bundle._write = dying
adrank.main(sys.argv[1:])
"""


def test_a_run_that_is_killed_while_publishing_leaves_the_live_version(log: Path, models: Path) -> None:
    before, live = versions(models), current_path(models, "shop")
    words_ = ["retrain", "--log", log, "--models", models, "--name", "shop", "--since", small_log.START, "--holdout", 0.3, *words(SETTINGS)]
    command = [sys.executable, "-c", KILL, *map(str, words_)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [name.split("-")[0] for name in left(models)] == [".current", ".publishing"]
    assert current_path(models, "shop") == live
    [whole] = set(versions(models)) - set(before)
    load_bundle(models / "shop" / whole)  # nobody's live version, but one that may be promoted
    report = retrain(RetrainRequest(log, models, "shop", settings={"least_rows": "9999"}), small.quiet())
    assert report.champion == int(live.name)
    assert left(models) == []


def test_a_full_disk_in_the_first_step_is_said_where_it_is(tmp_path: Path) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))
    try:
        with pytest.raises(RetrainError, match=rf"cannot write to {tmp_path / 'models/shop/.retrain.lock'}: File too large"):
            retraining.retrain(RetrainRequest(tmp_path / "log", tmp_path / "models", "shop"), Progress())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
