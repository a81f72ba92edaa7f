import json
from decimal import Decimal
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from test_cli import run

from adrank_cli import offline
from training.datasets.prepared import open_prepared
from training.datasets.profile import profile

SCHEMA = """
name = "shop"
[table]
label = "clicked"
missing = ["NULL"]
split = [0.8, 0.1, 0.1]
[user]
user_id = { kind = "category" }
age = { kind = "category" }
[ad]
ad_id = { kind = "category" }
tags = { kind = "list", length = 3 }
price = { kind = "number" }
"""


HEAD = "clicked,user_id,age,ad_id,tags,price\n"


def prepare(folder: Path, lines: list[str], schema: str = SCHEMA) -> tuple[str, ...]:
    """How a table is prepared, and asked for its profile."""
    (folder / "log.csv").write_text(HEAD + "\n".join(lines) + "\n")
    (folder / "schema.toml").write_text(schema)
    return ("prepare", "csv", "--source", f"{folder}/log.csv", "--schema", f"{folder}/schema.toml", "--out", f"{folder}/data")


def test_the_profile_counts_values_as_they_are_looked_up(tmp_path: Path) -> None:
    rows = [f"{i % 2},u{i % 5},{('25', '25.0', 'NULL', '30')[i % 4]},a{i % 7},{'x|y' if i % 2 else ''},{i}.5" for i in range(100)]
    code, printed, _ = run(*prepare(tmp_path, rows))
    found = profile(open_prepared(tmp_path / "data"))
    assert {column.name: (column.missing, column.distinct, column.usual) for column in found.columns} == {
        "user.user_id": (0.0, 5, {"u0": 0.2, "u1": 0.2, "u2": 0.2}),
        "user.age": (0.25, 2, {"25": 0.5, "30": 0.25}),  # 25 and 25.0 are one value
        "ad.ad_id": (0.0, 7, pytest.approx({"a0": 12 / 80, "a1": 12 / 80, "a2": 12 / 80})),
        "ad.tags": (0.5, 2, {"x": 0.5, "y": 0.5}),
        "ad.price": (0.0, 80, {"mean": 40.0}),
    }
    assert (code, found.rows, found.click_rate) == (
        0,
        {"train": 80, "valid": 10, "test": 10},
        dict.fromkeys(("train", "valid", "test"), 0.5),
    )
    assert "25.0 is 25" in printed
    assert "Click rate: train 50.00%, valid 50.00%, test 50.00%" in printed
    assert "│ user.age     │ category │ 25.0%   │ 2      │ 25 50.0%, 30 25.0% " in printed


def test_a_terminal_s_width_folds_what_is_frequent_and_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {"05db9164": 0.499, "68fd1e64": 0.172, "5a9ed9b0": 0.085}
    column = SimpleNamespace(name="ad.C1", kind="category", missing=0.0, distinct=157, usual=usual)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(offline, "console", lambda: Console(file=out, width=200, force_terminal=True, color_system=None, soft_wrap=True))
    out = StringIO()
    offline._print_profile(SimpleNamespace(columns=[column], click_rate={"train": 0.2}))
    assert max(map(len, out.getvalue().splitlines())) <= 60
    assert all(f"{value} {share:.1%}" in out.getvalue() for value, share in usual.items())


@pytest.mark.parametrize(
    ("cells", "warning"),
    [
        (lambda i: f"{i % 2},u{i % 5},7,a{i % 9},x,1", "user.age is '7' in every row: nothing is learned of it"),
        (lambda i: f"{i % 2},u{i % 5},,a{i % 9},x,1", "user.age is missing in every row"),
        (
            lambda i: f"{i % 2},{int(float(10**17 + 7919 * i))},{i % 4},a{i % 9},x,{i}",
            "all values of user.user_id of 17 digits and more, such as",
        ),
        (
            lambda i: f"{i % 2},u{i % 5},{Decimal(repr(float(10**18 + 7919 * i))):f},a{i % 9},x,{i}",
            "all values of user.age of",
        ),
        (lambda i: f"{i % 2},{10**17 + 7919 * i},{i % 4},a{i % 9},x|{i},{i}", None),
    ],
)
def test_what_is_to_be_doubted_is_told(tmp_path: Path, cells, warning: str | None) -> None:
    code, printed, complaint = run(*prepare(tmp_path, [cells(i) for i in range(100)]), "--json")
    told = json.loads(printed)
    assert (code, told["rows"]["train"]) == (0, 80)
    assert any(each.startswith(warning) for each in told["warnings"]) if warning else told["warnings"] == []
    assert all(f"warning: {each}" in complaint for each in told["warnings"])


def test_a_value_of_most_histories_is_told(tmp_path: Path) -> None:
    """All click a0, a1 and so on in turn: of seven rounds with histories, five have a0 among the newest 5."""
    rows = [f"1,u{i % 10},{i % 4},a{i // 10},x|{i % 3},{i}" for i in range(100)]
    schema = "history = { length = 5, fields = ['ad_id'] }\n" + SCHEMA
    *_, complaint = run("-q", *prepare(tmp_path, rows, schema))
    assert complaint == ""
    (history,) = (column for column in profile(open_prepared(tmp_path / "data")).columns if column.name == "history")
    assert (history.missing, history.distinct) == (10 / 80, 7)
    assert history.warnings == ("'a0' is in 71% of the histories: if it fills them up, or is a robot's, they tell little else",)
