import statistics
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st

from features.encode import Encoder, Request, encode_request
from features.vocabulary import Moments, Vocabularies, parse_vocabularies
from tests.test_datasets import patient
from training.datasets.ads import ad_table
from training.datasets.encoded import Rows, encode_split
from training.datasets.prepared import DataError, Prepared, open_prepared
from training.datasets.spread import NOTHING, Spread
from training.datasets.vocabularies import learn_vocabularies
from training.networks.contract import Part


def values(data: Prepared, name: str) -> tuple[str, ...]:
    return learn_vocabularies(data).categories[name].values


def laid_out(part: Part) -> tuple[np.ndarray, np.ndarray]:
    rows = slice(None) if part.rows is None else part.rows
    return part.ids[rows].numpy(), part.numbers[rows].numpy()


def write(folder: Path, text: str, **splits: dict[str, Any]) -> Prepared:
    (folder / "schema.toml").write_text(text)
    for split, columns in splits.items():
        (folder / split).mkdir()
        types = {"label": pl.Int8, "history": pl.List(pl.String), "user.age": pl.String, "ad.price": pl.Float64}
        pl.DataFrame(columns, schema_overrides={name: kind for name, kind in types.items() if name in columns}).write_parquet(
            folder / split / "0.parquet"
        )
    return open_prepared(folder)


SMALLEST = 'name = "s"\n[user.age]\nkind = "category"\n[ad.ad_id]\nkind = "category"\n[ad.price]\nkind = "number"\ntransform = "standard"\n'
ROWS = {
    "label": [1, 0, 1, 0, 0],
    "user_id": list("uvuvw"),
    "ad_id": ["c", "a", "b", "b", "c"],
    "user.age": ["40", "9", None, "40", "30"],
    "ad.price": [1.0, 2.0, None, 6.0, float("nan")],
}


def test_values_are_learned_by_frequency_and_then_by_the_value(tmp_path: Path) -> None:
    data = write(tmp_path, SMALLEST, train=ROWS)
    assert values(data, "ad_id") == ("b", "c", "a")
    assert values(data, "age") == ("40", "30", "9")
    # 1, 2, 6: mean 3, variance (4 + 1 + 9) / 3
    assert learn_vocabularies(data).moments == {"ad.price": Moments(3.0, pytest.approx((14 / 3) ** 0.5))}


@pytest.mark.parametrize("rule", ["min_count = 2", "max_size = 1"])
def test_rare_values_are_unknown(tmp_path: Path, rule: str) -> None:
    text = SMALLEST.replace('[user.age]\nkind = "category"', f'[user.age]\nkind = "category"\n{rule}')
    data = write(tmp_path, text, train=ROWS)
    assert values(data, "age") == ("40",)
    rows = encode_split(data, "train", Encoder(data.schema, learn_vocabularies(data)))
    assert rows.user.ids[:, 0].tolist() == [2, 1, 0, 2, 1]


def test_behaviours_make_an_ad_known_but_not_frequent(tmp_path: Path) -> None:
    text = SMALLEST.replace('name = "s"', 'name = "s"\nhistory = { length = 2, fields = ["ad_id"] }')
    data = write(tmp_path, text, train={**ROWS, "history": [["z"], ["z", "a"], ["z"], None, ["z", "b", "c"]]})
    assert values(data, "ad_id") == ("b", "c", "a", "z")


def test_what_valid_and_test_hold_is_not_learned(tmp_path: Path) -> None:
    later = {**ROWS, "ad_id": list("xxxxx"), "user.age": ["99"] * 5, "ad.price": [99.0] * 5}
    data = write(tmp_path, SMALLEST, train=ROWS, valid=later, test=later)
    vocabularies = learn_vocabularies(data)
    assert values(data, "ad_id") == ("b", "c", "a")
    rows = encode_split(data, "test", Encoder(data.schema, vocabularies))
    assert rows.ad.ids.tolist() == [[1]] * 5
    assert rows.user.ids.tolist() == [[1]] * 5


