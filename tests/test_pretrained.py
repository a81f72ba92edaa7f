"""MF and FNN, and how a network's embeddings begin with those of a bundle: by vocabulary and value, whatever the ids."""

from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
import small
import torch
from rich.console import Console
from rich.progress import Progress

from features.bundle import load_bundle, read_manifest
from features.vocabulary import HashBuckets, Vocabularies, Vocabulary
from tests.test_deepfm import vectors
from tests.test_networks import ONLY_NUMBERS, SCHEMAS
from training.networks import NETWORKS
from training.networks.contract import Fields, Network, Part
from training.networks.embeddings import Embeddings
from training.networks.fnn import FNN
from training.networks.pretrained import copy_embeddings
from training.retrain.publish import train_and_publish
from training.train_settings import TrainError
from training.weights import start_of

pytestmark = pytest.mark.usefixtures("traced_export")
ONLY_USERS = 'name = "users"\n[user.user_id]\nkind = "category"\n[ad.price]\nkind = "number"\n'


def test_mf_is_biases_and_the_product_of_a_user_and_an_ad() -> None:
    network, (user, history, ad) = small.network("mf"), small.parts()
    with torch.no_grad():
        logits = small.click(network, user, history, ad)
        for row in range(3):
            for candidate in range(5):
                # Row u of the table is that of the user's id, which is its vocabulary's second; ads come first.
                one, other = user.ids[row, 0], ad.ids[row, candidate, 0]
                p = (14 - 1 + one) * (one > 0), other
                weights, table = network.first.table.weight, network.second.table.weight
                expected = network.bias + weights[p[0]] + weights[p[1]] + table[p[0]] @ table[p[1]]
                assert float(logits[row, candidate]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("text", "missing"),
    [(ONLY_NUMBERS, r"user\.user_id"), (ONLY_USERS, r"ad\.ad_id")],
)
def test_mf_without_users_or_ads_is_refused(text: str, missing: str) -> None:
    with pytest.raises(ValueError, match=rf"^MF is of users and ads, and this schema has no \[{missing}\]; add it, or train fm$"):
        NETWORKS["mf"](Fields.of(small.schema(text), small.vocabularies(text)), small.NETWORK_SETTINGS["mf"])


def test_some_fields_are_looked_up_where_they_lie_among_all() -> None:
    fields = Fields.of(small.schema(), small.vocabularies())
    torch.manual_seed(0)
    some = Embeddings(fields.only({"user": ("slot", "interests", "income"), "ad": ("price", "genre")}), 3)
    user, _, ad = small.parts()
    with torch.no_grad():
        found = some("user", user)
        assert found.shape == (3, 3, 3)
        lone = Part(user.ids[:, 2:6], user.numbers)  # interests and slot
        assert torch.equal(found, some("user", lone))
        assert torch.equal(some("ad", ad), some("ad", Part(ad.ids[..., 1:2], ad.numbers)))
        assert "history" not in some
        assert set(some.sizes) == {"genre", "slot"}


@pytest.mark.parametrize("text", SCHEMAS)
def test_fnn_is_an_mlp_on_weights_and_vectors(text: str) -> None:
    network, parts = small.network("fnn", text), small.parts(text)
    request = network.fields.request
    with torch.no_grad():
        logits = small.click(network, *parts)
        for row in range(3):
            for candidate in range(5):
                w, v = vectors(network.first, parts, row, candidate), vectors(network.second, parts, row, candidate)
                sides = [torch.cat([*w[side], *v[side], torch.zeros(0)]) for side in (slice(request), slice(request, None))]
                expected = network.tower(sides[0][None], sides[1][None, None])
                assert float(logits[row, candidate]) == pytest.approx(float(expected), abs=1e-4, rel=1e-4)


def other_vocabularies() -> Vocabularies:
    """Other ids for some of the same values: a1 and a3 in another order among new ones, genres as they are, other buckets of users."""
    usual = small.vocabularies()
    changed = {"ad_id": Vocabulary(["new", "a3", "other", "a1"]), "user_id": HashBuckets(20), "age": Vocabulary(["60"])}
    return Vocabularies({**usual.categories, **changed}, usual.moments)


def row(network: Network, table: str, vocabulary: str, value_id: int) -> torch.Tensor:
    embeddings = getattr(network, table)
    return embeddings.table.weight[embeddings.rows_of(vocabulary)][value_id - 1]


