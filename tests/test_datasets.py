from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.state import Ad
from training.datasets import criteo, frappe, movielens, open_bandit
from training.datasets.prepared import SPLITS, DataError, open_prepared
from training.datasets.states import ads, user_states

ROOT = Path(__file__).parent.parent


def rows(data: Path, split: str | None = None) -> pl.DataFrame:
    prepared = open_prepared(data)
    return pl.concat([frame for name in ([split] if split else SPLITS) for frame in prepared.frames(name)])


def write(folder: Path, **files: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_dat", ".dat").replace("_csv", ".csv")).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


# A shared machine may take its time.
patient = settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])


def refuses(prepare, source: Path, out: Path, message: str, *more) -> None:
    """The preparation fails with a sentence that holds every word of `message`, and leaves nothing behind."""
    with pytest.raises(DataError) as caught:
        prepare(source, out, *more)
    for part in message.split(" … "):
        assert part in str(caught.value)
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")] == []


# MovieLens

USERS = "1::F::1::10::48067\n2::M::56::16::70072\n"
MOVIES = "10::Amélie (2001)::Comedy|Romance\n20::No Year::Drama\n30::Alien (1979)::Horror\n"
# (user, movie, rating, ts): out of order, with ties, a movie and a user that the tables lack
RATINGS = [
    (1, 10, 5, 100),
    (2, 20, 4, 90),
    (1, 20, 3, 100),
    (1, 30, 4, 100),
    (2, 10, 1, 95),
    (1, 99, 5, 101),
    (2, 30, 5, 300),
    (1, 10, 2, 300),
    (3, 10, 4, 301),
    (1, 20, 4, 302),
]


def ratings_dat(ratings: list[tuple[int, int, int, int]]) -> str:
    return "".join("::".join(map(str, rating)) + "\n" for rating in ratings)


def movielens_source(folder: Path, ratings: list[tuple[int, int, int, int]] = RATINGS, **files: str | bytes) -> Path:
    texts = {"users_dat": USERS, "movies_dat": MOVIES.encode("latin-1"), "ratings_dat": ratings_dat(ratings), **files}
    return write(folder / "source", **texts)


def naive(ratings: list[tuple[int, int, int, int]], length: int = 50) -> list[tuple[int, int, str, str, int, list[str], list[int]]]:
    """The protocol, said as plainly as can be."""
    log = sorted(ratings, key=lambda rating: rating[3])
    past = [[(str(m), at) for u, m, r, at in log[:i] if u == user and r >= 4][-length:] for i, (user, *_) in enumerate(log)]
    return [
        (int(stars >= 4), int(stars == 5), str(user), str(movie), ts, [ad_id for ad_id, _ in before], [at for _, at in before])
        for before, (user, movie, stars, ts) in zip(past, log, strict=True)
    ]


def test_movielens_follows_the_protocol(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    counts = movielens.prepare(movielens_source(tmp_path), tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert counts == {"train": 8, "valid": 1, "test": 1}
    assert seen == [(0, 10), (8, 10), (9, 10), (10, 10)]
    assert rows(tmp_path / "out").rows() == naive(RATINGS)
    assert rows(tmp_path / "out", "test").rows() == naive(RATINGS)[-1:]
    assert rows(tmp_path / "out", "test").rows()[0][:6] == (1, 0, "1", "20", 302, ["10", "30", "99"])


def test_movielens_tables_hold_the_features(tmp_path: Path) -> None:
    movielens.prepare(movielens_source(tmp_path), tmp_path / "out")
    prepared = open_prepared(tmp_path / "out")
    assert prepared.table("user").rows() == [("1", "F", "1", "10"), ("2", "M", "56", "16")]
    assert prepared.table("ad").rows() == [("10", ["Comedy", "Romance"], "2001"), ("20", ["Drama"], None), ("30", ["Horror"], "1979")]


def test_movielens_takes_windows_ends_of_line_and_utf_8(tmp_path: Path) -> None:
    source = movielens_source(tmp_path, users_dat=USERS.replace("\n", "\r\n"), movies_dat=MOVIES.replace("\n", "\r\n").replace("No", "☂"))
    movielens.prepare(source, tmp_path / "out")
    assert open_prepared(tmp_path / "out").table("ad")["ad.genres"].to_list() == [["Comedy", "Romance"], ["Drama"], ["Horror"]]


rating = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(0, 8))


@patient
@given(st.lists(rating, min_size=10, max_size=150))
def test_a_movielens_history_is_the_past_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, ratings) -> None:
    folder = tmp_path_factory.mktemp("ml")
    movielens.prepare(movielens_source(folder, ratings), folder / "out")
    assert rows(folder / "out").rows() == naive(ratings)