def test_ids_are_kept_as_narrow_as_they_fit_and_come_out_as_int64(tmp_path: Path) -> None:
    text = SMALLEST.replace('[ad.ad_id]\nkind = "category"', '[ad.ad_id]\nkind = "category"\nbuckets = 1000000')
    columns = {name: each * 40 for name, each in ROWS.items()} | {"ad_id": [f"ad {n}" for n in range(200)]}
    data = write(tmp_path, text, train=columns)
    pl.read_parquet(tmp_path / "train" / "0.parquet").head(0).write_parquet(tmp_path / "train" / "1.parquet")  # a width of its own
    encoder = Encoder(data.schema, learn_vocabularies(data))
    rows = encode_split(data, "train", encoder)
    assert (rows.user.ids.dtype, rows.ad.ids.dtype) == (np.uint8, np.uint32)
    asked = np.array([2, 7, 6])
    batch = rows.batch(asked)
    expected = encoder.encode("ad", {"ad_id": ["ad 2", "ad 7", "ad 6"]}, 3).ids[:, None]
    assert expected.max() > 2**16
    assert (batch.ad.ids.numpy().dtype, batch.user.ids.numpy().dtype) == (np.int64, np.int64)
    assert np.array_equal(batch.ad.ids.numpy(), expected)
    assert batch.user.ids[:, 0].tolist() == [0, 0, 4]  # none, none, and "9", the third of 40, 30 and 9
    assert rows.take(asked).batch(np.arange(3)).ad.ids.tolist() == expected.tolist()


THIRDS = [0.1 + 0.2, 0.3, 0.1 * 3, 0.3, 0.3]


@pytest.mark.parametrize(
    "prices", [[0.1] * 5, [19.99] * 5, [1.764e18] * 5, THIRDS, [float(np.float32(19.99)), 19.99, 19.99, None, 19.99], [7.0] + [None] * 4]
)
def test_a_number_that_is_always_the_same_weighs_nothing(tmp_path: Path, prices: list[float | None]) -> None:
    data = write(tmp_path, SMALLEST, train={**ROWS, "ad.price": prices})
    vocabularies = learn_vocabularies(data)
    assert vocabularies.moments["ad.price"] == Moments(pytest.approx(prices[0], rel=1e-7), 1.0, 0.0)
    again = parse_vocabularies(vocabularies.to_json(), data.schema)
    assert again.moments == vocabularies.moments
    encoder = Encoder(data.schema, again)
    served = [encoder.encode_one("ad", {"price": price}).numbers[0, 0] for price in (prices[0], 21.99, -1e30, None)]
    assert served == [0.0] * 4


@pytest.mark.parametrize("mean", [0.0, 20.0, -1e6, 1.764e9, 1.764e12, 1e15])
def test_a_deviation_does_not_cancel_far_from_0(tmp_path: Path, mean: float) -> None:
    spread = np.random.default_rng(0).integers(0, 101, 3000).astype(np.float64)
    columns = {name: values * 600 for name, values in ROWS.items() if name != "ad.price"}
    data = write(tmp_path, SMALLEST, train={**columns, "ad.price": mean + spread})
    whole = pl.read_parquet(tmp_path / "train" / "0.parquet")
    for i, (start, stop) in enumerate([(0, 1), (1, 2000), (2000, 3000)]):  # a file of one row among them
        whole[start:stop].write_parquet(tmp_path / "train" / f"{i}.parquet")
    moments = learn_vocabularies(data).moments["ad.price"]
    expected = statistics.fmean(int(x) for x in spread), statistics.pstdev(int(x) for x in spread)
    assert (moments.mean - mean, moments.deviation) == pytest.approx(expected, rel=1e-3 if mean == 1e15 else 1e-6)
    assert not moments.constant
    again = parse_vocabularies(learn_vocabularies(data).to_json(), data.schema)
    encoded = Encoder(data.schema, again).encode("ad", {"price": (mean + spread).tolist()}, 3000).numbers[:, 0]
    assert (encoded.mean(), encoded.std()) == pytest.approx((0.0, 1.0), abs=1e-3)