def test_rows_are_copied_by_vocabulary_and_value() -> None:
    old, before, now = small.network("fm"), small.vocabularies(), other_vocabularies()
    torch.manual_seed(3)
    new = FNN(Fields.of(small.schema(), now), small.NETWORK_SETTINGS["fnn"])
    fresh = {name: value.clone() for name, value in new.state_dict().items()}
    copied = {each.name: each for each in copy_embeddings(old, before, new, now)}
    # Known: a1 and a3 of 4 ads, 3 of 3 genres, slots 2 of 2, tags 3 of 3, no age of 1, no bucket of 20.
    assert copied["second"].line() == "second (4 wide): 10 of 33 values begin with those of the bundle"
    for table in ("first", "second"):
        assert torch.equal(row(new, table, "ad_id", 5), row(old, table, "ad_id", 3))  # a1
        assert torch.equal(row(new, table, "ad_id", 3), row(old, table, "ad_id", 5))  # a3
        assert torch.equal(row(new, table, "ad_id", 1), row(old, table, "ad_id", 1))  # unknown
        assert torch.equal(row(new, table, "genre", 4), row(old, table, "genre", 4))
        assert torch.equal(getattr(new, table).scales["ad"], getattr(old, table).scales["ad"])
        for vocabulary, some in (("ad_id", [2, 4]), ("age", [2]), ("user_id", list(range(1, 22)))):
            for each in some:
                rows = getattr(new, table).rows_of(vocabulary)
                assert torch.equal(row(new, table, vocabulary, each), fresh[f"{table}.table.weight"][rows][each - 1])
        assert not getattr(new, table).table.weight[0].any()
    assert all(torch.equal(value, fresh[name]) for name, value in new.state_dict().items() if name.startswith("tower."))


def test_buckets_that_are_as_many_are_copied_all() -> None:
    old, usual = small.network("mf"), small.vocabularies()
    new = small.network("din", seed=1)
    copied = copy_embeddings(old, usual, new, usual)
    assert [(each.name, each.width) for each in copied] == [("embed", 4)]
    assert all(torch.equal(row(new, "embed", "user_id", each), row(old, "second", "user_id", each)) for each in range(1, 52))


def test_widths_that_do_not_fit_are_refused() -> None:
    usual = small.vocabularies()
    wide = r"^the bundle's embeddings 'second' are 4 wide and this network's 6: add --set embedding=4$"
    with pytest.raises(ValueError, match=wide):
        copy_embeddings(small.network("fm"), usual, small.network("fnn", embedding=6), usual)
    with pytest.raises(
        ValueError, match=r"^none of the bundle's embeddings are as wide as this network's: first 1; second 4 against embed 6$"
    ):
        copy_embeddings(small.network("mf"), usual, small.network("din", embedding=6), usual)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "data").mkdir()
    small.data_set(folder / "data")
    return folder


SETTINGS = {
    "epochs": "1",
    "batch": "64",
    "learning_rate": "1e-9",
    "embedding_l2": "0",
    "unknown_rate": "0",
    "threads": "1",
    "embedding": "4",
}


def published(folder: Path, family: str, **more: str) -> tuple[Path, str]:
    """A training that hardly moves a weight, and what it said."""
    console = Console(record=True, file=StringIO(), width=200)
    given = {**SETTINGS, **({"hidden": "8"} if family == "fnn" else {}), **more}
    data = small.open_prepared(folder / "data")
    path, _ = train_and_publish(data, family, folder / "models", family, given, Progress(console=console, disable=True))
    return path, console.export_text()


@pytest.fixture(scope="module")
def fm(models: Path) -> Path:
    return published(models, "fm", learning_rate="0.05", seed="4")[0]


def test_an_fnn_begins_with_the_bundle_of_an_fm_and_says_where_it_does_not(models: Path, fm: Path) -> None:
    fnn, output = published(models, "fnn", init_from=str(fm))
    values = sum(vocabulary.size - 2 for vocabulary in load_bundle(fm).vocabularies.categories.values())
    assert f"second (4 wide): {values} of {values} values begin with those of the bundle" in output
    assert read_manifest(fnn)["settings"]["init_from"] == str(fm)
    old, new = start_of(load_bundle(fm)).network, start_of(load_bundle(fnn)).network
    for table in ("first", "second"):
        for each in range(2, 5):
            assert torch.allclose(row(new, table, "genre", each), row(old, table, "genre", each), atol=1e-5)
    _, output = published(models, "fnn")
    assert "this network starts fresh: --init-from a bundle of fm lets its embeddings begin there" in output


def test_a_bundle_that_does_not_fit_stops_the_training_with_a_sentence(models: Path, fm: Path) -> None:
    with pytest.raises(TrainError, match=r"are 4 wide and this network's 8: add --set embedding=4$"):
        published(models, "fnn", init_from=str(fm), embedding="8")
