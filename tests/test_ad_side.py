"""What is kept of ads beside a model: the graph in two is the whole, and what is kept follows the ads."""

from dataclasses import replace

import bundles
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from features.bundle import AD_ROWS, AD_SIDES, GOLDENS, MODEL, BundleError, goldens_json
from features.encode import AdTable, Encoder, Request, encode_rows
from service.ranking.ad_side import AdSide
from service.ranking.executor import Inline
from service.ranking.scorer import Scorer
from service.settings import Settings
from tests.test_ranker import Ranked
from training.export.ad_side import ad_side, check_ad_side
from training.export.export import FEW, TOLERANCE, random_feeds
from training.export.onnx import IR, OPSET

ADS = [f"a{i}" for i in range(6)]
ENCODER = bundles.encoder()


def graph() -> bytes:
    """p_click = σ(W ad + W user), of ids alone: what is made of an ad is 3 wide, and the rest adds what is made of the user."""
    schema, random = ENCODER.schema, np.random.default_rng(1)
    ads, users = schema.tensors["ad_ids"][1], schema.tensors["user_ids"][1]
    weights = {"ad": random.normal(0, 1e-3, (ads, 3)), "user": random.normal(0, 1e-3, (users, 3)), "last": random.normal(size=(3, 1))}
    nodes = [helper.make_node("Cast", [f"{part}_ids"], [f"{part}_float"], to=TensorProto.FLOAT) for part in ("ad", "user")]
    nodes += [helper.make_node("MatMul", [f"{part}_float", part], [f"{part}_made"]) for part in ("ad", "user")]
    nodes += [
        helper.make_node("Unsqueeze", ["user_made", "axis"], ["beside"]),
        helper.make_node("Add", ["ad_made", "beside"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "last"], ["logit"]),
        helper.make_node("Squeeze", ["logit", "end"], ["flat"]),
        helper.make_node("Sigmoid", ["flat"], ["p_click"]),
    ]
    held = [helper.make_tensor(name, TensorProto.FLOAT, each.shape, each.ravel()) for name, each in weights.items()]
    held += [helper.make_tensor(name, TensorProto.INT64, [1], [at]) for name, at in (("axis", 1), ("end", -1))]
    inputs = [
        helper.make_tensor_value_info("user_ids", TensorProto.INT64, ["R", users]),
        helper.make_tensor_value_info("ad_ids", TensorProto.INT64, ["R", "C", ads]),
    ]
    output = helper.make_tensor_value_info("p_click", TensorProto.FLOAT, ["R", "C"])
    made = helper.make_graph(nodes, "made", inputs, [output], held)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR).SerializeToString()


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    """One graph whole, and in two."""
    folder = tmp_path_factory.mktemp("graphs")
    for name, data in zip(("whole", "ads", "rest"), (graph(), *ad_side(graph())), strict=True):
        (folder / name).write_bytes(data)
    return Scorer(folder / "whole", "cpu", 1), Scorer(folder / "rest", "cpu", 1, folder / "ads")


def table_of(genres: dict[str, str], encoder: Encoder = ENCODER) -> AdTable:
    table = AdTable(encoder)
    put(table, genres)
    return table


def put(table: AdTable, genres: dict[str, str]) -> None:
    for ad_id, genre in genres.items():
        table.put([ad_id], table.encoder.encode_one("ad", {"genre": genre}, ad_id))


def ask(table, ads: AdSide, scorers, candidates, sent=None):
    """What the graph in two says, and the whole."""
    feeds, _, rows = encode_rows(table, Request("u1", {}, {}, [], candidates, sent or {}))
    kept = {} if rows is None else ads.of(table, rows)
    return scorers[1].score({**feeds, **kept}), scorers[0].score(feeds), kept


def test_what_is_kept_gives_the_same_scores_and_follows_the_ads(scorers):
    """Equal to the last bit: the same products, of the same numbers."""
    table, ads = table_of(dict.fromkeys(ADS, "drama")), AdSide(scorers[1].ad_side, 2**20)
    found, expected, kept = ask(table, ads, scorers, ADS)
    assert np.array_equal(found, expected)
    put(table, {"a3": "news"})
    changed, expected, _ = ask(table, ads, scorers, ADS[::-1])
    assert np.array_equal(changed, expected)
    assert (found[0] != changed[0, ::-1]).tolist() == [ad_id == "a3" for ad_id in ADS]
    feeds, _, _ = encode_rows(table, Request("u1", {}, {}, [], ADS))
    assert np.array_equal(scorers[1].score({**feeds, **kept}), found)  # of a request that was on its way while the ad changed
    table.put([f"b{i}" for i in range(20)], table.take(np.ones(20, np.int64)))  # it grows
    found, expected, _ = ask(table, ads, scorers, ["b19", *ADS])
    assert np.array_equal(found, expected)
    other = table_of(dict.fromkeys(ADS, "comedy"))  # the catalogue was read anew
    found, expected, _ = ask(other, ads, scorers, ADS)
    assert np.array_equal(found, expected)


