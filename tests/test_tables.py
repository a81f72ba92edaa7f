"""Tables as they lie about: compressed, in parts, as JSON lines, with quotes that are none."""

import bz2
import gzip
import io
import json
import lzma
import math
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
from backports import zstd

from tests.test_csv_table import SCHEMA
from tests.test_datasets import BANDIT, ITEMS, bandit_row, criteo_line, frappe_source, movielens_source, refuses, rows
from training.datasets import criteo, csv_table, frappe, movielens, open_bandit, tables
from training.datasets.prepared import DataError
from training.datasets.tables import first_rows

HEADER = "label,user_id,ad_id,age,price,topics\n"
PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def lines(start: int, stop: int) -> str:
    return "".join(f"{i % 2},u{i},a{i},{i},{i}.5,x|y\n" for i in range(start, stop))


def prepared(folder: Path, source: Path, table: str = "") -> pl.DataFrame:
    (folder / "my.toml").write_text(f"{SCHEMA}\n[table]\n{table}\n")
    csv_table.prepare(source, folder / "out", folder / "my.toml")
    return rows(folder / "out")


def refused(folder: Path, source: Path, message: str, table: str = "") -> None:
    (folder / "my.toml").write_text(f"{SCHEMA}\n[table]\n{table}\n")
    refuses(csv_table.prepare, source, folder / "out", message, folder / "my.toml")


