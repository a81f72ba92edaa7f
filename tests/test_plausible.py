"""What data look like that nobody has said of them: missing values, nobodies, padding, times."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from tests.test_datasets import refuses, rows
from training.datasets import csv_table
from training.datasets.prepared import DataError, open_prepared
from training.datasets.states import user_states

ZEROS = "00000000-0000-0000-0000-000000000000"
SCHEMA = """
name = "shop"
[user.user_id]
kind = "category"
[context.os]
kind = "category"
[ad.ad_id]
kind = "category"
[ad.price]
kind = "number"
[ad.topics]
kind = "list"
length = 5
"""
HISTORY = '[history]\nlength = 3\nfields = ["ad_id"]\n'
HEADER = "click,user,ad,os,price,topics,time,past\n"


def line(i: int, **cells: object) -> str:
    known = {
        "click": i % 2,
        "user": f"u{i}",
        "ad": f"a{i % 7}",
        "os": "ios",
        "price": 1,
        "topics": "x|y",
        "time": 1_760_000_000 + i,
        "past": "",
    }
    return ",".join(map(str, {**known, **cells}.values())) + "\n"


def prepare(folder: Path, table: str | pl.DataFrame, settings: str = "", schema: str = SCHEMA) -> list[str]:
    """Prepare a table as `out`; the doubts about it."""
    doubts: list[str] = []
    folder.mkdir(exist_ok=True)
    if isinstance(table, str):
        (folder / "log.csv").write_text(HEADER + table)
    else:
        table.write_parquet(folder / "log.csv")
    (folder / "my.toml").write_text(f'{schema}\n[table]\nlabel = "click"\nuser_id = "user"\nad_id = "ad"\n{settings}\n')
    csv_table.prepare(folder / "log.csv", folder / "out", folder / "my.toml", doubts=doubts.append)
    return doubts


def refused(folder: Path, table: str, message: str, settings: str = "", schema: str = SCHEMA) -> None:
    (folder / "log.csv").write_text(HEADER + table)
    (folder / "my.toml").write_text(f'{schema}\n[table]\nlabel = "click"\nuser_id = "user"\nad_id = "ad"\n{settings}\n')
    refuses(csv_table.prepare, folder / "log.csv", folder / "out", message, folder / "my.toml")


def test_what_means_missing_is_missing_in_every_column(tmp_path: Path) -> None:
    table = line(0, user="NULL", os="\\N", price="\\N", topics="x|NULL|-1") + line(1, user="-1.0", os="-1", price="-1.00", topics="NULL")
    table += line(2, user=ZEROS, os="NaN", price="nan") + line(3) * 20
    doubts = prepare(tmp_path, table, f'missing = ["\\\\N", "NULL", "-1.0", "NaN"]\nnobody = ["{ZEROS}"]')
    assert rows(tmp_path / "out").select("user_id", "context.os", "ad.price").rows()[:4] == [
        *([("", None, None)] * 3),
        ("u3", "ios", 1.0),
    ]
    assert rows(tmp_path / "out")["ad.topics"].to_list()[:2] == [["x"], []]
    assert [user for user, _ in user_states(open_prepared(tmp_path / "out"))] == ["u3"]
    assert doubts == []
    (tmp_path / "ads").mkdir()
    refused(
        tmp_path / "ads", line(0) + line(1, ad="NULL") + line(2) * 9, "log.csv, line 3: ad is 'NULL'; expected an ad", 'missing = "NULL"'
    )


def test_a_field_may_have_missing_values_of_its_own(tmp_path: Path) -> None:
    schema = SCHEMA.replace('kind = "number"', 'kind = "number"\nmissing_values = ["-1"]')
    prepare(tmp_path, line(0, os="-1", price="-1.0") + line(1) * 20, "missing = []", schema)
    assert rows(tmp_path / "out").select("context.os", "ad.price").rows()[0] == ("-1", None)
    table = pl.read_csv((HEADER + "".join(line(i, price=[-999.9, 1.5][i % 2]) for i in range(20))).encode())
    prepare(tmp_path / "bits", table.cast({"price": pl.Float32}), schema=schema.replace("-1", "-999.9"))
    assert rows(tmp_path / "bits" / "out")["ad.price"].to_list() == [None, 1.5] * 10


def test_what_means_missing_is_missing_in_rows_and_ads_of_others(tmp_path: Path) -> None:
    """Such as a data set that was prepared without it, and is measured by a bundle that was told so."""
    table = line(0, os="NULL", price=-1, topics="x|NULL") * 10 + line(1) * 10
    prepare(tmp_path, table, "missing = []")
    prepare(tmp_path / "told", table, 'missing = ["NULL", "-1"]')
    data = replace(open_prepared(tmp_path / "out"), schema=open_prepared(tmp_path / "told" / "out").schema)
    found, ads = next(data.frames("train")), data.table("ad")
    assert ads is not None
    assert found.select("context.os", "ad.price", "ad.topics").row(0) == (None, None, ["x"])
    assert ads.select("ad.price", "ad.topics").row(0) == (None, ["x"])


def test_nobody_has_no_history(tmp_path: Path) -> None:
    table = "".join(line(i, click=1, user=ZEROS if i % 2 else "u") for i in range(20))
    prepare(tmp_path, table, f'nobody = "{ZEROS}"', SCHEMA + HISTORY)
    histories = rows(tmp_path / "out")["history"].to_list()
    assert histories[1::2] == [[]] * 10
    assert histories[4] == ["a0", "a2"]
    assert pl.read_parquet(tmp_path / "out" / "histories.parquet")["user_id"].to_list() == ["u"]


def test_values_that_look_missing_are_told(tmp_path: Path) -> None:
    table = "".join(line(i, os="NULL" if i % 10 == 0 else "ios", price=-1 if i % 5 == 0 else 3, topics="x|0|0") for i in range(100))
    table += line(100, user="None", ad="null") + line(101, user="None") + line(102, user=" ", ad="<NA>") + line(103, user=" ")
    message = "\n".join(prepare(tmp_path, table))
    for part in (
        "'None' 1.9%",
        'nobody = ["None", " "]',
        "1 rows have the ad 'null'",
        "1 rows have the ad '<NA>'",
        "context.os has 'NULL' (9.6%) … missing = [\"NULL\"]",
        'ad.price is -1 in 19.2% of the rows … missing_values = ["-1"] in [ad.price]',
        "96% of the lists of ad.topics end with a value twice, mostly '0'",
    ):
        for piece in part.split(" … "):
            assert piece in message


def test_a_user_with_many_rows_is_told(tmp_path: Path) -> None:
    table = "".join(line(i, user="a99f214a" if i % 3 else f"u{i}") for i in range(300))
    (doubt,) = prepare(tmp_path, table)
    assert "'a99f214a' 66.7%" in doubt
    assert 'nobody = ["a99f214a"], else nobody = []' in doubt
    for settings in ("nobody = []", 'nobody = ["a99f214a"]'):
        assert prepare(tmp_path / settings[-5:-2], table, settings) == []


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (("ios  ", "android"), "context.os has values that begin or end with blanks, such as 'ios  '"),
        (("01234", "1234"), "context.os has '01234' and '1234', which are two values"),
        (("True", "0"), "context.os has true or false beside 0 or 1"),
    ],
)
def test_one_value_in_two_spellings_is_told(tmp_path: Path, cells: tuple[str, str], message: str) -> None:
    (doubt,) = prepare(tmp_path, "".join(line(i, os=cells[i % 2]) for i in range(20)))
    assert doubt.startswith(message)
    assert prepare(tmp_path / "one", "".join(line(i, os=cells[0].strip()) for i in range(20))) == []


def test_lists_in_brackets_are_told(tmp_path: Path) -> None:
    (doubt,) = prepare(tmp_path, "".join(line(i, topics="['x'; 'y']") for i in range(20)), 'list_separator = "; "')
    assert """100% of the lists of ad.topics are written in brackets, as "['x'|'y']\"""" in doubt


