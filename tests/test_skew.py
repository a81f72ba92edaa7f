import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundles
import logs
import numpy as np
import polars as pl
import pytest
from test_cli import run

from features.bundle import load_bundle
from features.served import ServedRecord
from features.state import pack_features
from training.datasets.log import open_log
from training.datasets.prepared import DataError
from training.skew import Skew, find_skew

START = 1_763_798_400


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    bundles.publish(folder, "din")
    bundles.publish(folder, "other", bias=1.0)
    return folder


def version(models: Path, name: str = "din") -> int:
    return int((models / name / "current").read_text())


def served(models: Path, number: int, name: str = "din", tensors: bool = True, **changes: Any) -> ServedRecord:
    """A ranking with the scores and the tensors of the bundle, as the service would log it."""
    ad_ids = [f"a{(number + i) % 30}" for i in range(3)] + ["new"]
    history = [f"a{(number * 7 + i) % 30}" for i in range(number % 5)] + ["gone"] * (number % 2)
    plain = ServedRecord(
        request_id=f"r{number}",
        ts=START + number * 60,
        model=name,
        version=version(models, name),
        user_id=f"u{number % 4}",
        user={"age": "25", "interests": ["news", "drama"], "income": 9.5 + number},
        context={"slot": "feed"},
        history=history,
        ad_ids=ad_ids,
        p_click=[0.0] * len(ad_ids),
        propensity=[1.0] * len(ad_ids),
        ads={ad_id: pack_features(bundles.ADS[ad_id]) for ad_id in {*ad_ids, *history} if ad_id in bundles.ADS},
        sent={"new": {"genre": "news"}, ad_ids[0]: {"price": 3.5}},
        unknown=["new"],
    )
    made = replace(plain, **changes)
    feeds = made.feeds(bundles.encoder())
    p_click = bundles.expected(feeds, {"din": 0.0, "other": 1.0}.get(name, 0.0))[0].tolist()
    return replace(made, p_click=p_click, tensors={part: array.tobytes() for part, array in feeds.items()} if tensors else {})


@pytest.fixture
def rankings(models: Path) -> list[ServedRecord]:
    """Of two models, one in three with tensors."""
    return [served(models, i, "other" if i % 5 == 4 else "din", tensors=i % 3 == 0) for i in range(20)]


@pytest.fixture
def check(tmp_path: Path, models: Path) -> Callable[..., Skew]:
    def of(rankings: Sequence[ServedRecord], **options: Any) -> Skew:
        folder = logs.write_log(tmp_path / "log", rankings, bundles.encoder().schema, files=2)
        return find_skew(open_log(folder), models, **options)

    return of


def differing(skew: Skew) -> set[str]:
    return {path for path, seen in skew.fields.items() if seen.differ}


def test_a_log_of_what_was_served_has_no_skew(rankings: list[ServedRecord], models: Path, check: Callable[..., Skew]) -> None:
    skew = check(rankings)
    assert (skew.found, skew.rows, skew.compared, skew.with_tensors) == (False, 80, 80, 28)
    assert skew.max_difference < 1e-6
    assert {key: each.rows for key, each in skew.versions.items()} == {
        ("din", version(models)): 64,
        ("other", version(models, "other")): 16,
    }
    schema = bundles.encoder().schema
    assert set(skew.fields) == {field.path for field in schema.fields} | {"history.ad_id", "history.genre"}
    assert {seen.rows for seen in skew.fields.values()} == {28}


def test_a_model_can_be_named_and_scores_can_be_sampled(rankings: list[ServedRecord], check: Callable[..., Skew]) -> None:
    assert check(rankings, name="other").rows == 16
    skew = check(rankings, sample=10)
    assert (skew.rows, skew.compared, skew.with_tensors) == (80, 10, 28)
    assert all(each.compared for each in skew.versions.values())


def test_an_ad_table_that_changed_is_found(rankings: list[ServedRecord], tmp_path: Path, models: Path, check: Callable[..., Skew]) -> None:
    assert not check(rankings).found
    (path,) = (tmp_path / "log" / "ads").glob("*")
    pl.read_parquet(path).with_columns(pl.lit("comedy").alias("ad.genre")).write_parquet(path)
    skew = find_skew(open_log(tmp_path / "log"), models)
    assert differing(skew) == {"history.genre"}
    assert skew.max_difference > 1e-3
    assert skew.fields["history.genre"].logged.startswith("behaviour ")
    assert skew.fields["history.genre"].recomputed.split(": ")[1] == "3"