def file(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("ending", PACK)
def test_a_compressed_table_is_read_whatever_it_is_called(tmp_path: Path, ending: str) -> None:
    text = (HEADER + lines(0, 20)).encode()
    half = len(text) // 2
    packed = PACK[ending](text[:half]) + PACK[ending](text[half:])  # one after the other, as parallel compressors write
    assert prepared(tmp_path, file(tmp_path / "log", packed))["ad_id"].to_list() == [f"a{i}" for i in range(20)]


@pytest.mark.parametrize("ending", PACK)
def test_a_compressed_table_that_was_cut_short_is_refused(tmp_path: Path, ending: str) -> None:
    packed = PACK[ending]((HEADER + "".join(f"0,{hash(str(i))},a,{hash(i)},1,\n" for i in range(3000))).encode())
    source = file(tmp_path / f"log.csv{ending}", packed[: len(packed) * 2 // 3])
    refused(tmp_path, source, f"{source.name} is damaged or was cut short")
    refused(tmp_path, file(source, packed[:40] + b"\x00" * 40 + packed[80:]), source.name)


def test_the_parts_of_a_folder_are_one_table(tmp_path: Path) -> None:
    days = tmp_path / "log"
    file(days / "part-10.csv", HEADER + lines(14, 20))
    file(days / "part-2.csv.gz", gzip.compress((HEADER + lines(8, 14)).encode()))
    file(days / "part-1.csv", "ad_id,user_id,label,topics,age,price,further\n" + "".join(f"a{i},u{i},{i % 2},x,1,1,?\n" for i in range(8)))
    for ignored in ("_SUCCESS", ".part-1.csv.crc", "_temporary/0/part-3.csv", "part-11.csv"):
        file(days / ignored, b"" if ignored.startswith("part") else b"nothing of the kind")
    file(days / "part-12.csv", HEADER)
    assert prepared(tmp_path, days)["ad_id"].to_list() == [f"a{i}" for i in range(20)]


def test_the_parts_of_a_folder_keep_their_own_types(tmp_path: Path) -> None:
    large = 2**53 + 1
    ages: list[pl.Series] = [pl.Series([large] * 8), pl.Series([2.5, None] * 4), pl.Series(["2.5", "x"] * 4)]
    labels, topics = ([0] * 8, [False] * 8, ["False", "0.0"] * 4), ([["x"]] * 8, [None] * 8, ["x|y"] * 8)
    for i, age in enumerate(ages):
        part = pl.DataFrame({"label": labels[i], "user_id": ["u"] * 8, "ad_id": [i] * 8, "age": age, "price": [1] * 8, "topics": topics[i]})
        (tmp_path / "log").mkdir(exist_ok=True)
        part.write_parquet(tmp_path / "log" / f"part-{i}.snappy.parquet")
    data = prepared(tmp_path, tmp_path / "log")
    assert data["user.age"].to_list() == [str(large)] * 8 + ["2.5", None] * 4 + ["2.5", "x"] * 4
    assert data["ad.topics"].to_list() == [["x"]] * 8 + [None] * 8 + [["x", "y"]] * 8
    assert data["label"].sum() == 0


def test_the_names_of_folders_are_columns(tmp_path: Path) -> None:
    for day in ("2025-11-02", "2025-11-01"):
        text = HEADER.replace("age,", "") + "".join(f"0,u,a{day},1,x\n" for _ in range(10))
        file(tmp_path / "log" / f"age={day}" / "0.csv", text)
    assert prepared(tmp_path, tmp_path / "log")["user.age"].to_list() == ["2025-11-01"] * 10 + ["2025-11-02"] * 10
    assert "age" in first_rows(tmp_path / "log")[0].frame.columns
    file(tmp_path / "log" / "age=2025-11-02" / "1.csv", HEADER + lines(0, 1))
    refused(tmp_path / "log", tmp_path / "log", "1.csv: age is a column of the file, and the name of its folder says it too")


def test_a_wrong_row_of_a_part_is_told_with_its_file_and_line(tmp_path: Path) -> None:
    file(tmp_path / "log" / "1.csv", HEADER + lines(0, 10))
    file(tmp_path / "log" / "2.csv", HEADER + lines(0, 3) + "7,u,a,1,1,\n")
    refused(tmp_path, tmp_path / "log", "2.csv, line 5: label is '7'")
    file(tmp_path / "log" / "2.csv", HEADER.replace("price", "cost") + lines(0, 3))
    refused(tmp_path, tmp_path / "log", "2.csv: column price is missing; it has label, user_id, ad_id, age, cost")
    file(tmp_path / "log" / "2.csv", lines(4, 7))
    refused(tmp_path, tmp_path / "log", "2.csv: column label is missing; it has 0, u4")
    pl.DataFrame({"label": [1]}).write_parquet(tmp_path / "log" / "2.csv")
    refused(tmp_path, tmp_path / "log", "log mixes forms … 1.csv is csv … 2.csv is parquet")
    refused(tmp_path, file(tmp_path / "none" / "_SUCCESS", b"").parent, "none is a folder without part files")
    file(tmp_path / "log" / "_delta_log" / "0.json", "{}")
    refused(tmp_path, tmp_path / "log", "log is a table of Delta")


def test_no_part_is_left_out_or_read_twice_without_a_word(tmp_path: Path) -> None:
    part = file(tmp_path / "log" / "part-1.csv", HEADER + lines(0, 10))
    file(tmp_path / "elsewhere" / "part-2.csv", HEADER + lines(10, 20))
    link = part.with_name("day=2")
    link.symlink_to(tmp_path / "elsewhere")
    assert sorted(prepared(tmp_path, part.parent)["ad_id"]) == sorted(f"a{i}" for i in range(20))
    for target, message in (("nowhere", "latest is no file, or a link to none"), (part.name, "is … once more"), (".", "is … once more")):
        (latest := part.with_name("latest")).symlink_to(target)
        refused(tmp_path / "elsewhere", part.parent, message)
        latest.unlink()
    for copy in (part.name + ".gz", part.name + "~", part.name + ".bak"):
        file(part.with_name(copy), HEADER + lines(0, 10))
        refused(tmp_path / "elsewhere", part.parent, f"{copy} looks like part-1.csv once more")
        part.with_name(copy).unlink()


@pytest.mark.timeout(60)
def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=pipe.write_bytes, args=((HEADER + lines(0, 5000)).encode(),), daemon=True)
    writer.start()
    assert len(prepared(tmp_path, pipe)) == 5000
    writer.join(10)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04rest", "a zip archive or a workbook"),
        (b"Obj\x01rest", "Avro"),
        ((HEADER + lines(0, 9)).encode("utf-16"), "UTF-16: convert it to UTF-8"),
        (b'[\n  {"label": 1}\n]', "one JSON array; write it as JSON lines"),
        ((HEADER + lines(0, 9)).encode("utf-16-le"), "no text: its first line has bytes of 0"),
        ((HEADER + lines(0, 9)).replace(",", "\t").encode(), 'label is missing; … say separator = "\\t" in [table]'),
        ((HEADER + "7" * 9999 + ",u,a,1,1,\n").encode(), "line 2: label is '77777 … 7…; expected 0 or 1"),
        (b'[{"label": 1}]', "one JSON array; write it as JSON lines"),
        (gzip.compress(b"PAR1...PAR1", mtime=0), "parquet that was compressed once more"),
        (gzip.compress(b"", mtime=0), "column label is missing; it has none at all"),
    ],
)
def test_what_is_no_table_is_called_by_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    refused(tmp_path, file(tmp_path / "log", content), f"log … {message}")


