"""A field that the data lack is named, wherever it would be encoded as missing throughout."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import bundles
import polars as pl
import pytest
import small
import small_log

from features.bundle import Bundle, load_bundle
from features.encode import Encoder
from features.policy import EpsilonGreedy
from features.schema import parse_schema
from training.datasets.encoded import encode_split
from training.datasets.log import open_log
from training.datasets.prepared import DataError, Prepared, open_prepared
from training.datasets.vocabularies import learn_vocabularies
from training.export.export import evaluate_bundle
from training.offpolicy.replay import replay
from training.skew import find_skew


@pytest.fixture
def data(tmp_path: Path) -> Prepared:
    return small.data_set(tmp_path / "data", (60, 30, 30)) if not (tmp_path / "data").mkdir() else open_prepared(tmp_path / "data")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """One of the test schema, which has the fields of the small one."""
    return load_bundle(bundles.publish(tmp_path / "models", "din"))


def without(data: Prepared, *names: str, file: str = "test/0.parquet") -> None:
    path = data.folder / file
    frame = pl.read_parquet(path)
    assert set(names) <= set(frame.columns)
    frame.drop(names).write_parquet(path)


def refused(data: Prepared, bundle: Bundle, fields: Sequence[str]) -> None:
    with pytest.raises(DataError, match=f"no column holds {', '.join(fields)}, which the schema"):
        evaluate_bundle(bundle, data, "test", small.quiet())


def test_a_bundle_is_not_measured_on_data_of_other_fields(tmp_path: Path, bundle: Bundle) -> None:
    other = tmp_path / "other"
    (other / "test").mkdir(parents=True)
    (other / "schema.toml").write_text('name = "other"\n[context.weather]\nkind = "category"\n[ad.ad_id]\nkind = "category"\n')
    frame = pl.DataFrame({"label": [0, 1], "user_id": ["", ""], "ad_id": ["a1", "a2"], "context.weather": ["sun", "rain"]})
    frame.with_columns(pl.col("label").cast(pl.Int8)).write_parquet(other / "test" / "0.parquet")
    fields = ["user.user_id", "user.age", "user.interests", "user.income", "context.slot", "ad.genre", "ad.tags", "ad.price", "history"]
    behaviours = [f"ad.{name} of behaviours" for name in bundle.schema.history_fields[1:]]
    own = [name for name in fields if name == "history" or any(field.path == name for field in bundle.schema.fields)]
    refused(open_prepared(other), bundle, own + behaviours)


@pytest.mark.parametrize("names", [("user.age",), ("user.income", "context.slot"), ("context.slot",), ("history",)])
def test_every_field_that_is_not_there_is_named(data: Prepared, bundle: Bundle, names: tuple[str, ...]) -> None:
    without(data, *names)
    refused(data, bundle, names)
    if names != ("history",):
        encoder = Encoder(data.schema, learn_vocabularies(data))
        with pytest.raises(DataError, match=f"no column holds {', '.join(names)}"):
            encode_split(data, "test", encoder)


def test_what_the_table_of_ads_lacks_is_named_for_ads_and_for_behaviours(data: Prepared, bundle: Bundle) -> None:
    without(data, "ad.price", file="ads.parquet")
    encoder = Encoder(data.schema, small.vocabularies())
    with pytest.raises(DataError, match=r"no column holds ad\.price, ad\.price of behaviours, which"):
        encode_split(data, "test", encoder)
    path = data.folder / "test" / "0.parquet"
    frame = pl.read_parquet(path)
    inline = {"ad.genre": pl.lit("news"), "ad.tags": pl.lit(["x"]), "ad.price": pl.lit(1.0)}
    frame.with_columns(**inline).write_parquet(path)
    with pytest.raises(DataError, match=r"no column holds ad\.price of behaviours, which"):
        encode_split(data, "test", encoder)
    frame.with_columns(**{**inline, "ad.price": None}).drop("ad.price").write_parquet(path)
    with pytest.raises(DataError, match=r"no column holds ad\.price, ad\.price of behaviours, which"):
        encode_split(data, "test", encoder)


def test_a_table_of_ads_is_as_good_as_a_column_and_more_columns_than_fields_do_not_matter(data: Prepared) -> None:
    few = parse_schema('name = "few"\n[user.age]\nkind = "category"\n[ad.ad_id]\nkind = "category"\n[ad.genre]\nkind = "category"\n')
    assert len(encode_split(replace(data, schema=few), "test", Encoder(few, small.vocabularies()))) == 30


def test_a_log_that_lacks_a_version_s_fields_is_not_held_against_it(tmp_path: Path, bundle: Bundle) -> None:
    folder = small_log.write(tmp_path / "log", hours=3, version=bundle.version)
    small_log.rewrite(folder, lambda frame: frame.drop("user.age").with_columns(p_click=pl.lit(0.5)))
    with pytest.raises(DataError, match=r"could be compared; din \d+: .*no column holds user\.age"):
        find_skew(open_log(folder), tmp_path / "models")
    with pytest.raises(DataError, match=r"no column holds user\.age"):
        replay(open_log(folder), bundle, EpsilonGreedy(0.0))
