from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench_models import NARROW, built_once, small
from conftest import Server
from rich.console import Console

from benchmarks import benchmark_models, scoring
from benchmarks.benchmark_models import Built, build
from benchmarks.population import fill
from benchmarks.rowwise import repeated
from features.bundle import GOLDEN_TOLERANCE, current_path, load_bundle
from features.schema import parse_schema
from service.ranking.scorer import Scorer
from service.store.redis import RedisStore
from tests.small import traced
from training.export.onnx import OnnxFile


@pytest.fixture(scope="module", params=list(NARROW))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built_once(request.param, tmp_path_factory)


@pytest.mark.parametrize("behaviours", [0, 1, 7, 100, 130])
@pytest.mark.parametrize("candidates", [1, 2, 50])
def test_the_rowwise_graphs_give_the_scores_of_the_exported_one(built: Built, candidates: int, behaviours: int) -> None:
    ours, peers = scoring.scores_of(built.graph), [scoring.scores_rowwise(path) for path in (built.rowwise, built.textbook)]
    for feeds in scoring.requests(built, candidates, behaviours):
        for theirs in peers:
            assert np.abs(ours(feeds) - theirs(repeated(feeds))).max() < 1e-5


def test_probabilities_spread_and_nothing_folds_away(built: Built) -> None:
    score = scoring.scores_of(built.graph)
    p = np.concatenate([score(feeds).ravel() for feeds in scoring.requests(built, 200, 100, 20)])
    low, high = np.quantile(p, (0.02, 0.98))
    assert low < 0.05
    assert high > 0.7
    assert p.max() < 0.9999
    feeds = scoring.requests(built, 50, 100, 1)[0]
    for name, array in feeds.items():  # every column of every tensor matters
        for column in range(array.shape[-1]):
            changed = array.copy()
            changed[..., column] = np.where(array[..., column] > 2, 2, 3)
            assert np.abs(score({**feeds, name: changed}) - score(feeds)).max() > 1e-4, (name, column)


def test_it_is_a_bundle_that_the_service_takes(built: Built) -> None:
    bundle = load_bundle(current_path(built.models, built.benchmark_model.name))
    bundle.check_goldens(Scorer(built.graph, "cpu", 1).score)
    assert len(bundle.goldens) == benchmark_models.GOLDEN_REQUESTS
    assert len({round(p, 6) for golden in bundle.goldens for p in golden.p_click}) > 50
    assert GOLDEN_TOLERANCE == 1e-5
    length = bundle.schema.history_length
    assert [len(golden.history) for golden in bundle.goldens] == [length] * len(bundle.goldens)


def test_it_is_built_once_and_again_when_its_code_has_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    yard, folder, code = small("deepfm-20"), tmp_path / "bench", tmp_path / "training"
    code.mkdir()
    monkeypatch.setattr(benchmark_models, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark_models, "SOURCES", ("training",))
    monkeypatch.setattr(benchmark_models, "to_onnx", lambda served, tile=None: OnnxFile(traced(served, tile), {}))
    monkeypatch.setattr(benchmark_models, "rowwise_onnx", lambda *_, **__: b"")
    (code / "export.py").write_text("a")
    first = build(yard, folder)
    (folder / "built-mine").mkdir()
    before = first.graph.stat().st_mtime_ns
    other = build(replace(yard, population=replace(yard.population, seed=5)), folder)
    assert other.graph != first.graph
    assert (build(yard, folder), first.graph.stat().st_mtime_ns) == (first, before)
    (code / "export.py").write_text("b")
    assert build(yard, folder).graph.exists()
    assert not first.graph.exists()  # what older code built has gone, and nothing else
    assert not other.graph.exists()
    assert (folder / "built-mine").is_dir()


@pytest.mark.anyio
async def test_the_store_is_filled_with_what_the_model_knows(server: Server, built: Built) -> None:
    population = built.benchmark_model.population
    await fill(population, server.url)
    store = RedisStore(server.url, timeout=5, ttl=1000, on_damaged=lambda: None)
    ads = {ad.ad_id: ad.features async for batch in store.all_ads() for ad in batch}
    assert sorted(ads) == sorted(population.ad_ids)
    encoder = population.encoder
    for ad_id, features in list(ads.items())[:20]:
        assert encoder.encode_one("ad", features, ad_id).ids.min() > 1
    state = await store.get_user("u7")
    await store.close()
    assert len(state.ad_ids) == len(state.ts) == population.schema.history_length
    assert list(state.ts) == sorted(state.ts)
    assert encoder.encode_one("user", state.features, "u7").ids.min() > 1
    assert dict(population.users())["u7"].ad_ids == state.ad_ids


def test_scoring_compares_graphs_and_shows_them(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    ours = scoring.scores_of(built.graph)
    peers = {"textbook": scoring.scores_rowwise(built.textbook), "row-wise": scoring.scores_rowwise(built.rowwise)}
    timings = scoring.compare(built, {"exported": ours, "same": ours}, peers, 5, rounds=3)
    assert [t.graph for t in timings] == ["exported", "same", "textbook", "row-wise"]
    assert list(timings[-2].textbook) == list(timings[-1].rowwise) == [1.0, 1.0, 1.0]
    assert all(t.request_us == pytest.approx(t.candidate_us * 5, rel=0.01) for t in timings)
    assert 0 < timings[0].difference < 1e-5
    off = scoring.compare(built, {"wrong": lambda feeds: ours(feeds) + 0.25}, peers, 5, rounds=3)
    assert off[0].difference == pytest.approx(0.25, abs=1e-5)
    scoring.show(timings, Console(width=120))
    assert built.benchmark_model.name in capsys.readouterr().out


def test_a_variant_is_a_file_of_the_bundle_or_a_path(built: Built) -> None:
    assert scoring._variants(["int8=model.onnx"], built.bundle) == {"int8": built.graph}
    assert scoring._variants([f"row={built.rowwise}"], built.bundle) == {"row": built.rowwise}
    for wrong in ("model.onnx", "int8=absent.onnx"):
        with pytest.raises(scoring.click.BadParameter, match="expected NAME=FILE"):
            scoring._variants([wrong], built.bundle)


def test_every_field_of_the_benchmark_models_is_there() -> None:
    din, deepfm = (make().population.schema for make in benchmark_models.BENCHMARK_MODELS.values())
    assert (len(din.side("user")), len(din.side("ad")), din.history_length, len(din.history)) == (1, 2, 100, 2)
    assert (len(deepfm.side("user")), len(deepfm.side("ad")), deepfm.history_length) == (8, 12, 0)
    assert parse_schema(deepfm.to_toml()) == deepfm
