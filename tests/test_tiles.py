import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.ranking.tiles import MOST, TILE, Shape, candidates_of, fill, lengths, runs, shape_of, shapes, take_apart, tiles_of


def request(candidates, behaviours=3, seed=0):
    random = np.random.default_rng(seed)
    return {
        "user_ids": random.integers(1, 99, (1, 4)),
        "history_ids": random.integers(1, 99, (1, behaviours, 2)),
        "ad_ids": random.integers(1, 99, (1, candidates, 3)),
        "ad_numbers": random.standard_normal((1, candidates, 1)).astype(np.float32),
    }


def dirty_buffers(shape):
    """Buffers that hold something from before."""
    axes = {"user": (shape.tiles,), "history": shape, "ad": (shape.tiles, TILE)}
    widths = {"user_ids": 4, "history_ids": 2, "ad_ids": 3}
    buffers = {name: np.full((*axes[name.partition("_")[0]], width), -7) for name, width in widths.items()}
    return buffers | {"ad_numbers": np.full((shape.tiles, TILE, 1), np.nan, np.float32)}


@given(st.lists(st.tuples(st.integers(1, 3 * TILE), st.integers(1, 20)), min_size=1, max_size=6))
def test_every_candidate_gets_the_score_of_itself_beside_its_own_user(sizes):
    requests = [request(candidates, behaviours, seed) for seed, (candidates, behaviours) in enumerate(sizes)]
    scores = [np.full((1, candidates_of(feeds)), np.nan, np.float32) for feeds in requests]
    for run in runs(requests):
        shape = shape_of(run, requests, 20)
        buffers = dirty_buffers(shape)
        fill(buffers, run, requests)
        rows = sum(piece.tiles for piece in run)
        assert not any(buffer[rows:].any() for buffer in buffers.values())
        of_users = (buffers["user_ids"].sum(-1) + buffers["history_ids"].sum((-1, -2)))[:, None]
        take_apart(of_users + buffers["ad_ids"].sum(-1) + buffers["ad_numbers"].sum(-1), run, [each[0] for each in scores])
    for feeds, got in zip(requests, scores, strict=True):
        of_user = feeds["user_ids"].sum() + feeds["history_ids"].sum()
        np.testing.assert_allclose(got, of_user + feeds["ad_ids"].sum(-1) + feeds["ad_numbers"].sum(-1), rtol=1e-6)


@given(st.lists(st.integers(1, 3 * MOST * TILE), min_size=1, max_size=4))
def test_runs_hold_all_tiles_in_order_and_never_too_many(sizes):
    requests = [{"ad_ids": np.empty((1, candidates, 1))} for candidates in sizes]
    whole = list(runs(requests))
    assert all(sum(piece.tiles for piece in run) == MOST for run in whole[:-1])
    assert 0 < sum(piece.tiles for piece in whole[-1]) <= MOST
    tiles = [(piece.request, piece.first + i) for run in whole for piece in run for i in range(piece.tiles)]
    assert tiles == [(n, i) for n, feeds in enumerate(requests) for i in range(tiles_of(feeds))]


def test_every_run_fits_one_of_the_shapes():
    known = set(shapes(100))
    for tiles in range(1, MOST + 1):
        for behaviours in (1, 25, 26, 50, 51, 100):
            requests = [request(1, behaviours)] + [request(1)] * (tiles - 1)
            (run,) = runs(requests)
            shape = shape_of(run, requests, 100)
            assert shape in known
            assert shape.tiles < 2 * tiles
            assert behaviours <= shape.behaviours < max(26, 2 * behaviours)


@pytest.mark.parametrize(("history", "expected"), [(0, (1,)), (1, (1,)), (2, (1, 2)), (5, (2, 3, 5)), (100, (25, 50, 100))])
def test_lengths(history, expected):
    assert lengths(history) == expected


def test_a_tensor_of_another_type_is_not_cast():
    requests = [request(3)]
    (run,) = runs(requests)
    requests[0]["ad_ids"] = requests[0]["ad_ids"].astype(np.float32)
    with pytest.raises(TypeError, match="Cannot cast"):
        fill(dirty_buffers(Shape(1, 3)), run, requests)
