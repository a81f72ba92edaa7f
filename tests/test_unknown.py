"""What is hidden from a step of training, and what that makes of the unknown."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import small
import torch

from features.encode import Encoder
from features.schema import parse_schema
from features.vocabulary import UNKNOWN
from training.datasets.encoded import Rows, encode_split
from training.datasets.prepared import Prepared
from training.datasets.vocabularies import learn_vocabularies
from training.fit import fit_network, predict
from training.networks import NETWORKS
from training.networks.contract import Fields, Part
from training.networks.embeddings import Embeddings
from training.train import Start, train
from training.train_settings import TrainSettings
from training.unknown import Hiding, Unseen, occurrences

QUICK = {"epochs": 6, "batch": 64, "threads": 1, "learning_rate": 0.01, "embedding_l2": 1e-4, "least_steps": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return small.data_set(tmp_path_factory.mktemp("unknown"), (3000, 300, 300))


@pytest.fixture(scope="module")
def rows(data: Prepared) -> Rows:
    return encode_split(data, "train", Encoder(data.schema, learn_vocabularies(data)))


def spread(part: Part) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """A part's ids `(R, ..., W)`."""
    ids = part.ids if part.rows is None else part.ids[part.rows]
    return ids.numpy()


def test_strangers_are_encoded_as_the_service_encodes_whom_it_does_not_know(rows: Rows, data: Prepared) -> None:
    encoder = Encoder(data.schema, learn_vocabularies(data))
    ad = encoder.unknown_ads(["nobody's"])
    assert (rows.strangers.ad.ids == ad.ids).all()
    assert (rows.strangers.ad.numbers == ad.numbers).all()
    user = encoder.encode_one("user", {}, "nobody")
    expected = user.ids.copy()
    expected[0, 0] = UNKNOWN  # the id is hashed here: a bucket would be somebody's
    assert (rows.strangers.user.ids == expected).all()
    assert (rows.strangers.user.numbers == user.numbers).all()


def test_nothing_is_hidden_at_rate_0(rows: Rows) -> None:
    chosen = np.arange(40)
    batch, twins = Hiding(rows, 0.0, seed=1).batch(chosen)
    assert not len(twins)
    for ours, whole in zip(batch[:3], rows.batch(chosen)[:3], strict=True):
        assert (spread(ours) == spread(whole)).all()
        assert (
            (ours.numbers[ours.rows] == whole.numbers[whole.rows]).all() if ours.rows is not None else (ours.numbers == whole.numbers).all()
        )


def test_values_are_hidden_at_their_rate_and_twins_have_an_unknown_ad(rows: Rows) -> None:
    chosen, rate = np.arange(3000), 0.1
    (user, history, ad, _), twins = Hiding(rows, rate, seed=1).batch(chosen)
    whole = rows.batch(chosen)
    n = len(chosen)
    assert 0.08 < len(twins) / n < 0.12
    assert len(user.ids) == len(spread(history)) == len(ad.ids) == n + 2 * len(twins)
    # Twins: the same request, once with the ad of which nothing is known and once with any ad.
    unknown, known = slice(n, n + len(twins)), slice(n + len(twins), None)
    for some in (unknown, known):
        assert (user.ids[some] == user.ids[twins]).all()
        assert (user.numbers[some] == user.numbers[twins]).all()
        assert (spread(history)[some] == spread(history)[twins]).all()
    assert (ad.ids[unknown].numpy() == rows.strangers.ad.ids).all()
    assert (ad.numbers[unknown].numpy() == rows.strangers.ad.numbers).all()
    ads, times = np.unique(ad.ids[known].numpy(), axis=0, return_counts=True)
    assert {tuple(each) for each in ads.reshape(len(ads), -1)} == {tuple(each) for each in rows.catalogue.ids}
    assert times.max() < 4 * times.min()
    # Ads: a value of ten is unknown, padding stays, the rest as it was.
    now, was = spread(ad)[:n], spread(whole[2])
    assert (now[was == 0] == 0).all()
    assert set(np.unique(now[now != was])) == {UNKNOWN}
    assert 0.08 < (now != was)[was > 1].mean() < 0.12
    # Users: of a tenth nothing is known but the context, which stays and is only hidden value by value.
    nobody = rows.strangers.user.ids.shape[1]
    hidden = (user.ids[:n, :nobody].numpy() == rows.strangers.user.ids).all(1) & (spread(history)[:n].sum((1, 2)) == 0)
    assert 0.08 < hidden.mean() < 0.14
    assert (user.ids[:n, nobody:].numpy() != UNKNOWN).mean() > 0.85
    # Behaviours: a tenth is on an ad that nobody knows.
    behaved = spread(whole[1])[~hidden][..., 0] > 0
    unknown = (spread(history)[:n][~hidden] == rows.strangers.behaviour.ids[0]).all(-1)
    assert 0.08 < unknown[behaved].mean() < 0.13
    assert not unknown[~behaved].any()


def test_the_rows_themselves_stay_as_they_are(rows: Rows) -> None:
    before = [block.ids.copy() for block in (rows.user, rows.ad, rows.behaviours)]
    Hiding(rows, 0.5, seed=1).batch(np.arange(100))
    assert all((block.ids == was).all() for block, was in zip((rows.user, rows.ad, rows.behaviours), before, strict=True))


def test_a_seed_hides_the_same_and_another_does_not(rows: Rows) -> None:
    drawn = [Hiding(rows, 0.1, seed).batch(np.arange(200))[0][2].ids for seed in (1, 1, 2)]
    assert drawn[0].shape == drawn[1].shape
    assert (drawn[0] == drawn[1]).all()
    assert drawn[0].shape != drawn[2].shape or (drawn[0] != drawn[2]).any()