def test_usual_data_raise_no_doubt(tmp_path: Path) -> None:
    table = "".join(line(i, user=f"u{i % 9}", past=f"a{i % 5}|a{i % 7}|a{i % 3}") for i in range(200))
    assert prepare(tmp_path, table, 'ts = "time"\nhistory = "past"', SCHEMA + HISTORY) == []


@pytest.mark.parametrize("past", ["11|12|0|0|0", "0|0|0|11|12"])
def test_padding_is_dropped_before_the_newest_are_kept(tmp_path: Path, past: str) -> None:
    table, settings = "".join(line(i, past=past) for i in range(20)), 'history = "past"'
    refused(
        tmp_path, table, "'0' is in 100% of the histories in column past … padding = [\"0\"], else padding = []", settings, SCHEMA + HISTORY
    )
    prepare(tmp_path, table, f'{settings}\npadding = "0"', SCHEMA + HISTORY)
    assert rows(tmp_path / "out")["history"].to_list() == [["11", "12"]] * 20
    prepare(tmp_path / "meant", table, f"{settings}\npadding = []", SCHEMA + HISTORY)
    assert rows(tmp_path / "meant" / "out")["history"][0].to_list() == past.split("|")[-3:]


def test_padding_that_is_an_ad_too_is_told(tmp_path: Path) -> None:
    table = "".join(line(i, ad=i % 5, past=f"0|0|{i % 5}") for i in range(20))
    (doubt,) = prepare(tmp_path, table, 'history = "past"', SCHEMA + HISTORY)
    assert "'0' is in 100% of the histories in column past, mostly at an end" in doubt


