"""That the benchmarks in the simulated world measure by its truth: `regret` and `position`."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import small

from benchmarks import position, regret
from training.simulation import DAY, POSITIONS, SPLIT_DAYS, START, make_world


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_regret_is_nothing_for_who_knows_the_truth_and_much_for_who_has_it_upside_down(monkeypatch: Any, sign: float) -> None:
    world, asked, opened = make_world(300, 200, 1, 2), list[np.ndarray](), regret.open_prepared

    def scored(_trained: Any, _folder: Any, _log: Any, rows: pl.DataFrame) -> np.ndarray:
        user, ad = (rows[name].str.slice(1).cast(pl.Int64).to_numpy() for name in ("user_id", "ad_id"))
        slot = np.array([regret.SLOTS.index(name) for name in rows["context.slot"]])
        asked.append(world.p_click((rows["ts"][0] - START) // DAY, user, ad, slot, 0))
        return 0.5 + sign * (asked[-1] - 0.5)

    ids = SimpleNamespace(encode=lambda ad_ids: np.zeros(len(ad_ids), np.int64))
    trained = SimpleNamespace(encoder=SimpleNamespace(vocabularies=SimpleNamespace(categories={"ad_id": ids})), ad_deviations=np.zeros(1))
    stands_in = {"learned": lambda *_: trained, "scored": scored}
    stands_in["open_prepared"] = lambda folder: opened(folder) if folder.exists() else None
    for name, each in stands_in.items():
        monkeypatch.setattr(regret, name, each)
    found = regret.live_through("greedy", 1, 2, 60, small.quiet())
    truth = np.sort(np.stack(asked).reshape(2, 60, regret.OFFERED), 2)
    least = 0.7 * (truth[..., -3:] - truth[..., :3]).sum(2).mean(1)  # as at the first place: those below are clicked less
    assert len(found["clicks"]) == 2
    assert found["regret"] == pytest.approx([0, 0], abs=1e-12) if sign > 0 else (found["regret"] > least).all()


def test_visits_are_shown_by_what_ads_bid_or_in_any_order_and_those_of_test_have_all_ads_at_the_first_place() -> None:
    world = make_world(50, 60, 1)
    rows, truth, examination = position.made(world, examined=True, oracle=False, visits=1_500, seed=1)
    assert examination == pytest.approx(1 / np.sqrt(np.arange(1, POSITIONS + 1)))
    test = (rows["ts"] >= START + SPLIT_DAYS["test"][0] * DAY).to_numpy()
    assert truth.shape == (len(rows), POSITIONS)
    assert set(rows.filter(test)["position"]) == {1}
    assert set(rows.filter(test)["request_id"].value_counts()["count"]) == {position.OFFERED}
    shown = rows.filter(~test)
    assert shown.group_by("request_id", maintain_order=True).agg("position")["position"].to_list() == [list(range(1, POSITIONS + 1))] * (
        len(shown) // POSITIONS
    )
    explored = shown.filter(pl.col("propensity") < 1)
    assert len(explored) / len(shown) == pytest.approx(position.EXPLORING, abs=0.03)
    assert (explored["propensity"] * (position.OFFERED + 1 - explored["position"])).to_list() == pytest.approx([1.0] * len(explored))
    places = shown.filter(pl.col("propensity") == 1).group_by("ad_id").agg(pl.mean("position"))["position"]
    assert places.std() > 1.5 > explored.group_by("ad_id").agg(pl.mean("position"))["position"].std()  # type: ignore[operator]
