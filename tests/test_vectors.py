"""Dense vectors, such as an embedding of an ad's text: from a table, a request and the store to the networks."""

import copy
from pathlib import Path

import numpy as np
import onnxruntime
import polars as pl
import pytest
import small
import torch
from test_csv_table import prepare_csv

from features.bundle import load_bundle
from features.encode import AdTable, FieldError, Request, clean, encode_request
from features.schema import SchemaError, parse_schema
from tests.test_datasets import rows
from training.datasets.prepared import DataError, open_prepared
from training.datasets.states import ads
from training.export.export import export, scores_of
from training.networks import NETWORKS
from training.networks.contract import Part, RequestTensors
from training.networks.embeddings import Embeddings, numbers_of
from training.networks.fuse import fused

SCHEMA = 'name = "shop"\n[ad.ad_id]\nkind = "category"\n[ad.look]\nkind = "vector"\nlength = 2\n'
LOOKING = small.SCHEMA.replace('"price"]', '"price", "look"]') + '[ad.look]\nkind = "vector"\nlength = 2\n'
LOOKS = [[0.5, -1.0], None, [0.0, 2.0]]


@pytest.mark.parametrize(
    ("entries", "mistake"),
    [
        ("", "a vector needs a length of at least 2"),
        ("length = 2\nbuckets = 9", "a vector has neither buckets, min_count, max_size nor a transform"),
        ('length = 2\ntransform = "log"', "a vector has neither buckets, min_count, max_size nor a transform"),
        ('length = 2\nmissing_values = ["0"]', "a vector that is missing is 0 throughout"),
    ],
)
def test_what_a_vector_cannot_have(entries: str, mistake: str) -> None:
    with pytest.raises(SchemaError, match=f"field ad.look: {mistake}"):
        parse_schema(SCHEMA.replace("length = 2\n", f"{entries}\n"))


@pytest.mark.parametrize("value", [[1.0], [1.0, 2.0, 3.0], "1|2", 1.0, [1.0, "2"], [1.0, float("nan")], [1.0, 1e39]])
def test_a_value_that_is_no_such_vector_is_refused(value: object) -> None:
    field = parse_schema(SCHEMA).field("ad", "look")
    assert field is not None
    with pytest.raises(FieldError, match="expected a list of 2 finite numbers that fit float32"):
        clean(field, value)


def test_a_vector_has_its_columns_among_the_numbers() -> None:
    encoder = small.encoder(LOOKING)
    one = encoder.encode_one("ad", {"price": 0, "look": [1, -0.25]}, "a1")
    assert one.numbers.tolist() == [[0.0, 1.0, -0.25]]
    assert encoder.encode_one("ad", {"price": 0}, "a1").numbers.tolist() == [[0.0, 0.0, 0.0]]
    columns = encoder.encode("ad", {"price": [0.0, 0.0], "look": [[1.0, -0.25], None]}, 2)
    assert columns.numbers.tolist() == [[0.0, 1.0, -0.25], [0.0, 0.0, 0.0]]
    assert encoder.history_of(columns).numbers.tolist() == columns.numbers.tolist()
    table = AdTable(encoder)
    table.put(["a1"], one)
    sent = table.take(table.rows(["a1", "a1"]))
    encoder.overlay(sent, {1: {"look": [0.5, 0.5]}})
    assert sent.numbers.tolist() == [[0.0, 1.0, -0.25], [0.0, 0.5, 0.5]]


def test_a_vector_is_one_field_through_a_linear_layer() -> None:
    fields = small.fields_of("deepfm", LOOKING)
    embed = Embeddings(fields, 4)
    user, history, ad = small.parts(LOOKING)
    vectors, scales = embed("ad", ad), embed.scales["ad"]
    assert embed.names[-1] == "ad.look"
    assert vectors.shape[2] == fields.count("ad") == 5
    by_hand = ad.numbers[..., 1, None] * scales[1] + ad.numbers[..., 2, None] * scales[2]
    torch.testing.assert_close(vectors[:, :, -1], by_hand)
    torch.testing.assert_close(vectors[:, :, -2], ad.numbers[..., 0, None] * scales[0])
    assert numbers_of(RequestTensors(user, history, ad)).shape[-1] == fields.numbers == 1 + 3 + 3


