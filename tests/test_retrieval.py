from pathlib import Path

import numpy as np
import onnxruntime
import polars as pl
import pytest
import small
import torch

from features.bundle import AD_VECTOR, REQUEST_VECTOR
from features.encode import AdTable, Request, encode_request
from training.export.export import export
from training.export.retrieval import AD_VECTORS, ad_vectors
from training.networks import build
from training.networks.contract import Fields, Part, RequestTensors

pytestmark = pytest.mark.usefixtures("traced_export")


def test_a_bundle_of_two_towers_finds_the_ads_that_it_ranks_first(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = small.data_set(tmp_path / "data")
    trained = small.quick(data, "two_tower")
    bundle = export(data, trained, tmp_path / "models", "towers", small.quiet())
    ads = pl.read_parquet(bundle / AD_VECTORS)
    vectors = np.stack(ads["vector"].to_numpy())
    assert ads["ad_id"].to_list() == [f"a{i}" for i in range(small.ADS)]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    encoder = trained.encoder
    table = AdTable(encoder)
    ids = [f"a{i}" for i in range(small.ADS)]
    features = [small.ad_features(i) for i in range(small.ADS)]
    named = {name: [each.get(name) for each in features] for name in ("genre", "tags", "price")}
    table.put(ids, encoder.encode("ad", {"ad_id": ids, **named}, small.ADS))
    for user in (3, 8):
        feeds, _ = encode_request(table, Request(f"u{user}", {"age": "25", "income": float(user)}, {"slot": "feed"}, ["a3", "a7"], ids))
        p_click = onnxruntime.InferenceSession(bundle / "model.onnx").run(["p_click"], feeds)[0][0]
        asked = {name: values for name, values in feeds.items() if not name.startswith("ad_")}
        (vector,) = onnxruntime.InferenceSession(bundle / REQUEST_VECTOR).run(["vector"], asked)[0]
        tower = onnxruntime.InferenceSession(bundle / AD_VECTOR)
        (given,) = tower.run(["vector"], {each.name: feeds[each.name] for each in tower.get_inputs()})[0]
        assert np.allclose(given, vectors, atol=1e-5)
        found = vectors @ vector
        assert np.ptp(found) > 1e-3
        order = np.argsort(-p_click)
        assert (np.diff(found[order]) < 1e-6).all()


def test_other_networks_have_no_vectors() -> None:
    network, (_, _, ad) = small.network("deepfm"), small.parts()
    assert ad_vectors(network, ["a"] * 5, Part(ad.ids[0], ad.numbers[0])) is None


def test_a_network_of_more_heads_gives_the_click_s_vectors() -> None:
    fields = Fields.of(small.schema(), small.vocabularies(), ("click", "conversion"))
    network = small.scrambled(build("two_tower", fields, small.NETWORK_SETTINGS["two_tower"]))
    user, history, ad = small.parts()
    ads, request = Part(ad.ids[0], ad.numbers[0]), RequestTensors(user, history, ad)
    with torch.no_grad():
        users, vectors = network.request_vectors(request), network.ad_vectors(ads)
        logits = network(RequestTensors(user, history, Part(ad.ids[:1].expand(3, -1, -1), ad.numbers[:1].expand(3, -1, -1))))["click"]
    assert torch.allclose(users @ vectors.T / 0.1 + network.intercept, logits, atol=1e-4)


def test_a_catalogue_without_ads_has_no_vectors() -> None:
    network, (_, _, ad) = small.network("two_tower"), small.parts()
    assert ad_vectors(network, [], Part(ad.ids[0, :0], ad.numbers[0, :0])) is None
