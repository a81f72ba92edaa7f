"""A million impressions attributed by polars in this process and on a Ray that is started here: the same files. `make scale-test`."""

import polars as pl
import pytest
from test_cli import run

from benchmarks import attribution as made
from training.join import attributed

pytest.importorskip("ray", reason="Ray is an extra: make scale-test")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own


def test_a_million_impressions_are_the_same_rows_on_ray(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "MINUTES", 5)  # of two hours, in five parts each
    monkeypatch.setattr(attributed, "RANKINGS", 10_000)
    (tmp_path / "log").mkdir()
    impressions, clicks = made.make(tmp_path / "log", 1_000_000)
    said = {}
    for name, options in {"here": (), "ray": ("--ray", "local")}.items():
        code, out, err = run("attribute", "--log", tmp_path / "log", "--out", tmp_path / name, *options)
        assert code == 0, err
        said[name] = out.partition(": ")[2]
    assert said["here"] == said["ray"]
    assert said["here"].startswith(f"{impressions:,} impressions, {clicks:,} clicks, ")
    files = [sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).glob("day=*/*/*")) for name in said]
    assert files[0] == files[1]
    assert len(files[0]) > 8
    assert all(pl.read_parquet(tmp_path / "here" / path).equals(pl.read_parquet(tmp_path / "ray" / path)) for path in files[0])


def test_no_cluster_and_a_torn_file_are_a_sentence_each(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "MINUTES", 5)
    (tmp_path / "log").mkdir()
    made.make(tmp_path / "log", 24_000)
    options = ("attribute", "--log", tmp_path / "log", "--out", tmp_path / "rows", "--ray")
    code, _, err = run(*options, "127.0.0.1:1")
    assert (code, "Error: no Ray cluster at 127.0.0.1:1: " in err) == (2, True), err
    for path in tmp_path.glob("log/raw/impressions/*/hour=01/*.parquet"):
        pl.read_parquet(path).drop("history").write_parquet(path)  # which the driver does not look at
    code, _, err = run(*options, "local")
    assert (code, f"the log cannot be attributed on Ray: {tmp_path / 'log'} cannot be attributed: " in err, "Traceback" in err) == (
        2,
        True,
        False,
    ), err
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
