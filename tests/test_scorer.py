import bundles
import numpy as np
import onnxruntime as ort
import psutil
import pytest

from features.encode import AdTable, Request, encode_request
from service.errors import ScoringError
from service.scorer import SLICE, Scorer


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(bundles.model())
    return path


def feeds(candidates=("a1", "a2", "new")):
    table = AdTable(bundles.encoder())
    for ad_id, features in bundles.ADS.items():
        table.put([ad_id], table.encoder.encode_one("ad", features, ad_id))
    return encode_request(table, Request("u1", {"age": "25"}, {"slot": "feed"}, ["a3"], list(candidates)))[0]


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


def test_slices_are_as_equal_as_can_be(path, monkeypatch):
    runs = []
    scorer = Scorer(path, "cpu", 1)
    run = scorer._run
    monkeypatch.setattr(scorer, "_run", lambda feeds: runs.append(feeds["ad_ids"].shape[1]) or run(feeds))
    scorer.score(feeds([f"a{i}" for i in range(2 * SLICE + 1)]))
    assert sum(runs) == 2 * SLICE + 1
    assert len(runs) == 3
    assert max(runs) - min(runs) <= 1


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
    with pytest.raises(ScoringError, match="device cuda is not available"):
        Scorer(path, "cuda", 1)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_model_brings_as_many_threads_as_it_is_told_to(path, threads):
    """The one that asks is the first of them; pools of the size of the host would show here."""
    before = psutil.Process().num_threads()
    scorer = Scorer(path, "cpu", threads)
    scorer.score(feeds())
    assert psutil.Process().num_threads() - before == threads - 1