def test_standard_input_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(gzip.compress((HEADER + lines(0, 20)).encode()))))
    assert len(prepared(tmp_path, Path("-"))) == 20
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO((HEADER + "x").encode())))
    (tmp_path / "again").mkdir()
    refused(tmp_path / "again", Path("-"), "standard input, line 2: 1 columns; expected 6")
    monkeypatch.setattr(sys, "stdin", None)
    refused(tmp_path / "again", Path("-"), "standard input is closed")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("".join(criteo_line() for _ in range(20)).encode())))
    assert criteo.prepare(Path("-"), tmp_path / "criteo") == {"train": 16, "valid": 2, "test": 2}


def test_json_lines_are_read(tmp_path: Path) -> None:
    objects = [
        {"label": 1, "user": {"id": 2**60 + 1, "age": 25.0}, "ad_id": 7, "price": 1.5, "topics": ["x", "y"]},
        {"label": 0, "user": {"id": 2**60}, "ad_id": 8, "price": None, "topics": None, "further": {"x": [1]}},
        {"label": True, "user": {"id": None, "age": 3}, "ad_id": 9, "price": 3},
        {"label": 0, "user": {"id": "é😀", "age": math.nan}, "ad_id": "a", "price": math.nan},
    ]
    text = "".join(json.dumps(each) + "\n\n" for each in objects * 4)
    data = prepared(tmp_path, file(tmp_path / "log", text), 'user_id = "user.id"\ncolumns = { "user.age" = "user.age" }')
    assert data.select("label", "user_id", "ad_id", "user.age", "ad.price").rows()[:4] == [
        (1, str(2**60 + 1), "7", "25", 1.5),
        (0, str(2**60), "8", None, None),
        (1, "", "9", "3", 3.0),
        (0, "é😀", "a", None, None),
    ]
    assert data["ad.topics"].to_list()[:3] == [["x", "y"], None, None]


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"topics": ["x"]}, {"topics": "x|y"}, "log, line 2: topics is a list in some rows and not in others"),
        ({"age": "x"}, {"age": ["x"]}, "log, line 2: age is a list in some rows and not in others"),
        ({"topics": ["x"]}, {"topics": [{"id": "x"}]}, "log, line 2: topics is a list with an object or a list in it"),
        ({"topics": ["x"]}, {"topics": [["x"], "y"]}, "log, line 2: topics is a list with an object or a list in it"),
        ({"age": "x"}, {"age": "\ud800"}, "log, line 2: age is text with half of a surrogate pair"),
        ({"age": "x"}, {"age": math.inf}, "log, line 2: age is no finite number"),
    ],
)
def test_json_values_that_have_no_one_text_are_refused_with_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: dict[str, object], other: dict[str, object], message: str
) -> None:
    common: dict[str, object] = {"label": 1, "user_id": "u", "ad_id": "a", "age": None, "price": 1, "topics": None}
    with monkeypatch.context() as small:
        refused(tmp_path, file(tmp_path / "log", "".join(json.dumps(common | each) + "\n" for each in (one, other))), message)
        small.setattr(tables, "CHUNK", 1)
        refused(tmp_path, tmp_path / "log", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"label": 1,\n', "log, line 1: not JSON"),
        ('{"label": 1, "user_id": "u", "ad_id": "a", "label": 0}\n', "log, line 1: not JSON: it names label twice"),
        ('{"label": 1, "user_id": "u", "ad_id": "a"}\n\n[1]\n', "log, line 3: expected a JSON object"),
        ('{"label": 1, "user_id": "u", "ad_id": "a", "price": 1, "topics": []}\n', "log: column age is missing; it has label, user_id"),
        ('{"label": 1, "user_id": "u", "ad_id": "a", "price": 1, "topics": [], "age": {"x": 1}}\n', "log, line 1: age is an object"),
        ('{"label": 2, "user_id": "u", "ad_id": "a", "price": 1, "topics": [], "age": 1}\n', "log, line 1: label is 2; expected 0 or 1"),
        ('{"a": ' * 3000, "log, line 1: not JSON"),
    ],
)
def test_json_lines_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    refused(tmp_path, file(tmp_path / "log", text), message)


# Quotes

QUOTED = "label\tuser_id\tad_id\tage\tprice\ttopics\n0\tu\ta\t1\t1\tx\n"


def text_rows(*titles: str) -> str:
    return QUOTED + "".join(f"{i % 2}\tu{i}\ta{i}\t{title}\t1\tx\n" for i, title in enumerate(titles))


PLAIN = ["x"] * 9