def change_tensor(ranking: ServedRecord, name: str, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> ServedRecord:
    kind = np.int64 if name.endswith("_ids") else np.float32
    tensor = np.frombuffer(ranking.tensors[name], kind).reshape(-1, bundles.encoder().tensors[name][1])
    return replace(ranking, tensors={**ranking.tensors, name: change(tensor.copy()).astype(kind).tobytes()})


def test_a_wrong_transform_is_found(rankings: list[ServedRecord], check: Callable[..., Skew]) -> None:
    wrong = [change_tensor(each, "user_numbers", np.expm1) if each.tensors else each for each in rankings]
    skew = check(wrong)
    assert differing(skew) == {"user.income"}
    assert skew.fields["user.income"].differ == 28
    assert float(skew.fields["user.income"].logged) == pytest.approx(np.expm1(float(skew.fields["user.income"].recomputed)), rel=1e-4)
    assert skew.max_difference < 1e-6


def test_a_history_that_was_cut_otherwise_is_found(rankings: list[ServedRecord], check: Callable[..., Skew]) -> None:
    wrong = [
        change_tensor(each, "history_ids", lambda ids: ids[:-1]) if len(each.history) > 1 and each.tensors else each for each in rankings
    ]
    skew = check(wrong)
    assert differing(skew) == {"history.ad_id", "history.genre"}
    assert (skew.fields["history.genre"].logged, skew.fields["history.genre"].recomputed) == ("behaviours: 1", "behaviours: 2")


def test_swapped_values_are_found(rankings: list[ServedRecord], check: Callable[..., Skew]) -> None:
    skew = check([replace(each, user={**each.user, "age": "35"}) for each in rankings])
    assert differing(skew) == {"user.age"}
    assert (skew.fields["user.age"].logged, skew.fields["user.age"].recomputed) == ("2", "3")
    assert skew.max_difference > 1e-3


def test_a_tensor_that_is_absent_or_of_another_size_is_found(rankings: list[ServedRecord], check: Callable[..., Skew]) -> None:
    lost = [replace(each, tensors={n: t for n, t in each.tensors.items() if n != "ad_numbers"}) for each in rankings]
    skew = check(lost)
    assert differing(skew) == {"ad.price"}
    assert skew.fields["ad.price"].logged == "nothing"


def test_a_user_is_never_an_example(rankings: list[ServedRecord], check: Callable[..., Skew]) -> None:
    skew = check([replace(each, user_id="other") for each in rankings])
    assert skew.fields["user.user_id"].differ == 28
    assert (skew.fields["user.user_id"].logged, skew.fields["user.user_id"].recomputed) == ("", "")
    assert "other" not in json.dumps(skew.as_dict()["fields"])


@pytest.mark.parametrize(("off", "found"), [(9e-6, False), (1.2e-5, True), (float("nan"), True)])
def test_a_score_may_be_off_by_the_tolerance(rankings: list[ServedRecord], check: Callable[..., Skew], off: float, found: bool) -> None:
    rankings[3] = replace(rankings[3], p_click=[rankings[3].p_click[0] + off, *rankings[3].p_click[1:]])
    skew = check(rankings)
    assert (skew.found, differing(skew)) == (found, set())
    assert sum(each.differ for each in skew.versions.values()) == found


def test_versions_that_are_gone_are_counted_and_named(rankings: list[ServedRecord], models: Path, check: Callable[..., Skew]) -> None:
    skew = check([*rankings, replace(rankings[0], request_id="old", version=5)])
    assert (skew.found, skew.rows, skew.compared) == (False, 84, 80)
    assert skew.versions["din", 5].unusable == f"{models / 'din' / '5'} is not there any more"


def test_a_log_of_which_nothing_can_be_compared_is_a_mistake(rankings: list[ServedRecord], check: Callable[..., Skew]) -> None:
    with pytest.raises(DataError, match=r"has no row that could be compared; din 5: .* is not there any more"):
        check([replace(each, model="din", version=5) for each in rankings])


def test_int8_is_compared_with_its_own_graph_and_tolerance(
    tmp_path: Path, rankings: list[ServedRecord], check: Callable[..., Skew]
) -> None:
    with pytest.raises(DataError, match=r"has no model\.int8\.onnx"):
        check(rankings, precision="int8")
    path = bundles.publish(tmp_path / "models", "din", files={"model.int8.onnx": bundles.model(0.01)})
    int8 = [replace(each, version=load_bundle(path).version) for each in rankings if each.model == "din"]
    folder = logs.write_log(tmp_path / "int8", int8, bundles.encoder().schema)
    skew = find_skew(open_log(folder), tmp_path / "models", precision="int8")
    assert not skew.found
    assert skew.tolerance == 5e-3
    assert 1e-4 < skew.max_difference < 5e-3


# --- the command


def test_the_command_says_so_by_its_exit_code(tmp_path: Path, rankings: list[ServedRecord], models: Path) -> None:
    folder = logs.write_log(tmp_path / "log", rankings, bundles.encoder().schema)
    code, out, complaint = run("-q", "skew", "--log", folder, "--models", models)
    assert (code, complaint) == (0, "")
    assert "no skew" in out
    assert "history.genre" in out
    code, out, _ = run("skew", "--log", folder, "--models", models, "--json", "--since", "2025-11-22", "--until", START + 600)
    document = json.loads(out)
    assert (code, document["skew"], document["rows"], document["versions"][0]["model"]) == (0, False, 40, "din")
    swapped = [replace(each, user={**each.user, "age": "35"}) for each in rankings]
    code, out, _ = run("skew", "--log", logs.write_log(tmp_path / "bad", swapped, bundles.encoder().schema), "--models", models)
    assert (code, "skew found" in out) == (3, True)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--until", "5"], "has no row before 1970-01-01"),
        (["--since", "yesterday"], "expected a time such as 2026-11-22"),
        (["--name", "else"], "has no row that could be compared; none of else is in the window"),
        (["--models", "nowhere"], "is not there any more"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, rankings: list[ServedRecord], models: Path, words: list[str], complaint: str) -> None:
    folder = logs.write_log(tmp_path / "log", rankings, bundles.encoder().schema)
    code, _, document = run("skew", "--log", folder, "--models", models, *words)
    assert (code, "Traceback" in document) == (2, False)
    assert complaint in document.replace("\n", " ")
