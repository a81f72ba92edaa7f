"""Figures against a recomputation that shares no code with ours: p(click) by numpy from a bundle's files, counts by DuckDB."""

import csv
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import onnxruntime
import polars as pl
import pytest
import small
import torch

from features.bundle import load_bundle
from features.encode import AdTable, Request, encode_request
from training.datasets import csv_table
from training.datasets.prepared import open_prepared
from training.datasets.vocabularies import learn_vocabularies
from training.export.export import export

pytestmark = pytest.mark.usefixtures("traced_export")
USER = {"age": "35", "interests": ["news", "drama", "opera"], "income": 7.0}
ADS: dict[str, dict[str, Any]] = {
    "a5": {"genre": "news", "tags": ["x", "y"], "price": 5.0},
    "a2": {"genre": "drama", "tags": [], "price": -2.5},
}
HISTORY = ["a2", "a5", "a2"]
Vector = np.ndarray[Any, np.dtype[np.float64]]


class Naive:
    """The weights and fields of a bundle, read from its files and worked out in float64, value by value."""

    def __init__(self, bundle: Path) -> None:
        self.weights = {name: value.astype(np.float64) for name, value in np.load(bundle / "weights.npz").items()}
        document = json.loads((bundle / "vocabularies.json").read_text())
        self.values, self.moments = document["categories"], document["moments"]
        self.schema = tomllib.loads((bundle / "schema.toml").read_text())
        self.calibration = json.loads((bundle / "calibration.json").read_text())
        fields = [(name, field) for side in ("user", "context", "ad") for name, field in self.schema.get(side, {}).items()]
        sizes = {
            f.get("vocabulary", n): f.get("buckets") or len(self.values[f.get("vocabulary", n)]) for n, f in fields if f["kind"] != "number"
        }
        self.start, row = {}, 1
        for name in sorted(sizes):
            self.start[name], row = row, row + sizes[name] + 1  # unknown, then the values

    def vector(self, table: str, name: str, field: dict[str, Any], value: Any) -> Vector:
        """Of a category or a list."""
        vocabulary = field.get("vocabulary", name)
        rows = []
        for each in (value if isinstance(value, list) else [value])[: field.get("length", 1)]:
            known = self.values[vocabulary]
            rows.append(self.start[vocabulary] + (1 + known.index(each) if each in known else 0))
        if value in (None, []):
            rows = [self.start[vocabulary]] if field.get("missing") == "unknown" else [0]
        return self.weights[f"{table}.table.weight"][rows].mean(0)

    def part(self, table: str, part: str, values: dict[str, Any]) -> dict[str, Vector]:
        """The vectors of a part's fields by name: the categories and lists, then the numbers."""
        names = self.schema["history"]["fields"] if part == "history" else None
        sides = ("user", "context") if part == "user" else ("ad",)
        fields = [(s, n, self.schema[s][n]) for s in sides for n in names or self.schema[s]]
        found = {name: self.vector(table, name, field, values.get(name)) for _, name, field in fields if field["kind"] != "number"}
        scales = iter(self.weights[f"{table}.scales.{part}"])
        for side, name, field in fields:
            if field["kind"] == "number":
                number = float(values.get(name, field.get("missing", 0)))
                if field.get("transform") == "log":
                    number = np.sign(number) * np.log1p(abs(number))
                elif field.get("transform") == "standard":
                    mean, deviation = self.moments[f"{side}.{name}"][:2]
                    number = (number - mean) / deviation
                found[name] = next(scales) * number
        return found

    def linear(self, name: str, x: Vector) -> Vector:
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]

    def normalised(self, name: str, x: Vector, eps: float = 1e-5) -> Vector:
        """By the statistics of the training."""
        return (x - self.weights[f"{name}.running_mean"]) / np.sqrt(self.weights[f"{name}.running_var"] + eps)

    def batch_norm(self, name: str, x: Vector) -> Vector:
        return self.normalised(name, x) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def dice(self, name: str, x: Vector) -> Vector:
        """DIN, eq. 3."""
        p, alpha = sigmoid(self.normalised(f"{name}.norm", x, 1e-8)), self.weights[f"{name}.alpha"]
        return p * x + (1 - p) * alpha * x

    def p_click(self, logit: float) -> float:
        c = self.calibration
        return float(sigmoid(c["scale"] * logit + c["shift"] + c["sampling"]))


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def deepfm(naive: Naive, user: dict[str, Any], history: list[dict[str, Any]], ad: dict[str, Any]) -> float:
    """Its logit of one candidate, pair by pair."""

    past = [list(naive.part("second", "history", each).values()) for each in history]
    both = np.array([*naive.part("second", "user", user).values(), *np.mean(past, 0), *naive.part("second", "ad", ad).values()])
    first = [*naive.part("first", "user", user).values(), *naive.part("first", "ad", ad).values()]  # behaviours have none
    pairs = sum(both[i] @ both[j] for i in range(len(both)) for j in range(i))
    hidden = np.maximum(naive.batch_norm("tower.rest.0", naive.linear("tower.first", both.flatten())), 0)
    return float(np.sum(first) + pairs + naive.linear("tower.rest.2", hidden)[0] + naive.weights["bias"][0])