def test_a_movielens_history_keeps_the_newest_fifty(tmp_path: Path) -> None:
    movielens.prepare(movielens_source(tmp_path, [(1, movie, 5, movie) for movie in range(1, 71)]), tmp_path / "out")
    assert rows(tmp_path / "out")["history"][-1].to_list() == [str(movie) for movie in range(20, 70)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ratings_dat", "1,10,5,100\n", "ratings.dat, line 1: 1 columns; expected 4"),
        ("ratings_dat", ratings_dat(RATINGS) + "1::10::5\n", "ratings.dat, line 11: 3 columns; expected 4: user_id, ad_id, rating, ts"),
        ("ratings_dat", ratings_dat([*RATINGS[:3], (1, 10, 6, 9)]), "line 4: rating is '6'; expected a whole number from 1 to 5"),
        ("ratings_dat", ratings_dat(RATINGS).replace("::95", "::soon"), "ratings.dat, line 5: ts is 'soon'; expected a whole number"),
        ("ratings_dat", "x::10::5::100\n", "ratings.dat, line 1: user_id is 'x'; expected a whole number"),
        ("ratings_dat", "", "ratings.dat is empty"),
        ("ratings_dat", ratings_dat(RATINGS[:3]), "the valid split would be empty"),
        ("ratings_dat", ratings_dat(RATINGS[:2]).encode() + b"1::\xff::5::100\n", "ratings.dat, line 3: not text in utf-8"),
        ("ratings_dat", ratings_dat(RATINGS).encode("utf-16"), "ratings.dat, line 1: not text in utf-8"),
        ("users_dat", USERS + "1::M::1::1::1\n", "users.dat, line 3: user_id is '1'; expected an id that no earlier line has"),
        ("users_dat", "UserID,Gender\n", "users.dat, line 1: 1 columns; expected 5"),
        ("movies_dat", MOVIES + "ten::Film (1999)::Drama\n", "movies.dat, line 4: ad_id is 'ten'"),
    ],
)
def test_movielens_refuses_what_is_not_movielens(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    refuses(movielens.prepare, movielens_source(tmp_path, **{name: text}), tmp_path / "out", message)


@pytest.mark.parametrize("name", ["ratings.dat", "users.dat", "movies.dat"])
def test_movielens_misses_a_file(tmp_path: Path, name: str) -> None:
    source = movielens_source(tmp_path)
    (source / name).unlink()
    refuses(movielens.prepare, source, tmp_path / "out", f"cannot read {source / name}: No such file")
    refuses(movielens.prepare, source / name, tmp_path / "out", "cannot read")


# Frappe

FRAPPE = "label,user,item,daytime,weekday,isweekend,homework,cost,weather,country,city\n"


def frappe_source(folder: Path, **files: str) -> Path:
    texts = {
        f"{split}_csv": f"{FRAPPE}1,{i},{i + 10},20,21,22,23,24,25,26,27\n0,1,9,20,21,22,23,24,,26,27\n" for i, split in enumerate(SPLITS)
    }
    return write(folder / "source", **{**texts, **files})


def test_frappe_keeps_its_splits_and_sides(tmp_path: Path) -> None:
    assert frappe.prepare(frappe_source(tmp_path), tmp_path / "out") == {"train": 2, "valid": 2, "test": 2}
    prepared = open_prepared(tmp_path / "out")
    assert [field.path for field in prepared.schema.fields[:3]] == ["user.user_id", "context.daytime", "context.weekday"]
    assert rows(tmp_path / "out", "valid").select("label", "user_id", "ad_id", "context.cost", "context.weather").rows() == [
        (1, "1", "11", "24", "25"),
        (0, "1", "9", "24", None),
    ]
    assert [ad.ad_id for ad in ads(prepared)] == ["10", "9", "11", "12"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FRAPPE, "valid.csv is empty"),
        ("", "valid.csv: column label is missing; it has none at all"),
        (FRAPPE.replace("cost", "costs"), "valid.csv: column cost is missing; it has label, user"),
        (FRAPPE + "2,1,1,1,1,1,1,1,1,1,1\n", "valid.csv, line 2: label is '2'; expected 0 or 1"),
        (FRAPPE + "1,1,1,1,1,1,1,1,1,1\n", "valid.csv, line 2: 10 columns; expected 11"),
        (FRAPPE + '1,"1\n1",1,1,1,1,1,1,1,1,1\n\n1,,1,1,1,1,1,1,1,1,1\n', "valid.csv, line 5: user is ''; expected some text"),
        (FRAPPE + '1,"1,1,1,1,1,1,1,1,1,1\n', "valid.csv, line 2: not a CSV: unexpected end of data"),
    ],
)
def test_frappe_refuses_what_is_not_frappe(tmp_path: Path, text: str, message: str) -> None:
    refuses(frappe.prepare, frappe_source(tmp_path, valid_csv=text), tmp_path / "out", message)