@pytest.mark.parametrize("family", sorted(set(NETWORKS) - {"mf", "vae_cf"}))  # those two see ids alone
def test_every_network_takes_vectors_and_is_served_as_it_is_trained(family: str) -> None:
    network, (user, history, ad) = small.network(family, LOOKING), small.parts(LOOKING)
    served = fused(copy.deepcopy(network), None)
    other = Part(ad.ids, torch.cat([ad.numbers[..., :1], ad.numbers[..., 1:] + 1], -1))
    with torch.no_grad():
        logits = network(RequestTensors(user, history, ad))["click"]
        torch.testing.assert_close(served(RequestTensors(user, history, ad))["click"], logits, atol=1e-4, rtol=1e-4)
        moved = network(RequestTensors(user, history, other))["click"]
    assert (moved - logits).abs().amax() > 1e-3


@pytest.mark.parametrize("kind", ["text", "lists", "arrays"])
def test_a_table_s_vectors_are_those_of_its_cells(tmp_path: Path, kind: str) -> None:
    table = pl.DataFrame({"label": [0, 1, 0] * 4, "user_id": ["u"] * 12, "ad_id": ["a", "b", "c"] * 4})
    texts = pl.Series("look", ["0.5| -1", "", "0|2"] * 4)
    of = {"text": texts, "lists": pl.Series("look", LOOKS * 4), "arrays": pl.Series("look", LOOKS * 4, pl.Array(pl.Float32, 2))}
    out = prepare_csv(tmp_path, table.with_columns(of[kind]), SCHEMA)
    assert rows(out).unique("ad_id").sort("ad_id")["ad.look"].to_list() == LOOKS
    assert {ad.ad_id: dict(ad.features) for ad in ads(open_prepared(out))} == {"a": {"look": LOOKS[0]}, "b": {}, "c": {"look": LOOKS[2]}}


def test_a_cell_that_is_no_vector_is_refused_with_its_row(tmp_path: Path) -> None:
    table = pl.DataFrame({"label": [0, 1], "user_id": ["u"] * 2, "ad_id": ["a", "b"], "look": ["1|2", "1|2|3"]})
    with pytest.raises(DataError, match=r"row 2: look is '1\|2\|3'; expected a vector of 2 finite numbers"):
        prepare_csv(tmp_path, table, SCHEMA)


def test_a_vector_is_ranked_as_it_is_evaluated(traced_export: None, tmp_path: Path) -> None:
    """By the catalogue's vectors, those of behaviours among them."""
    (tmp_path / "data").mkdir()
    data = small.data_set(tmp_path / "data")
    looks = [None if i == 3 else [float(np.sin(i)), float(np.cos(i))] for i in range(small.ADS)]
    table = pl.read_parquet(tmp_path / "data" / "ads.parquet").with_columns(pl.Series("ad.look", looks, pl.List(pl.Float64)))
    table.write_parquet(tmp_path / "data" / "ads.parquet")
    (tmp_path / "data" / "schema.toml").write_text(LOOKING)
    data = open_prepared(tmp_path / "data")
    path = export(data, small.quick(data, "din"), tmp_path / "models", "din", small.quiet())
    bundle = load_bundle(path)
    encoded, scored = scores_of(bundle, data, "test", small.quiet())
    expected = scored["click"]
    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    catalogue = AdTable(bundle.encoder)
    for ad in ads(data):
        catalogue.put([ad.ad_id], bundle.encoder.encode_one("ad", ad.features, ad.ad_id))
    for row, p in zip(next(data.frames("test")).head(50).iter_rows(named=True), expected, strict=False):
        user = {name: row[f"user.{name}"] for name in ("age", "interests", "income") if row[f"user.{name}"] is not None}
        asked = Request(row["user_id"], user, {"slot": row["context.slot"]}, row["history"], [row["ad_id"]])
        assert session.run(["p_click"], encode_request(catalogue, asked)[0])[0][0, 0] == pytest.approx(p, abs=1e-5)
    assert np.abs(encoded.ad.numbers[:, 1:]).sum() > 0