@patient
@given(st.lists(st.lists(st.floats(-1e9, 1e9, width=32), max_size=5), min_size=1, max_size=6))
def test_blocks_make_the_same_spread_as_one(blocks: list[list[float]]) -> None:
    numbers = [x for block in blocks for x in block]
    found = NOTHING
    for block in blocks:
        found = found.beside(Spread.of(np.array(block)))
    assert found.count == len(numbers)
    if numbers:
        scale = max(map(abs, numbers))
        assert found.mean == pytest.approx(statistics.fmean(numbers), abs=1e-12 * scale + 1e-300)
        assert found.deviation == pytest.approx(statistics.pstdev(numbers), abs=1e-7 * scale + 1e-300)
        assert found.constant == (max(numbers) - min(numbers) <= 16 * 2**-52 * scale)


def test_bundles_of_before_tell_a_constant_by_its_moments() -> None:
    text = small.SCHEMA
    for moments, served in (
        ([19.99, 3.4e-7], 0.0),
        ([0.1, 2e-10], 0.0),
        ([0.0, 1.0], 21.99),
        ([20.0, 0.1], 19.9),
        ([1e9, 28.9, 1.0], None),
    ):
        json = small.vocabularies().to_json().replace("[20.0,5.0]", str(moments).replace(" ", ""))
        vocabularies = parse_vocabularies(json, small.schema(text))
        assert vocabularies.to_json() == json
        number = Encoder(small.schema(text), vocabularies).encode_one("user", {"income": 21.99}).numbers[0, 0]
        assert number == pytest.approx((21.99 - 1e9) / 28.9 if served is None else served, rel=1e-4)


def test_a_constant_of_the_live_version_is_learned_anew_when_it_varies(tmp_path: Path) -> None:
    data = write(tmp_path, SMALLEST, train=ROWS)
    learned = learn_vocabularies(data)
    base = Vocabularies(learned.categories, {"ad.price": Moments(19.99, 1.0, 0.0)})
    assert learn_vocabularies(data, base).moments == learned.moments
    base = Vocabularies(learned.categories, {"ad.price": Moments(4.0, 5.0)})
    assert learn_vocabularies(data, base).moments == base.moments


@pytest.mark.parametrize("number", [float("inf"), -float("inf"), 1e39])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, number: float) -> None:
    data = write(tmp_path, SMALLEST, train={**ROWS, "ad.price": [1.0, 2.0, None, number, 1.0]})
    with pytest.raises(DataError, match=r"0\.parquet: column ad\.price holds a number that is not finite"):
        learn_vocabularies(data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"user.age": None}, "no column holds the values of user.age"),
        ({"ad.price": None}, "the train split has no number for ad.price"),
        ({"ad.price": [None] * 5}, "the train split has no number for ad.price"),
        ({"user.age": [1, 2, 3, 4, 5]}, r"0\.parquet: column user\.age is Int64, expected String"),
        ({"label": None}, "column label is missing; it has user_id"),
        ({"ad_id": None}, "column ad_id is missing"),
        ({"label": [0, 1, 2, 1, 0]}, "1 labels are not 0 or 1, the first is 2"),
        ({"label": [0, 1, None, None, 0]}, "2 labels are not 0 or 1, the first is None"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    columns = {name: column for name, column in (ROWS | changed).items() if column is not None}
    (tmp_path / "schema.toml").write_text(SMALLEST)
    (tmp_path / "train").mkdir()
    frame = pl.DataFrame(columns)
    if "label" in columns:
        frame = frame.with_columns(pl.col("label").cast(pl.Int8))
    if "ad.price" in columns:
        frame = frame.with_columns(pl.col("ad.price").cast(pl.Float64))
    frame.write_parquet(tmp_path / "train" / "0.parquet")
    with pytest.raises(DataError, match=message):
        learn_vocabularies(open_prepared(tmp_path))


def test_a_split_without_rows_or_files_is_refused(tmp_path: Path) -> None:
    empty: dict[str, Any] = {name: [] for name in ROWS}
    data = write(tmp_path, SMALLEST, train=ROWS)
    encoder = Encoder(data.schema, learn_vocabularies(data))
    with pytest.raises(DataError, match=r"valid has no \.parquet file"):
        encode_split(data, "valid", encoder)
    (tmp_path / "valid").mkdir()
    types = {"label": pl.Int8, "user_id": pl.String, "ad_id": pl.String, "user.age": pl.String, "ad.price": pl.Float64}
    pl.DataFrame(empty, schema=types).write_parquet(tmp_path / "valid" / "0.parquet")
    with pytest.raises(DataError, match=r"the valid split of .* has no row"):
        encode_split(data, "valid", encoder)
    (tmp_path / "valid" / "0.parquet").write_text("label,ad_id\n")
    with pytest.raises(DataError, match=r"0\.parquet cannot be read as parquet"):
        encode_split(data, "valid", encoder)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Encoder, Rows]:
    data = small.data_set(tmp_path_factory.mktemp("small"))
    encoder = Encoder(data.schema, learn_vocabularies(data))
    return data, encoder, encode_split(data, "test", encoder)