def test_ads_are_computed_once_until_they_change(scorers):
    computed = []

    def compute(feeds):
        computed.append(feeds["ad_ids"].shape[1])
        return scorers[1].ad_side(feeds)

    table, ads = table_of(dict.fromkeys(ADS, "drama")), AdSide(compute, 2**20)
    for candidates in (["a1", "a2"], ["a2", "a3"], ["a1", "a2", "a3"]):
        ask(table, ads, scorers, candidates)
    assert computed == [1, 2, 1]  # the padding ad, for the sizes
    for genre in ("news", "comedy") * 6:  # more often than there is room for
        put(table, {"a1": genre})
        found, expected, _ = ask(table, ads, scorers, ADS)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(("candidates", "sent"), [(["a1", "new"], None), (["a1", "a2"], {1: {"genre": "news"}})])
def test_unknown_ads_and_features_that_were_sent_are_computed(scorers, candidates, sent):
    found, expected, kept = ask(table_of(dict.fromkeys(ADS, "drama")), AdSide(scorers[1].ad_side, 2**20), scorers, candidates, sent)
    assert np.array_equal(found, expected)
    assert not kept


def test_nothing_is_kept_above_the_limit(scorers):
    table = table_of(dict.fromkeys(ADS, "drama"))
    for bytes_short, rows in ((0, len(ADS)), (1, 0)):
        ads = AdSide(scorers[1].ad_side, table.room * 3 * 4 - bytes_short)
        found, expected, kept = ask(table, ads, scorers, ADS)
        assert np.array_equal(found, expected)
        assert kept.get(AD_ROWS, np.zeros((1, 0))).shape == (1, rows)


def test_slices_and_several_requests_at_once(scorers):
    table, ads = table_of(dict.fromkeys(ADS, "drama")), AdSide(scorers[1].ad_side, 2**20)
    found, expected, _ = ask(table, ads, scorers, ADS * 200)
    assert np.array_equal(found, expected)
    feeds = random_feeds(ENCODER.schema, {}, 3, 1, 5)
    assert np.array_equal(scorers[1].score(feeds), scorers[0].score(feeds))


def test_a_graph_that_cannot_be_parted_stays_whole():
    """Ads in another layout, and one that makes nothing of an ad but a look-up."""
    for made in ("turned", "ad_float"):
        other = onnx.load_from_string(graph())
        for node in other.graph.node:
            node.input[:] = [made if name == "ad_made" else name for name in node.input]
        other.graph.node.insert(4, helper.make_node("Transpose", ["ad_made"], ["turned"], perm=[1, 0, 2]))
        assert ad_side(other.SerializeToString()) is None


def test_halves_that_differ_from_the_whole_are_not_published():
    ads, rest = ad_side(graph())
    damaged = onnx.load_from_string(ads)
    damaged.graph.initializer[0].float_data[0] += 1e-3
    cases = [{name: feeds[name] for name in ("user_ids", "ad_ids")} for feeds in (random_feeds(ENCODER.schema, {}, *each) for each in FEW)]
    check_ad_side(graph(), (ads, rest), cases, TOLERANCE)
    with pytest.raises(BundleError, match="its halves"):
        check_ad_side(graph(), (damaged.SerializeToString(), rest), cases, TOLERANCE)


@pytest.mark.anyio
async def test_a_service_ranks_by_halves_as_by_the_whole(tmp_path, scorers):
    """The whole where the setting is 0; known ads, one that changed, one that nobody knows, and one with features of its own."""
    goldens = [replace(golden, p_click=scorers[0].score(golden.feeds(ENCODER))[0].tolist()) for golden in bundles.goldens()]
    files = dict(zip(AD_SIDES[MODEL], ad_side(graph()), strict=True))
    bundles.publish(tmp_path, files={MODEL: graph(), GOLDENS: goldens_json(goldens), **files})
    answers, inputs = [], []
    for mib in (0, 1):
        models = bundles.loaded(Settings(models=tmp_path, ad_side_mib=mib))
        ranked = Ranked(models, Inline())
        inputs.append("ad_ids" in models.get(None).scorer.inputs)
        asked = [{"ad_ids": ADS}, {"ad_ids": [*ADS, "new"]}, {"ad_ids": ADS, "sent": {1: {"genre": "news", "tags": ["y"]}}}]
        before = [(await ranked.rank(**each)).ads for each in asked]
        put(ranked.catalogue.table(models.get(None).bundle.fingerprint), {"a3": "news"})
        answers.append([*before, (await ranked.rank(ADS)).ads])
        ranked.ranker.close()
    assert inputs == [True, False]
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][-1]