# Times


@pytest.mark.parametrize(
    ("settings", "time", "expected"),
    [
        ('ts_format = "%y%m%d%H"', "14102107", datetime(2014, 10, 21, 7, tzinfo=UTC)),
        ('ts_format = "%Y%m%d"', "20251101", datetime(2025, 11, 1, tzinfo=UTC)),
        ('ts_format = "%Y%m%d%H%M%S%f"', "20130606000104007", datetime(2013, 6, 6, 0, 1, 4, tzinfo=UTC)),
        ('ts_format = ["%d/%m/%Y", "%m/%d/%Y %I:%M:%S %p"]', "11/15/2019 8:00:22 PM", datetime(2019, 11, 15, 20, 0, 22, tzinfo=UTC)),
        ('ts_format = "%d/%b/%Y:%H:%M:%S %z"', "10/Oct/2025:13:55:36 +0200", datetime(2025, 10, 10, 11, 55, 36, tzinfo=UTC)),
        ('ts_unit = "ns"', 1_760_000_000_999_999_999, datetime.fromtimestamp(1_760_000_000, UTC)),
        ("", "2025-11-01 08:00", datetime(2025, 11, 1, 8, tzinfo=UTC)),
    ],
)
def test_times_are_read_as_they_are_said_to_be(tmp_path: Path, settings: str, time: object, expected: datetime) -> None:
    prepare(tmp_path, "".join(line(i, time=time) for i in range(20)), f'ts = "time"\n{settings}')
    assert set(rows(tmp_path / "out")["ts"]) == {int(expected.timestamp())}


@pytest.mark.parametrize("dtype", [pl.Int64, pl.UInt32, pl.Float64, pl.String])
def test_times_of_parquet_are_read_in_a_format(tmp_path: Path, dtype: type[pl.DataType]) -> None:
    frame = pl.read_csv((HEADER + "".join(line(i, time=25110100 + i) for i in range(20))).encode()).cast({"time": dtype})
    prepare(tmp_path, frame, 'ts = "time"\nts_format = "%y%m%d%H"')
    assert rows(tmp_path / "out")["ts"].to_list() == [1_761_955_200 + 3600 * i for i in range(20)]


@pytest.mark.parametrize(
    ("settings", "time", "hint"),
    [
        ("", 14102100, 'yymmddHH: ts_format = "%y%m%d%H" (2014-10-21 00:00)'),
        ("", 20251101, 'yyyymmdd: ts_format = "%Y%m%d" (2025-11-01 00:00)'),
        ("", 2025110100, 'yyyymmddHH: ts_format = "%Y%m%d%H"'),
        ("", 202511010800, 'yyyymmddHHMM: ts_format = "%Y%m%d%H%M"'),
        ("", 20251101080000, 'yyyymmddHHMMSS: ts_format = "%Y%m%d%H%M%S"'),
        ('ts_unit = "ms"', 202511010800, 'yyyymmddHHMM: ts_format = "%Y%m%d%H%M"'),
        ('ts_unit = "us"', 20251101080000, 'yyyymmddHHMMSS: ts_format = "%Y%m%d%H%M%S"'),
        ('ts_unit = "us"', 20130606000100000, 'yyyymmddHHMMSSf: ts_format = "%Y%m%d%H%M%S%f"'),
        ("", 1_760_000_000_000, 'ts_unit = "ms"'),
        ("", 1_760_000_000_000_000_000, 'ts_unit = "ns"'),
        ('ts_unit = "ms"', 1_760_000_000, 'ts_unit = "s"'),
        ('ts_unit = "us"', 1_760_000_000_000, 'ts_unit = "ms"'),
    ],
)
@pytest.mark.parametrize("parquet", [False, True])
def test_numbers_that_are_times_written_otherwise_are_refused(tmp_path: Path, settings: str, time: int, hint: str, parquet: bool) -> None:
    text = "".join(line(i, time=time + i) for i in range(20))
    table = pl.read_csv((HEADER + text).encode()) if parquet else text
    with pytest.raises(DataError, match=r"[12]: time is") as caught:
        prepare(tmp_path, table, f'ts = "time"\n{settings}')
    assert f"it looks like {hint}" in str(caught.value)