def place(network: torch.nn.Module, rows: Rows) -> float:
    """Mean rank of an ad of which nothing is known among the 12 of the catalogue, 1 to 13, over the users of a split."""
    ads = np.unique(rows.ad.ids, axis=0, return_index=True)[1]
    user, history, *_ = rows.batch(np.arange(len(rows)))
    ids = np.concatenate([rows.strangers.ad.ids, rows.ad.ids[ads]])
    numbers = np.concatenate([rows.strangers.ad.numbers, rows.ad.numbers[ads]])
    ad = Part(*(torch.from_numpy(block).expand(len(rows), -1, -1) for block in (ids, numbers)))
    with torch.no_grad():
        scores = small.click(network, user, history, ad).numpy()
    return float(1 + (scores[:, 1:] > scores[:, :1]).sum(1).mean())


def trained(data: Prepared, family: str, rate: float, start: Start | None = None, **more: object) -> tuple[torch.nn.Module, Rows, Encoder]:
    settings = TrainSettings(**{**QUICK, "unknown_rate": rate, **more})
    made = train(data, family, small.NETWORK_SETTINGS[family], settings, small.quiet(), start)
    return made.network, encode_split(data, "test", made.encoder), made.encoder


Once = Callable[[str], tuple[torch.nn.Module, Rows, Encoder]]


@pytest.fixture(scope="module")
def once(data: Prepared) -> Once:
    """A network that was trained with the unknown, for each family that is asked for."""
    return cache(lambda family: trained(data, family, 0.05))


def test_an_unknown_ad_ends_in_the_middle_and_stays_there_in_a_warm_start(data: Prepared, once: Once) -> None:
    family = "deepfm"
    network, test, encoder = once(family)
    assert 5.5 < place(network, test) < 8.5
    again, test, _ = trained(data, family, 0.05, Start(network, encoder.vocabularies), epochs=2)
    assert 5.5 < place(again, test) < 8.5
    # The other way round: what is never hidden is wherever its embedding happens to lie.
    embeddings = [module for module in network.modules() if isinstance(module, Embeddings)]
    free, *_ = trained(data, family, 0.0)
    for ours, theirs in zip(embeddings, (m for m in free.modules() if isinstance(m, Embeddings)), strict=True):
        row = ours.rows_of("ad_id").start
        assert ours.table.weight[row].norm() > 3 * theirs.table.weight[row].norm()


def test_valid_and_test_are_whole(data: Prepared, settled_soon: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    batch = Hiding.batch

    def noted(self: Hiding, chosen: np.ndarray[tuple[int], np.dtype[np.int64]], among: Rows | None) -> object:
        seen.append(len(self.rows))
        return batch(self, chosen, among)

    monkeypatch.setattr(Hiding, "batch", noted)
    network, test, _ = trained(data, "deepfm", 0.3, epochs=1)
    assert set(seen) == {3000}
    assert (predict(network, test) == predict(network, test)).all()


HASHED = small.SCHEMA.replace('[ad.ad_id]\nkind = "category"', '[ad.ad_id]\nkind = "category"\nbuckets = 100')


def test_buckets_that_nothing_was_hashed_into_are_unknown(data: Prepared, settled_soon: None) -> None:
    hashed = replace(data, schema=parse_schema(HASHED))
    encoder = Encoder(hashed.schema, learn_vocabularies(hashed))
    train_rows, valid = encode_split(hashed, "train", encoder), encode_split(hashed, "valid", encoder)
    network = NETWORKS["deepfm"](Fields.of(hashed.schema, encoder.vocabularies), small.NETWORK_SETTINGS["deepfm"])
    fit_network(network, train_rows, valid, TrainSettings(**{**QUICK, "epochs": 2}), small.quiet())
    for embeddings in (module for module in network.modules() if isinstance(module, Embeddings)):
        own = embeddings.rows_of("ad_id")
        counts, table = occurrences(embeddings, train_rows)[own], embeddings.table.weight[own]
        same = (table == table[0]).all(1)
        assert same[counts == 0].all()
        assert (counts == 0).sum() > 50
        assert not same[counts > 0].any()


def test_a_warm_start_keeps_what_it_knows_of_values_that_its_rows_do_not_have(once: Once, rows: Rows, settled_soon: None) -> None:
    network = deepcopy(once("deepfm")[0])
    few = replace(rows, labels=rows.labels[:3], users=rows.users[:3], user=rows.user.take([0, 1, 2]), ad=rows.ad.take([0, 1, 2]))
    few = replace(few, history=rows.history[:3])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    settings = TrainSettings(**{**QUICK, "embedding_l2": 0.1, "epochs": 3})
    fit_network(network, few, rows, settings, small.quiet(), warm=True)
    for name, embeddings in network.named_modules():
        if isinstance(embeddings, Embeddings):
            counts, now = occurrences(embeddings, few), embeddings.table.weight
            left = counts == 0
            was = before[f"{name}.table.weight"]
            for own in map(embeddings.rows_of, embeddings.sizes):
                left[own] &= (was[own] != was[own.start]).any(1)  # buckets that nothing was ever hashed into follow the unknown
            assert left.sum() > 5
            assert (now[left] == was[left]).all()
    assert all(len(never) == 0 or (table(never) == table(unknown)).all() for table, never, unknown in Unseen(network, few, warm=True).found)
