"""A training that goes on from a published network."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch

from features.bundle import BundleError, load_bundle
from features.encode import Encoder
from features.vocabulary import Vocabularies, Vocabulary
from training.datasets.encoded import encode_split
from training.datasets.prepared import Prepared
from training.datasets.vocabularies import learn_vocabularies
from training.export import export
from training.fit import fit_network, predict
from training.networks import NETWORKS
from training.networks.contract import Fields
from training.networks.embeddings import Embeddings
from training.networks.warm_start import warm_start
from training.train import Start, train
from training.train_settings import TrainError, TrainSettings
from training.weights import packed, settings_of, start_of

pytestmark = pytest.mark.usefixtures("traced_export")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return small.data_set(tmp_path_factory.mktemp("small"))


def fewer(vocabularies: Vocabularies) -> Vocabularies:
    """The vocabularies of a time when every second value was not there, in another order."""
    known = {name: v if not isinstance(v, Vocabulary) else Vocabulary(v.values[::-2]) for name, v in vocabularies.categories.items()}
    return replace(vocabularies, categories=known)


def test_values_that_stay_keep_their_ids_and_new_ones_come_after(data: Prepared) -> None:
    alone = learn_vocabularies(data)
    base = fewer(alone)
    grown = learn_vocabularies(data, base)
    added = 0
    for name, vocabulary in grown.categories.items():
        if isinstance(vocabulary, Vocabulary):
            known, learned = base.categories[name], alone.categories[name]
            assert [vocabulary.id(value) for value in known.values] == [known.id(value) for value in known.values]
            assert vocabulary.values[len(known.values) :] == tuple(v for v in learned.values if v not in known.values)
            added += len(vocabulary.values) - len(known.values)
    assert added > 8
    gone = replace(base, categories={**base.categories, "age": Vocabulary(["99", "25"])})
    assert learn_vocabularies(data, gone).categories["age"].values[:2] == ("99", "25")


def test_moments_stay(data: Prepared) -> None:
    base = small.vocabularies()
    assert learn_vocabularies(data, base).moments == base.moments
    assert learn_vocabularies(data).moments != base.moments


def test_nothing_new_leaves_the_vocabularies_as_they_are(data: Prepared) -> None:
    base = learn_vocabularies(data)
    assert learn_vocabularies(data, base).to_json() == base.to_json()


@pytest.mark.parametrize("family", ["deepfm", "din"])
def test_a_network_that_takes_over_scores_every_row_as_the_old_one(data: Prepared, family: str) -> None:
    base = fewer(learn_vocabularies(data))
    grown = learn_vocabularies(data, base)
    built = {}
    for name, vocabularies in (("old", base), ("new", grown)):
        torch.manual_seed(len(built))
        built[name] = NETWORKS[family](Fields.of(data.schema, vocabularies), small.NETWORK_SETTINGS[family])
    fit_network(
        built["old"],
        *(encode_split(data, s, Encoder(data.schema, base)) for s in ("train", "valid")),
        TrainSettings(epochs=1, threads=1, unknown_rate=0),
        small.quiet(),
    )
    rows = {name: encode_split(data, "test", Encoder(data.schema, v)) for name, v in (("old", base), ("new", grown))}
    before = predict(built["old"], rows["old"])
    assert not np.allclose(predict(built["new"], rows["new"]), before, atol=1e-3)
    warm_start(built["old"], built["new"])
    assert (predict(built["new"], rows["new"]) == before).all()


def test_the_rows_of_vocabularies_do_not_overlap_and_fill_the_table() -> None:
    embeddings = Embeddings(Fields.of(small.schema(), small.vocabularies()), 2)
    rows = [row for name in embeddings.sizes for row in range(*embeddings.rows_of(name).indices(10_000))]
    assert sorted(rows) == list(range(1, embeddings.table.num_embeddings))
    genre = small.schema().layouts["ad"]
    ids = torch.zeros((1, genre.width), dtype=torch.int64)
    ids[0, 1] = 1  # the unknown genre, see small.AD
    assert embeddings.table_rows("ad", ids)[0, 1] == embeddings.rows_of("genre").start


def test_another_network_is_refused(data: Prepared) -> None:
    start = Start(small.network("deepfm", hidden=(6,)), small.vocabularies())
    with pytest.raises(TrainError, match=r"the network to go on from is another one: .*size mismatch for tower\.first\.weight"):
        train(data, "deepfm", small.NETWORK_SETTINGS["deepfm"], TrainSettings(epochs=1), small.quiet(), start)


@pytest.fixture(scope="module")
def published(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.export(
        data, small.quick(data, epochs=1, embedding_l2=0.25, seed=5), tmp_path_factory.mktemp("models"), "m", small.quiet()
    )


def test_a_bundle_s_weights_give_what_its_graph_gives(data: Prepared, published: Path) -> None:
    bundle = load_bundle(published)
    start = start_of(bundle)
    assert not start.network.training
    rows, graph = export.scores_of(bundle, data, "test", small.quiet())
    calibration = export.Calibration(**json.loads((published / export.CALIBRATION).read_text()))
    assert np.abs(calibration.on_log(predict(start.network, rows)) - graph["click"]).max() < 1e-5


def test_a_bundle_tells_how_it_was_trained(published: Path) -> None:
    bundle = load_bundle(published)
    bundle.manifest["settings"] |= {"workers": 2, "shard_rows": 5}  # retraining is for one process, whoever trained before
    network, loop = settings_of(bundle)
    assert network == small.NETWORK_SETTINGS["deepfm"]
    assert (loop.seed, loop.embedding_l2, loop.learning_rate, loop.threads) == (5, 0.25, 0.02, 0)
    assert (loop.workers, loop.shard_rows) == (1, 0)


def test_a_training_goes_on_where_the_other_ended(data: Prepared, published: Path) -> None:
    start = start_of(load_bundle(published))
    table = start.network.second.table.weight.detach().clone()
    still = {"epochs": 1, "threads": 1, "unknown_rate": 0, "batch": 2048, "learning_rate": 1e-12, "embedding_l2": 0.0}
    cold, warm = (train(data, "deepfm", small.NETWORK_SETTINGS["deepfm"], TrainSettings(**still), small.quiet(), s) for s in (None, start))
    before = json.loads((published / export.METRICS).read_text())["test"]["auc"]
    assert abs(warm.metrics["test"].auc - before) < 0.02
    assert [torch.allclose(each.network.second.table.weight, table, atol=1e-4) for each in (cold, warm)] == [False, True]


@pytest.mark.parametrize("bad", ["absent", "torn", "other", "pickled"])
def test_weights_that_cannot_be_used_are_a_sentence(published: Path, bad: str, tmp_path: Path) -> None:
    bundle = replace(load_bundle(published), path=tmp_path)
    weights = (published / "weights.npz").read_bytes()
    if bad == "absent":
        bundle = replace(bundle, manifest={**bundle.manifest, "files": {}})
    elif bad == "torn":
        (tmp_path / "weights.npz").write_bytes(weights[:-50])
    elif bad == "other":
        (tmp_path / "weights.npz").write_bytes(packed(small.network("din")))
    else:
        np.savez(tmp_path / "weights.npz", bias=np.array([{}], object))
    with pytest.raises(BundleError, match="use --start scratch"):
        start_of(bundle)
