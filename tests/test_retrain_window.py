"""Windows of a log that are not fit to train on."""

import re
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import small_log

from training.datasets.log import ImpressionLog, open_log
from training.retrain.data_checks import Limits, PastLog, Profile, Seen, gaps, profile, slices, violations
from training.train_settings import TrainError

BEFORE = PastLog(rows=1800, click_rate=0.5, varied={"context.slot": True, "user.age": True, "ad.price": True, "history": True})


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log.write(tmp_path_factory.mktemp("log"))


def seen(log: ImpressionLog) -> Profile:
    return profile(log, slices(log))


def test_a_profile_says_what_is_in_a_window(log: Path) -> None:
    found = seen(open_log(log))
    frame = pl.concat(map(pl.read_parquet, small_log.hours_of(log)))
    assert found.rows == {"train": 1440, "valid": 180, "test": 180}
    assert sum(found.clicks.values()) == frame["label"].sum()
    assert (found.first, found.last) == (frame["ts"].min(), frame["ts"].max())
    assert found.hours == {small_log.START // 3600 + hour: 45 for hour in range(40)}
    assert found.duplicates == 0
    assert found.fields["user.age"] == Seen(len(frame["user.age"].drop_nulls()) / 1800, "25", True)
    assert found.fields["user.interests"].known == (frame["user.interests"].list.len() > 0).mean()
    assert found.fields["history"].varied
    assert found.click_rate == frame["label"].mean()


def test_a_sound_window_has_nothing_against_it(log: Path) -> None:
    assert violations(seen(open_log(log)), BEFORE, Limits()) == []
    assert violations(seen(open_log(log)), PastLog(), Limits()) == []


def labels(value: int) -> Callable[[pl.DataFrame], pl.DataFrame]:
    return lambda frame: frame.with_columns(label=pl.lit(value, pl.Int8))


def every_third(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.gather_every(3)


def slot(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.lit("feed").alias("context.slot"))


def price(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.lit(float("nan")).alias("ad.price"))


def age(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.drop("user.age")


def history(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col("history", "history_revisions").list.head(0))


def twice(frame: pl.DataFrame) -> pl.DataFrame:
    return pl.concat([frame, frame.head(1)])


def rarely(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(label=(pl.int_range(pl.len()) % 9 == 0).cast(pl.Int8))


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (labels(0), r"^all 1,800 labels of the window are 0$"),
        (labels(1), r"^all 1,800 labels of the window are 1$"),
        (rarely, r"^the click rate is 11\.11%, 0\.22 times the 50\.00% that .*; click_rate_factor allows 0\.33 to 3\.00$"),
        (slot, r"^context\.slot is 'feed' in all 100% of the rows that have it, .* --set constant=context\.slot$"),
        (price, r"^ad\.price is missing in all rows, and it had several values before"),
        (age, r"^user\.age is missing in all rows"),
        (history, r"^history is missing in all rows"),
        (every_third, r"^600 rows, 33% of the 1,800 in the window of the same length before it; rows_share asks for 50%$"),
        (twice, r"^40 rows \(2\.17%\) repeat the request and position of another; most_duplicates is 0\.10%$"),
    ],
)
def test_a_poisoned_window_is_refused_with_its_numbers(
    tmp_path: Path, poison: Callable[[pl.DataFrame], pl.DataFrame], message: str
) -> None:
    poisoned = small_log.rewrite(small_log.write(tmp_path / "log"), poison)
    limits = Limits(least_rows=500)
    [reason] = violations(seen(open_log(poisoned)), BEFORE, limits)
    assert re.search(message, reason), reason


def test_a_field_that_may_be_constant_is_let_through(tmp_path: Path) -> None:
    poisoned = small_log.rewrite(small_log.write(tmp_path / "log"), lambda frame: price(slot(frame)))
    window = seen(open_log(poisoned))
    assert len(violations(window, BEFORE, Limits(constant="ad.price"))) == 1
    assert violations(window, BEFORE, Limits(constant="context.slot, ad.price")) == []


def test_hours_that_are_gone_are_refused(tmp_path: Path) -> None:
    whole = small_log.write(tmp_path / "log")
    for path in small_log.hours_of(whole)[10:30]:
        path.unlink()
    [reason] = violations(seen(open_log(whole)), PastLog(), Limits(least_rows=500))
    assert reason.startswith("20 of 38 hours have gaps: 2025-11-22 10:00 with 0 rows instead of about 45, 2025-11-22 11:00 with 0")
    assert reason.endswith("and 17 more; rows_share is 50%, most_gaps 2.0% of the hours")


def test_a_slice_of_one_class_is_refused(tmp_path: Path) -> None:
    log = small_log.write(tmp_path / "log")
    for path in small_log.hours_of(log)[-5:]:
        labels(0)(pl.read_parquet(path)).write_parquet(path)
    [reason] = violations(seen(open_log(log)), PastLog(), Limits())
    assert reason == "all 180 labels of the newest slice, which is held out, are 0"


def test_quiet_nights_are_no_gaps_and_a_quiet_noon_is_one() -> None:
    hours = {day * 24 + hour: 30 if hour < 6 else 300 for day in range(5) for hour in range(24)}
    assert gaps(hours, 0.5) == ([], 118)
    assert gaps({**hours, 60: 100}, 0.5) == ([(60, 100, 300.0)], 118)
    del hours[50]  # a night's hour
    assert gaps(hours, 0.5) == ([(50, 0, 30.0)], 118)
    # Of a day alone nobody knows what is usual at night.
    assert len(gaps({hour: rows for hour, rows in hours.items() if hour < 24}, 0.5)[0]) == 5


def test_chance_and_cut_hours_are_no_gaps() -> None:
    assert gaps({0: 1, 1: 9, 2: 4, 3: 12, 4: 9, 5: 0}, 0.5) == ([], 4)
    assert gaps({0: 1, 1: 100, 2: 100, 3: 1}, 0.5) == ([], 2)
    assert gaps({}, 0.5) == ([], 0)


@pytest.mark.parametrize(
    ("setting", "value"), [("rows_share", 1.5), ("least_rows", 0), ("click_rate_factor", 0.5), ("most_gaps", float("nan"))]
)
def test_impossible_limits_are_a_sentence(setting: str, value: float) -> None:
    with pytest.raises(TrainError, match=f"{setting} is {value!r}; it must be"):
        Limits(**{setting: value})
