from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from training.datasets.prepared import SPLITS, Prepared, open_prepared
from training.datasets.states import ads, user_states
from training.simulation import (
    BASE,
    CATEGORIES,
    DAY,
    DAYS,
    HISTORY,
    POSITION_BIAS,
    POSITIONS,
    SLOT_BIAS,
    SLOTS,
    SPLIT_DAYS,
    START,
    World,
    make_world,
    write_log,
)

IMPRESSIONS = 12_000


def world(seed: int = 7) -> World:
    return make_world(users=40, ads=30, seed=seed)


def write(out: Path, seed: int = 7) -> pl.DataFrame:
    counts = write_log(world(), out, IMPRESSIONS, seed)
    data = open_prepared(out)
    assert sum(counts.values()) == IMPRESSIONS
    assert counts == {split: sum(map(len, data.frames(split))) for split in SPLITS}
    return pl.concat([frame for split in SPLITS for frame in data.frames(split)])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, pl.DataFrame]:
    out = tmp_path_factory.mktemp("world") / "out"
    log = write(out)
    return open_prepared(out), log


def test_a_history_is_what_the_user_clicked_before_and_nothing_else(written: tuple[Prepared, pl.DataFrame]) -> None:
    data, log = written
    past: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for user, ad, label, ts, history in log.select("user_id", "ad_id", "label", "ts", "history").iter_rows():
        assert history == [clicked for at, clicked in past[user] if at < ts][-HISTORY:]
        if label:
            past[user].append((ts, ad))
    assert log["ts"].is_sorted()
    assert max(map(len, log["history"].to_list())) == HISTORY
    states = {user: list(zip(state.ts, state.ad_ids, strict=True)) for user, state in user_states(data)}
    assert states == {user: clicks[-HISTORY:] for user, clicks in past.items()}


def test_the_splits_are_days(written: tuple[Prepared, pl.DataFrame]) -> None:
    for split, (first, end) in SPLIT_DAYS.items():
        days = [(frame["ts"] - START) // DAY for frame in written[0].frames(split)]
        assert (min(int(d.min()) for d in days), max(int(d.max()) for d in days)) == (first, end - 1)


def test_clicks_come_as_often_as_the_truth_says(written: tuple[Prepared, pl.DataFrame]) -> None:
    log = written[1]
    day = ((log["ts"] - START) // DAY).to_numpy()
    user, ad = (log[name].str.slice(1).cast(pl.Int64).to_numpy() for name in ("user_id", "ad_id"))
    slot = log["context.slot"].replace_strict(SLOTS, range(len(SLOTS)), return_dtype=pl.Int64).to_numpy()
    position = log["context.position"].cast(pl.Int64).to_numpy() - 1
    truth = world().p_click(day, user, ad, slot, position)
    labels = log["label"].to_numpy()
    for group in (
        np.ones(len(log), bool),
        position == 0,
        position == POSITIONS - 1,
        slot == 1,
        truth > np.quantile(truth, 0.9),
        truth < np.quantile(truth, 0.1),
    ):
        deviation = np.sqrt((truth[group] * (1 - truth[group])).sum())
        assert group.sum() > 300
        assert abs(labels[group].sum() - truth[group].sum()) < 4 * deviation
    assert truth[position == 0].mean() > 1.5 * truth[position == POSITIONS - 1].mean()


def test_p_click_by_hand() -> None:
    interests = np.zeros((DAYS, 1, len(CATEGORIES)))
    interests[4, 0, 1] = 2.0
    one = World(
        interests,
        np.zeros(1, int),
        np.array([1, 2]),
        np.array([5, 6]),
        np.array([0.3, 0.3]),
        np.zeros((2, 2)),
        np.array([0.5, 0.0]),
        np.ones(2),
    )
    expected = 1 / (1 + np.exp(-(BASE + 0.3 + SLOT_BIAS[1] + POSITION_BIAS[2])))
    assert float(one.p_click(0, 0, 0, 1, 2)) == pytest.approx(expected)
    assert float(one.p_click(4, 0, 1, 1, 2)) == pytest.approx(expected)  # interested, but in another category
    assert float(one.p_click(4, 0, 0, 1, 2)) > expected + 0.1
    assert float(one.p_after_click(4, 0, 0)) == pytest.approx(1 / (1 + np.exp(4.2 - 0.5 * 2.0 + 0.8 - 0.5)))


def test_conversions_come_as_often_as_the_truth_says_and_late(tmp_path: Path) -> None:
    made = make_world(users=300, ads=60)
    write_log(made, tmp_path / "soon", 60_000)
    write_log(made, tmp_path / "whole", 60_000, after=7 * DAY)
    soon, whole = (pl.concat([f for split in SPLITS for f in open_prepared(tmp_path / name).frames(split)]) for name in ("soon", "whole"))
    assert soon["label"].equals(whole["label"])
    assert (whole["label"] - whole["conversion"]).min() == 0
    assert whole["conversion_maturity"].unique().to_list() == [1.0]
    for frame, seen in ((whole, pl.col("true_conversion")), (soon, pl.col("true_conversion") * pl.col("conversion_maturity"))):
        for some in (
            frame,
            frame.filter(pl.col("ts") >= START + 27 * DAY),
            frame.filter(pl.col("user.age") == "55+") if "user.age" in frame else frame,
        ):
            expected = float(some.select(seen.sum()).item())
            assert abs(some["conversion"].sum() - expected) < 4 * expected**0.5
    late = soon.filter(pl.col("ts") >= START + 27 * DAY)
    assert late["conversion_maturity"].mean() < 0.7


def test_a_seed_repeats(tmp_path: Path, written: tuple[Prepared, pl.DataFrame]) -> None:
    assert all(np.array_equal(a, b) for a, b in zip(vars(world()).values(), vars(world()).values(), strict=True))
    assert not np.array_equal(world(8).interests, world().interests)
    assert write(tmp_path / "again").equals(written[1])
    assert not write(tmp_path / "other", seed=8).equals(written[1])


def test_interests_drift(written: tuple[Prepared, pl.DataFrame]) -> None:
    days = make_world(users=200, ads=5).interests
    assert days.shape == (DAYS, 200, len(CATEGORIES))
    correlation = [np.corrcoef(days[0].ravel(), days[later].ravel())[0, 1] for later in (1, 5, 29)]
    assert 0.8 < correlation[0] < 1.0
    assert correlation[0] > correlation[1] > correlation[2]
    features = {ad.ad_id: ad.features for ad in ads(written[0])}
    assert len(features) == 30
    assert all(set(f) == {"category", "brand"} for f in features.values())


def test_a_world_goes_on_after_its_log() -> None:
    later = make_world(users=40, ads=50, later=20)
    assert later.interests.shape == (DAYS + 20, 40, len(CATEGORIES))
    live = [later.live(day) for day in range(DAYS + 20)]
    assert all(len(ads) == 50 for ads in live)
    assert all(np.array_equal(ads, np.arange(50)) for ads in live[:DAYS])
    for before, after in zip(live[DAYS - 1 :], live[DAYS:], strict=False):
        assert len(np.setdiff1d(before, after)) == len(np.setdiff1d(after, before)) == 3
    assert len(later.ads()) == 50
    # Fashion is what all users share of a day's change; before the log's end there is none.
    shared = [(later.interests[day] - later.interests[day - 1]).mean(0) for day in (5, DAYS + 5)]
    assert np.abs(shared[1]).mean() > 3 * np.abs(shared[0]).mean()
