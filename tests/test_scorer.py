import bundles
import numpy as np
import onnxruntime as ort
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.encode import AdTable, Request, encode_request
from service.errors import ScoringError
from service.ranking.scorer import SLICE, Scorer, TiledScorer
from service.ranking.tiles import MOST, TILE, shapes


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(bundles.model())
    return path


def feeds(candidates=("a1", "a2", "new"), history=("a3",)):
    table = AdTable(bundles.encoder())
    for ad_id, features in bundles.ADS.items():
        table.put([ad_id], table.encoder.encode_one("ad", features, ad_id))
    return encode_request(table, Request("u1", {"age": "25"}, {"slot": "feed"}, list(history), list(candidates)))[0]


def test_scores_as_the_graph_says(path):
    scores = Scorer(path, "cpu", 1).score(feeds())
    assert scores.dtype == np.float32
    assert scores.shape == (1, 3)
    # sums of a dozen float32 in another order
    np.testing.assert_allclose(scores, bundles.expected(feeds()), atol=1e-6)


@pytest.mark.parametrize("count", [1, SLICE, SLICE + 1, 2 * SLICE + 1, 10_000])
def test_slices_change_no_score(path, count):
    """The model is elementwise over the candidates, so the scores are the same to the last bit."""
    whole = feeds([f"a{i}" for i in range(count)])
    once = ort.InferenceSession(path).run(None, whole)[0]
    assert np.array_equal(Scorer(path, "cpu", 1).score(whole), once)


def test_slices_are_as_equal_as_can_be(path):
    slices = [some["ad_ids"].shape[1] for some in Scorer(path, "cpu", 1).slices(feeds([f"a{i}" for i in range(2 * SLICE + 1)]))]
    assert sum(slices) == 2 * SLICE + 1
    assert len(slices) == 3
    assert max(slices) - min(slices) <= 1


def test_a_tensor_that_the_model_does_not_take_is_left_out(path):
    scorer = Scorer(path, "cpu", 1)
    assert np.array_equal(scorer.score({**feeds(), "more_ids": np.zeros((1, 1))}), scorer.score(feeds()))


def test_a_tensor_that_is_missing_is_named(path):
    short = feeds()
    del short["history_ids"]
    with pytest.raises(ScoringError, match="history_ids"):
        Scorer(path, "cpu", 1).score(short)


def test_a_tensor_of_the_wrong_type_is_an_error_of_ours(path):
    with pytest.raises(ScoringError, match="the model failed"):
        Scorer(path, "cpu", 1).score({**feeds(), "ad_ids": feeds()["ad_ids"].astype(np.float32)})


def test_what_is_not_a_model_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(ScoringError, match="cannot be loaded"):
        Scorer(tmp_path / "model.onnx", "cpu", 1)
    with pytest.raises(ScoringError, match="cannot be loaded"):
        Scorer(tmp_path / "absent.onnx", "cpu", 1)


def test_cuda_without_cuda_is_refused(path):
    with pytest.raises(ScoringError, match=r"device cuda is not available: .+ install 'adrank\[gpu\]'.+ CUDA 13 and cuDNN 9$"):
        TiledScorer(path, "cuda", 5)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_model_brings_as_many_threads_as_it_is_told_to(path, threads):
    """The one that asks is the first of them; pools of the size of the host would show here."""
    before = psutil.Process().num_threads()
    scorer = Scorer(path, "cpu", threads)
    scorer.score(feeds())
    assert psutil.Process().num_threads() - before == threads - 1


SIZES = st.lists(st.tuples(st.integers(1, 200), st.integers(0, 5)), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiled") / "model.onnx"
    path.write_bytes(bundles.model())
    return TiledScorer(path, "cpu", 5)


@settings(max_examples=40)
@given(SIZES)
def test_scored_together_is_scored_alone(tiled, sizes):
    """To the rounding of a float32 sum: padding a history changes the order in which it is summed."""
    requests = [
        feeds([f"a{seed}-{i}" for i in range(count)], [f"a{i}" for i in range(behaviours)])
        for seed, (count, behaviours) in enumerate(sizes)
    ]
    for request, scores in zip(requests, tiled.submit(requests).result(), strict=True):
        np.testing.assert_allclose(scores, bundles.expected(request), atol=1e-6)
        np.testing.assert_allclose(scores, tiled.score(request), atol=1e-6)


def test_requests_of_many_runs_are_scored(tiled):
    request = feeds([f"a{i}" for i in range(MOST * TILE + 1)])
    np.testing.assert_allclose(tiled.score(request), bundles.expected(request), atol=1e-6)


def test_several_requests_in_one_tensor_are_scored_too(tiled):
    one, other = feeds(["a1", "a2"]), feeds(["a3", "new"])
    both = {name: np.concatenate([one[name], other[name]]) for name in one}
    assert np.array_equal(tiled.score(both), np.concatenate([tiled.score(one), tiled.score(other)]))


def test_shapes_are_bound_once_and_scores_stay_the_callers(tiled):
    first = tiled.score(feeds())
    kept, bound = first.copy(), dict(tiled._bound)
    tiled.score(feeds(("a7", "a8", "a9")))
    assert np.array_equal(first, kept)
    assert tiled._bound == bound


def test_warming_up_binds_every_shape(path):
    scorer = TiledScorer(path, "cpu", 5)
    blank = {name: np.zeros((1, *array.shape[1:]), array.dtype) for name, array in feeds().items()}
    for behaviours, candidates in scorer.warm_up(5):
        ads = {name: np.repeat(array[:, :1], candidates, 1) for name, array in blank.items() if name.startswith("ad_")}
        scorer.score(blank | ads | {"history_ids": np.zeros((1, behaviours, 2), np.int64)})
    assert set(scorer._bound) == set(shapes(5))


def test_errors_of_a_run_are_ours(tiled):
    short = feeds()
    del short["history_ids"]
    with pytest.raises(ScoringError, match="the model takes history_ids"):
        tiled.score(short)
    for wrong in (feeds()["ad_ids"].astype(np.float32), feeds()["ad_ids"][..., :1]):
        with pytest.raises(ScoringError, match="the model failed"):
            tiled.score({**feeds(), "ad_ids": np.ascontiguousarray(wrong)})
    assert tiled.score(feeds()).shape == (1, 3)
