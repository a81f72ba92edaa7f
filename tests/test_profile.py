from pathlib import Path

import adrank
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


def test_the_profile_counts_values_as_they_are_looked_up(tmp_path: Path, capsys) -> None:
    rows = [f"{i % 2},u{i % 5},{('25', '25.0', 'NULL', '30')[i % 4]},a{i % 7},{'x|y' if i % 2 else ''},{i}.5" for i in range(100)]
    (tmp_path / "log.csv").write_text("clicked,user_id,age,ad_id,tags,price\n" + "\n".join(rows) + "\n")
    (tmp_path / "schema.toml").write_text(SCHEMA)
    adrank.main(["prepare", "csv", "--source", f"{tmp_path}/log.csv", "--schema", f"{tmp_path}/schema.toml", "--out", f"{tmp_path}/data"])
    found = {column.field.path: (column.missing, column.distinct, column.usual) for column in profile(open_prepared(tmp_path / "data"))}
    assert found == {
        "user.user_id": (0.0, 5, "u0"),
        "user.age": (0.25, 2, "25"),  # 25 and 25.0 are one value
        "ad.ad_id": (0.0, 7, "a0"),
        "ad.tags": (0.5, 2, "x"),
        "ad.price": (0.0, 80, "40"),
    }
    printed = capsys.readouterr().out
    assert "25.0 is 25" in printed
    assert "│ ad.price     │ number   │ 0.0%    │ 80     │" in printed