@pytest.mark.parametrize(
    ("titles", "message"),
    [
        (["x", '"Big deal', "x", "x", 'deal"', *PLAIN], "line 4: a quote that opens in column age takes line 5 into its field"),
        (["x", '"Big deal', 'deal"', *PLAIN], "line 4: a quote that opens in column age takes line 5 into its field"),
        (["x", '"Big deal', "x", '"Big deal', *PLAIN], "line 4: a quote that opens in column age takes line 5"),
        (["x", '"Big deal', *PLAIN], "line 4: a quote that opens in column age takes line 5"),
        (["x", '"Big" deal', *PLAIN], "line 4: not a CSV: … expected after"),
        ([*PLAIN, '"Big deal'], "line 12: not a CSV: unexpected end of data"),
    ],
)
def test_quotes_that_are_text_are_refused_with_their_line_and_read_where_that_is_said(
    tmp_path: Path, titles: list[str], message: str
) -> None:
    source, separator = file(tmp_path / "log", text_rows(*titles)), 'separator = "\\t"\n'
    refused(tmp_path, source, f'{message} … say quote = "" in [table]', separator)
    assert prepared(tmp_path, source, f'{separator}quote = ""')["user.age"].to_list() == ["1", *titles]


def test_a_quoted_field_may_hold_lines(tmp_path: Path) -> None:
    text = HEADER + '1,u,a,"one\ntwo, three\r\nfour",1,x\n' + lines(0, 20) + "2,u,a,1,1,x\n"
    refused(tmp_path, file(tmp_path / "log", text), "log, line 25: label is '2'")
    assert prepared(tmp_path, file(tmp_path / "log", text[:-12]))["user.age"][0] == "one\ntwo, three\r\nfour"


def test_a_quoted_field_may_hold_what_looks_like_a_row_where_that_is_said(tmp_path: Path) -> None:
    source = file(tmp_path / "log", HEADER + "1,u,a,'0,u,a\n0,u,a,1,1,x\n',1,x\n" + lines(0, 20))
    refused(tmp_path, source, "line 2: a quote that opens in column age takes line 3", 'quote = "\'"')
    data = prepared(tmp_path, source, 'quote = "\'"\nquoted_newlines = true')
    assert (len(data), data["user.age"][0]) == (21, "0,u,a\n0,u,a,1,1,x\n")


def test_a_field_may_be_long(tmp_path: Path) -> None:
    long = "x" * 200_000
    data = prepared(tmp_path, file(tmp_path / "log", HEADER.replace("\n", ",unused\n") + f"0,u,a,{long},1,x,{long}\n" * 10))
    assert data["user.age"][0] == long


# Mistakes are told in the order of the file, and several at once


def test_the_first_mistake_of_every_column_is_told_in_the_order_of_the_file(tmp_path: Path) -> None:
    header = HEADER.replace("\n", ",ts\n")
    table = header + "0,u,a,1,1,x,900\n0,u,a,1,dear,x,800\n0,u,a,1,cheap,x,100\n2,u,a,1,1,x,50\n" + "0,u,a,1,1,x,9\n" * 9
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, file(tmp_path / "log", table), 'ts = "ts"')
    first, second = str(caught.value).split("\n")
    assert "log, line 3: price is 'dear'" in first
    assert "log, line 5: label is '2'" in second


def test_every_mistake_of_a_schema_file_is_told(tmp_path: Path) -> None:
    schema = 'name = ""\n[user.age]\nkind = "word"\n[ad.price]\nkind = "number"\nbuckets = 3\nlength = 0\n[table]\nshuffle = 1\nlabel = 3\n'
    (tmp_path / "my.toml").write_text(schema)
    with pytest.raises(DataError) as caught:
        csv_table.prepare(tmp_path / "log", tmp_path / "out", tmp_path / "my.toml")
    sentences = str(caught.value).split("\n")
    assert len(sentences) == 6
    assert all(line.startswith(f"{tmp_path / 'my.toml'}: ") for line in sentences)
    for part in (
        "unknown entries ['shuffle']",
        "label must be text",
        'name = "..."',
        "user.age: kind",
        "length must be",
        "only a list or a vector has",
    ):
        assert any(part in line for line in sentences)


# The published data sets


def test_published_data_sets_may_be_compressed(tmp_path: Path) -> None:
    sources = {
        movielens.prepare: movielens_source(tmp_path / "m"),
        frappe.prepare: frappe_source(tmp_path / "f"),
        criteo.prepare: file(tmp_path / "c" / "train.txt", criteo_line() * 20).parent,
        open_bandit.prepare: file(tmp_path / "o" / "all.csv", BANDIT + bandit_row(5) * 20).parent,
    }
    file(tmp_path / "o" / "item_context.csv", ITEMS)
    for source in sources.values():
        for i, path in enumerate(sorted(source.iterdir())):
            ending = list(PACK)[i % len(PACK)]
            path.with_name(path.name + ending).write_bytes(PACK[ending](path.read_bytes()))
            path.unlink()
    for i, (prepare, source) in enumerate(sources.items()):
        assert sum(prepare(source, tmp_path / str(i)).values()) > 0
