"""LR, FM, FFM and FwFM, each beside its paper's sum written out field by field and pair by pair."""

from itertools import combinations

import pytest
import small
import torch
from torch import Tensor

from tests.test_deepfm import vectors
from tests.test_networks import ONLY_AD_NUMBER, SCHEMAS
from training.networks.contract import Fields, Network, Part
from training.networks.embeddings import Embeddings
from training.networks.ffm import FFM, FFMSettings
from training.networks.fm import FM
from training.networks.fwfm import FwFM
from training.networks.interactions import WeightedProducts, inner_products
from training.networks.lr import LR

Parts = tuple[Part, Part, Part]


def literal(network: Network, parts: Parts, row: int, candidate: int) -> float:
    """The sum of the network's paper."""

    def of(embed: Embeddings) -> list[Tensor]:
        return vectors(embed, parts, row, candidate)

    total = float(network.intercept)
    if isinstance(network, LR | FM | FFM) or (isinstance(network, FwFM) and network.first is not None):
        total += sum(float(weight) for weight in of(network.first))
    if isinstance(network, FM):
        total += sum(float(a @ b) for a, b in combinations(of(network.second), 2))
    if isinstance(network, FFM):
        own = [vector.view(-1, network.width) for vector in of(network.second)]  # (F - 1, k) each: one for every other field
        towards = [{j: own[i][j if j < i else j - 1] for j in range(len(own)) if j != i} for i in range(len(own))]
        total += sum(float(towards[i][j] @ towards[j][i]) for i, j in combinations(range(len(own)), 2))
    if isinstance(network, FwFM):
        found = of(network.second)
        pairs = combinations(range(len(found)), 2)
        total += sum(float(r * (found[i] @ found[j])) for r, (i, j) in zip(network.pairs.weight, pairs, strict=True))
        if network.linear is not None:
            total += sum(float(v @ w) for v, w in zip(found, network.linear.weight, strict=True))
    return total


@pytest.mark.parametrize("text", SCHEMAS)
@pytest.mark.parametrize(("family", "settings"), [("lr", {}), ("fm", {}), ("ffm", {}), ("fwfm", {}), ("fwfm", {"linear": "value"})])
def test_logits_are_the_sum_of_the_paper(family: str, settings: dict[str, str], text: str) -> None:
    if family == "ffm" and text is ONLY_AD_NUMBER:
        return  # refused, see below
    network, parts = small.network(family, text, **settings), small.parts(text)
    with torch.no_grad():
        logits = small.click(network, *parts)
        assert logits.shape == (3, 5)
        for row in range(3):
            for candidate in range(5):
                assert float(logits[row, candidate]) == pytest.approx(literal(network, parts, row, candidate), abs=1e-4, rel=1e-4)


U = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])
A = torch.tensor([[[[2.0, 1.0]], [[0.0, -1.0]]]])


def test_inner_products_by_hand() -> None:
    # u1 u2 = 3; with the first ad u1 a = 4, u2 a = 6; with the second u1 a = -2, u2 a = 0.
    assert inner_products(U, A).tolist() == [[13.0, 1.0]]


def test_an_fwfm_begins_as_a_factorisation_machine() -> None:
    block = WeightedProducts(2, 1)
    with torch.no_grad():
        assert torch.allclose(block(U, A), inner_products(U, A))


def test_an_ffm_of_too_many_values_is_refused_with_the_number() -> None:
    fields = Fields.of(small.schema(), small.vocabularies())
    large = fields._replace(sizes={**fields.sizes, "user_id": 1_000_002})
    # 12 other fields of 4 numbers for 1,000,001 users, 28 other values and padding: 48,001,440 numbers of 16 bytes.
    with pytest.raises(
        ValueError, match=r"^FFM has 1,000,030 values x 12 other fields x 4 numbers: 48,001,440, which take 0\.77 GB to train"
    ):
        FFM(large, FFMSettings(most_gigabytes=0.7))
    with pytest.raises(ValueError, match=r"most_gigabytes is 0\.7; set it higher, set a smaller embedding, hash .* or train fwfm"):
        FFM(large, FFMSettings(most_gigabytes=0.7))
    assert FFM(large, FFMSettings(most_gigabytes=0.8)).second.table.weight.numel() == 48_001_440