# Criteo


def criteo_line(label: object = 0, first: object = 1, category: str = "68fd1e64") -> str:
    return "\t".join([str(label), str(first), "-2", *[""] * 11, category, *[""] * 25]) + "\n"


def test_criteo_keeps_its_order(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("".join(criteo_line(i % 2, i) for i in range(20)))
    assert criteo.prepare(tmp_path / "train.txt", tmp_path / "out") == {"train": 16, "valid": 2, "test": 2}
    assert rows(tmp_path / "out")["ad.I1"].to_list() == list(map(float, range(20)))
    test = rows(tmp_path / "out", "test").select("label", "user_id", "ad_id", "ad.I1", "ad.I2", "ad.I3", "ad.C1", "ad.C2")
    assert test.rows()[1] == (1, "", "", 19.0, -2.0, None, "68fd1e64", None)
    prepared = open_prepared(tmp_path / "out")
    assert list(user_states(prepared)) == list(ads(prepared)) == []


def test_criteo_in_more_than_one_file_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.datasets.prepared.ROWS_PER_FILE", 3)
    (tmp_path / "train.txt").write_text("".join(criteo_line(0, i) for i in range(20)))
    criteo.prepare(tmp_path, tmp_path / "out")
    assert rows(tmp_path / "out")["ad.I1"].to_list() == list(map(float, range(20)))
    assert [len(open_prepared(tmp_path / "out").files(split)) for split in SPLITS] == [6, 1, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2,3\n", "train.txt, line 16: 1 columns; expected 40: label, I1"),
        (criteo_line(label=5), "train.txt, line 16: label is '5'; expected 0 or 1"),
        (criteo_line(label=""), "train.txt, line 16: label is ''; expected 0 or 1"),
        (criteo_line(first="many"), "train.txt, line 16: I1 is 'many'; expected a finite number"),
        (criteo_line(first="1e39"), "train.txt, line 16: I1 is '1e39'; expected a finite number"),
        (criteo_line(first="inf"), "train.txt, line 16: I1 is 'inf'; expected a finite number"),
    ],
)
def test_criteo_refuses_what_is_not_criteo(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "train.txt").write_text(criteo_line() * 15 + line + criteo_line() * 4)
    refuses(criteo.prepare, tmp_path, tmp_path / "out", message)


def test_criteo_misses_its_file(tmp_path: Path) -> None:
    refuses(criteo.prepare, tmp_path / "nowhere", tmp_path / "out", "cannot read … nowhere: No such file")
    refuses(criteo.prepare, tmp_path / ("x" * 300), tmp_path / "out", "cannot read … File name too long")


# Open Bandit

BANDIT = (
    ",timestamp,item_id,position,click,propensity_score,user_feature_0,user_feature_1,user_feature_2,user_feature_3,user-item_affinity_0\n"
)
ITEMS = ",item_id,item_feature_0,item_feature_1,item_feature_2,item_feature_3\n0,14,-0.5,ae,67,5c\n1,7,0.25,af,68,5d\n"


