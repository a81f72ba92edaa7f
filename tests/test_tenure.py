"""Values that no window has had for long leave their row to new ones; those that stay keep their ids."""

import json
from pathlib import Path

import polars as pl
import pytest
import small
import torch

from features.bundle import load_bundle
from features.vocabulary import Vocabularies, Vocabulary
from training.datasets.prepared import Prepared, open_prepared
from training.export import export
from training.networks.embeddings import Embeddings
from training.networks.warm_start import warm_start
from training.tenure import Tenure, parse_idle, renewed
from training.train import train
from training.train_settings import TrainSettings
from training.weights import start_of

pytestmark = pytest.mark.usefixtures("traced_export")


def test_rows_of_the_longest_idle_go_first_and_only_as_many_as_are_needed() -> None:
    tenure = Tenure(2, {"v": {"a": 1, "b": 4, "d": 1, "e": 0}})
    assert tenure.place("v", ["a", "b", "c", "d", "e"], {"c", "n", "m", "rare"}, ["n", "m"]) == ["m", "n", "c", "d", "e"]
    # a and d had been idle for two windows, b for five: b leaves first, then a, whose id is the lower
    assert tenure.idle == {"v": {"d": 2, "e": 1}}
    assert tenure.counts == {"v": "5 values, 2 new, 2 of them in rows of idle ones"}
    assert tenure.place("v", ["m", "n", "c", "d", "e"], {"d"}, ["x", "y"]) == ["m", "n", "c", "d", "x", "y"]
    assert tenure.idle == {"v": {"m": 1, "n": 1, "c": 1}}, "d was seen again, and e had been idle for two"


def test_order_of_the_rows_that_are_taken() -> None:
    assert Tenure(1, {"v": {"b": 7}}).place("v", ["a", "b", "c"], (), ["x", "y"]) == ["y", "x", "c"]


def test_new_values_find_room_up_to_the_most_and_in_rows_of_idle_ones() -> None:
    assert Tenure(1).place("v", ["a", "b", "c"], {"a", "c"}, ["x", "y", "z"], 4) == ["a", "x", "c", "y"]
    assert Tenure(1).place("v", ["a", "b", "c"], {"a", "c"}, ["x", "y", "z"], 2) == ["a", "x", "c"]
    assert Tenure(0).place("v", [], (), ["x", "y", "z"], 2) == ["x", "y"]


def test_without_the_setting_every_value_stays() -> None:
    tenure = Tenure(0, {"v": {"a": 99}})
    assert tenure.place("v", ["a", "b"], {"b", "c"}, ["c"]) == ["a", "b", "c"]


def test_a_new_value_begins_as_the_unknown_whoever_had_its_row() -> None:
    old, new = (small.network("deepfm", seed=seed) for seed in (1, 2))
    warm_start(old, new, renewed={"genre": [3], "slot": []})
    tables = [next(each for each in network.modules() if isinstance(each, Embeddings)) for network in (old, new)]
    before, after = ([table.table.weight[table.rows_of(name)] for name in ("genre", "slot", "ad_id")] for table in tables)
    assert torch.equal(after[0][2], before[0][0]), "id 3 is the third of the rows, which begin with the unknown"
    assert torch.equal(after[0][[0, 1, 3]], before[0][[0, 1, 3]])
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])


def window(folder: Path, number: int) -> Prepared:
    """Rows whose slots are `feed` and one that this window alone has."""
    folder.mkdir()
    data = small.data_set(folder, seed=number)
    for file in (path for split in ("train", "valid", "test") for path in (folder / split).iterdir()):
        frame = pl.read_parquet(file)
        frame.with_columns(pl.col("context.slot").replace({"side": f"s{number}"})).write_parquet(file)
    return open_prepared(data.folder)


def test_a_table_stops_growing_over_windows_of_new_values(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=1, batch=64, threads=1, unknown_rate=0, flat_below=0, evict_after=2)
    start, slots, ids = None, [], []
    for number in range(5):
        data = window(tmp_path / str(number), number)
        trained = train(data, "deepfm", small.NETWORK_SETTINGS["deepfm"], settings, small.quiet(), start)
        bundle = load_bundle(export.export(data, trained, tmp_path / "models", "m", small.quiet()))
        start = start_of(bundle)
        vocabulary = bundle.vocabularies.categories["slot"]
        slots.append(set(vocabulary.values))
        ids.append(vocabulary.id("feed"))
    assert slots == [{"feed", "s0"}, {"feed", "s0", "s1"}, {"feed", "s1", "s2"}, {"feed", "s2", "s3"}, {"feed", "s3", "s4"}]
    assert len(set(ids)) == 1
    assert json.loads((bundle.path / "idle.json").read_text())["slot"] == {"s3": 1}
    assert trained.tenure.counts["slot"] == "3 values, 1 new, 1 of them in rows of idle ones"


def test_ids_that_stand_for_another_value() -> None:
    before, after = (Vocabularies({"v": Vocabulary(list(values))}, {}) for values in ("abc", "axcd"))
    assert renewed(before, after) == {"v": [3]}


@pytest.mark.parametrize("text", [b"[1]", b'{"v": 3}', b'{"v": {"a": [1]}}', b"{"])
def test_what_is_no_idle_json_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"idle|column|line"):
        parse_idle(text)