def test_every_row_is_encoded_as_the_service_would_encode_it(encoded: tuple[Prepared, Encoder, Rows]) -> None:
    data, encoder, rows = encoded
    table = ad_table(data, encoder)
    frame = next(data.frames("test"))
    longest, absent = 0, 0
    for i, row in enumerate(frame.iter_rows(named=True)):
        user = {name: row[f"user.{name}"] for name in ("age", "interests", "income") if row[f"user.{name}"] is not None}
        asked = Request(row["user_id"], user, {"slot": row["context.slot"]}, row["history"], [row["ad_id"]])
        feeds, known = encode_request(table, asked)
        for name, part in zip(("user", "history", "ad"), rows.batch(np.array([i]))[:3], strict=True):
            ids, numbers = laid_out(part)
            assert np.array_equal(ids, feeds[f"{name}_ids"]), (i, name)
            assert np.array_equal(numbers, feeds[f"{name}_numbers"]), (i, name)
        longest, absent = max(longest, len(row["history"])), absent + (f"a{small.ADS}" in row["history"][-4:])
        assert known.all()
    assert longest > 4
    assert absent > 0  # an ad that ads.parquet lacks stands in histories too
    assert rows.labels.tolist() == frame["label"].to_list()
    users = frame["user_id"].to_list()
    assert [rows.users[i] == rows.users[0] for i in range(len(rows))] == [user == users[0] for user in users]


def test_a_batch_is_its_rows_padded_to_the_longest(encoded: tuple[Prepared, Encoder, Rows]) -> None:
    _, _, rows = encoded
    lengths = (rows.history > 0).sum(1)
    for chosen in (np.flatnonzero(lengths <= 2)[[3, 0, 5]], np.array([7, 2, 11, 4]), np.flatnonzero(lengths == 0)[:2]):
        batch = [laid_out(part) for part in rows.batch(chosen)[:3]]
        ones = [[laid_out(part) for part in rows.batch(np.array([row]))[:3]] for row in chosen]
        assert batch[1][0].shape[1] == max(1, lengths[chosen].max())
        for at, one in enumerate(ones):
            for (ids, numbers), (one_ids, one_numbers) in zip(batch, one, strict=True):
                width = one_ids.shape[1]
                assert np.array_equal(ids[at][:width], one_ids[0])
                assert np.array_equal(numbers[at][:width], one_numbers[0])
                assert not ids[at][width:].any()


def test_an_empty_file_among_others_is_no_row(tmp_path: Path, encoded: tuple[Prepared, Encoder, Rows]) -> None:
    data = small.data_set(tmp_path)
    pl.read_parquet(tmp_path / "test" / "0.parquet").clear().write_parquet(tmp_path / "test" / "1.parquet")
    rows = encode_split(data, "test", encoded[1])
    assert np.array_equal(rows.history, encoded[2].history)
    assert np.array_equal(rows.ad.ids, encoded[2].ad.ids)