def bandit_row(second: float, click: int = 0, propensity: object = 0.0125, group: str = "a", item: int = 14) -> str:
    return f"0,2019-11-24 00:00:{second:09.6f}+00:00,{item},3,{click},{propensity},{group},b,c,d,0.0\n"


def test_open_bandit_is_sorted_and_keeps_propensities(tmp_path: Path) -> None:
    log = [bandit_row(30 - i, i == 3, (i + 1) / 20, "ab"[i % 2], (14, 7)[i % 2]) for i in range(20)]
    source = write(tmp_path / "source", all_csv=BANDIT + "".join(log).replace("True", "1").replace("False", "0"), item_context_csv=ITEMS)
    assert open_bandit.prepare(source, tmp_path / "out") == {"train": 16, "valid": 2, "test": 2}
    data = rows(tmp_path / "out")
    assert data["propensity"].to_list() == [(i + 1) / 20 for i in reversed(range(20))]
    assert data["ts"].to_list() == [1574553600 + second for second in range(11, 31)]
    assert data["label"].to_list() == [0] * 16 + [1, 0, 0, 0]
    assert data["ad_id"].to_list() == ["7", "14"] * 10
    prepared = open_prepared(tmp_path / "out")
    users = prepared.table("user")
    assert sorted(users["user.user_feature_0"]) == ["a", "b"]
    assert dict(users.select("user_id", "user.user_feature_0").rows())[data["user_id"][0]] == "b"
    assert next(iter(ads(prepared))) == Ad(
        "14", {"item_feature_0": -0.5, "item_feature_1": "ae", "item_feature_2": "67", "item_feature_3": "5c"}
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (bandit_row(1, propensity=0), "all.csv, line 2: propensity_score is '0'; expected a probability"),
        (bandit_row(1, propensity=""), "all.csv, line 2: propensity_score is ''; expected a probability"),
        (bandit_row(1, click=7), "all.csv, line 2: click is '7'; expected 0 or 1"),
        (bandit_row(1).replace("2019", "noon"), "all.csv, line 2: timestamp is 'noon-11-24 00:00:01.000000+00:00'; expected a time"),
        (bandit_row(1).replace("14,", ",", 1), "all.csv, line 2: item_id is ''; expected some text"),
    ],
)
def test_open_bandit_refuses_what_is_not_open_bandit(tmp_path: Path, row: str, message: str) -> None:
    source = write(tmp_path / "source", all_csv=BANDIT + row + bandit_row(5) * 20, item_context_csv=ITEMS)
    refuses(open_bandit.prepare, source, tmp_path / "out", message)


# All of them

SOURCES = {
    movielens.prepare: {"users.dat": USERS, "movies.dat": MOVIES, "ratings.dat": ratings_dat(RATINGS)},
    frappe.prepare: {f"{split}.csv": FRAPPE + "1,1,2,20,21,22,23,24,25,26,27\n" for split in SPLITS},
    criteo.prepare: {"train.txt": criteo_line() * 10},
    open_bandit.prepare: {"all.csv": BANDIT + bandit_row(5) * 10, "item_context.csv": ITEMS},
}


@pytest.mark.parametrize(("prepare", "name"), [(prepare, name) for prepare, files in SOURCES.items() for name in files])
@patient
@given(st.data())
def test_a_damaged_file_is_a_data_error_or_none(tmp_path_factory: pytest.TempPathFactory, prepare, name: str, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    for other, text in SOURCES[prepare].items():
        (folder / other).write_text(text, "utf-8")
    whole = (folder / name).read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    cut = data.draw(st.integers(0, 12))
    (folder / name).write_bytes(whole[:start] + data.draw(st.binary(max_size=12)) + whole[start + cut :])
    try:
        counts = prepare(folder, folder / "out")
    except DataError as error:
        message, left = str(error), sorted(path.name for path in folder.iterdir())
    else:
        assert len(rows(folder / "out")) == sum(counts.values())
        return
    assert str(folder / name) in message or "split would be empty" in message
    assert left == sorted(SOURCES[prepare])