@pytest.mark.parametrize(
    ("first", "message"), [(0, "20 of 20 rows have a time before 1990"), (4_000_000_000, "20 of 20 rows have a time after next year")]
)
def test_strange_times_that_may_be_meant_are_told(tmp_path: Path, first: int, message: str) -> None:
    (doubt,) = prepare(tmp_path, "".join(line(i, time=first + i) for i in range(20)), 'ts = "time"')
    assert doubt.startswith(message)


def test_minutes_that_could_be_seconds_are_told(tmp_path: Path) -> None:
    (doubt,) = prepare(tmp_path, "".join(line(i, time=1_306_060_000 + i) for i in range(20)), 'ts = "time"')
    assert "looks like yymmddHHMM, 2013-06-06 00:00 to 2013-06-06 00:19" in doubt
    assert prepare(tmp_path / "hours", "".join(line(i, time=1_306_060_000 + 3600 * i) for i in range(20)), 'ts = "time"') == []


@pytest.mark.parametrize("times", [pl.Series(["1.76198E+09"] * 20), pl.Series([1_760_000_000.0] * 20, dtype=pl.Float32)])
def test_a_time_that_has_lost_digits_is_refused(tmp_path: Path, times: pl.Series) -> None:
    table = pl.read_csv((HEADER + "".join(map(line, range(20)))).encode()).with_columns(time=times)
    with pytest.raises(DataError, match=r"row 1: time is .* has lost digits"):
        prepare(tmp_path, table, 'ts = "time"')


@pytest.mark.parametrize("time", ["1012", "2511010", "noon", "", "31/12/2025"])
def test_a_time_that_is_not_in_the_format_is_refused(tmp_path: Path, time: str) -> None:
    table = "".join(line(i, time=25110100) for i in range(20)) + line(20, time=time)
    refused(tmp_path, table, f"log.csv, line 22: time is '{time}' … written as %y%m%d%H", 'ts = "time"\nts_format = "%y%m%d%H"')


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('ts_format = "%Q"', "ts_format is '%Q', which cannot be read"),
        ('ts_format = "%H:%M"', "ts_format is '%H:%M', which does not tell the year"),
        ("missing = [3]", "missing must be a text or a list of texts, not [3]"),
        ('quote = "ab"', "quote must be one character"),
        ('quoted_newlines = "yes"', "quoted_newlines must be true or false, not 'yes'"),
        ('padding = "0"', "padding is what fills a column of histories up"),
        ('position = "slot"', "position is the column that tells more of a propensity"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, settings: str, message: str) -> None:
    refused(tmp_path, line(0), f"my.toml: [table]: {message}", settings if "ts_format" not in settings else f'ts = "time"\n{settings}')


# Propensities


POLICY = 'propensity = "price"\nposition = "time"\ncandidates = "past"\n'


def test_propensities_are_carried(tmp_path: Path) -> None:
    table = "".join(line(i, ad=f"a{i % 2}", price=0.5, time=1 + i % 3, past="a1|a0") for i in range(20))
    assert prepare(tmp_path, table, POLICY) == []
    data = rows(tmp_path / "out")
    assert data.select("propensity", "position", "candidates").rows()[:2] == [(0.5, 1, ["a1", "a0"]), (0.5, 2, ["a1", "a0"])]
    assert prepare(tmp_path / "all", table, 'propensity = "price"') == []
    (doubt,) = prepare(tmp_path / "off", table.replace(",0.5,", ",0.05,"), 'propensity = "price"')
    assert doubt.startswith("1 / propensity is 20 on average, and 2 ads are in the table")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"price": 0}, "line 22: price is '0'; expected a probability above 0, at most 1"),
        ({"price": 1.5}, "line 22: price is '1.5'; expected a probability above 0, at most 1"),
        ({"price": ""}, "line 22: price is ''; expected a probability above 0, at most 1"),
        ({"time": 0}, "line 22: time is '0'; expected a whole number from 1"),
        ({"time": 1.5}, "line 22: time is '1.5'; expected a whole number from 1"),
        ({"past": "a2"}, "line 22: past is 'a2'; expected the ads that could have been shown"),
        ({"past": "a0|a0"}, "line 22: past is 'a0|a0'; expected the ads that could have been shown"),
        ({"past": ""}, "line 22: past is ''; expected the ads that could have been shown"),
    ],
)
def test_what_is_no_propensity_is_refused_with_its_line(tmp_path: Path, cells: dict[str, object], message: str) -> None:
    good = {"ad": "a0", "price": 0.5, "time": 1, "past": "a1|a0"}
    refused(tmp_path, "".join(line(i, **good) for i in range(20)) + line(20, **{**good, **cells}), message, POLICY)