def din(naive: Naive, user: dict[str, Any], history: list[dict[str, Any]], ad: dict[str, Any]) -> float:
    """Its logit of one candidate, behaviour by behaviour."""
    shown = naive.part("embed", "ad", ad)
    interest = np.zeros(0)
    for each in history:
        past = naive.part("embed", "history", each)
        q, k = (np.concatenate([side[name] for name in past]) for side in (shown, past))
        hidden = naive.dice("attention.rest.0", naive.linear("attention.first", np.concatenate([q, k, q - k, q * k])))
        weighed = naive.linear("attention.rest.1", hidden) * k
        interest = interest + weighed if len(interest) else weighed
    request = naive.batch_norm("tower.norms.0", np.concatenate(list(naive.part("embed", "user", user).values())))
    candidate = naive.batch_norm("tower.norms.1", np.concatenate([interest, *shown.values()]))
    hidden = naive.dice("tower.rest.0", naive.linear("tower.first", np.concatenate([request, candidate])))
    return float(naive.linear("tower.rest.1", hidden)[0])


@pytest.mark.parametrize(("logit", "deviation"), [(deepfm, 0.2), (din, 0.5)])
def test_p_click_of_a_bundle_is_what_numpy_makes_of_its_weights(logit: Callable[..., float], deviation: float, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = small.data_set(tmp_path / "data")
    text = (data.folder / "schema.toml").read_text().replace("buckets = 50\n", "")  # whose hash would be recomputed by itself
    (data.folder / "schema.toml").write_text(text)
    data = open_prepared(data.folder)
    trained = small.quick(data, logit.__name__, epochs=1)
    torch.manual_seed(1)
    small.scrambled(trained.network, deviation)  # hardly trained, some weights are next to nothing
    bundle = load_bundle(export(data, trained, tmp_path / "models", "m", small.quiet()))
    table = AdTable(bundle.encoder)
    for ad_id, features in ADS.items():
        table.put([ad_id], bundle.encoder.encode_one("ad", features, ad_id))
    feeds, _ = encode_request(table, Request("u7", USER, {"slot": "feed"}, HISTORY, list(ADS)))
    served = onnxruntime.InferenceSession(str(bundle.path / "model.onnx")).run(None, feeds)[0][0]
    naive, named = Naive(bundle.path), {ad_id: {"ad_id": ad_id, **features} for ad_id, features in ADS.items()}
    user = {"user_id": "u7", **USER, "slot": "feed"}
    expected = [naive.p_click(logit(naive, user, [named[each] for each in HISTORY], named[ad_id])) for ad_id in ADS]
    assert served.tolist() == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] - expected[1]) > 0.01, expected
    assert 0.001 < min(expected) < max(expected) < 0.999, expected


def test_counts_of_a_prepared_set_are_those_of_the_raw_file(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with (tmp_path / "log.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "user_id", "ad_id", "brand", "price", "topics"])
        for _ in range(400):
            brand = random.choice(["acme", "bolt, inc", 'say "x"', "", "7.0", "7"])
            topics = "|".join(random.choice(["a", "b", "c.0", "2.0"], random.integers(0, 4)))
            writer.writerow(
                [
                    random.integers(0, 2),
                    f"u{random.integers(9)}",
                    f"a{random.integers(20)}",
                    brand,
                    random.choice(["", "1.5", "20"]),
                    topics,
                ]
            )
    schema = (
        'name = "raw"\n[ad.ad_id]\nkind = "category"\n[ad.brand]\nkind = "category"\n[ad.price]\nkind = "number"\ntransform = "standard"\n'
    )
    (tmp_path / "my.toml").write_text(f'{schema}[ad.topics]\nkind = "list"\nlength = 3\n')
    csv_table.prepare(tmp_path / "log.csv", tmp_path / "out", tmp_path / "my.toml")
    db = duckdb.connect()
    db.read_csv(str(tmp_path / "log.csv"), header=True, all_varchar=True).create_view("raw")
    data = open_prepared(tmp_path / "out")
    whole = pl.concat([frame for split in ("train", "valid", "test") for frame in data.frames(split)])

    def counts(value: str, source: str = "raw") -> dict[str, int]:
        return dict(db.sql(f"SELECT {value} AS value, count(*) FROM {source} GROUP BY value").fetchall())

    assert db.sql("SELECT count(*) FROM raw WHERE label = '1'").fetchall() == [(whole["label"].sum(),)]
    for name, value in (
        ("user_id", "user_id"),
        ("ad_id", "ad_id"),
        ("ad.brand", "CASE brand WHEN '7.0' THEN '7' ELSE nullif(brand, '') END"),
    ):
        assert dict(whole[name].value_counts().iter_rows()) == counts(value)
    topics = "(SELECT unnest(string_split(topics, '|')) AS topic FROM raw) WHERE topic <> ''"
    assert dict(whole["ad.topics"].explode().drop_nulls().value_counts().iter_rows()) == counts(
        "regexp_replace(topic, '^2[.]0$', '2')", topics
    )
    moments = learn_vocabularies(data).moments["ad.price"]
    prices = "SELECT nullif(price, '')::DOUBLE AS price FROM raw LIMIT 320"
    [prices] = db.sql(f"SELECT avg(price), stddev_pop(price) FROM ({prices})").fetchall()
    assert (moments.mean, moments.deviation) == pytest.approx(prices)
