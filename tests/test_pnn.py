"""IPNN and OPNN: the first layer as the paper's sums over fields and pairs, unit by unit."""

from itertools import combinations

import pytest
import small
import torch
from torch import Tensor

from tests.test_deepfm import vectors
from tests.test_networks import SCHEMAS
from training.networks.contract import Network
from training.networks.interactions import PairwiseProducts
from training.networks.layers import Tower
from training.networks.pnn import IPNN, OPNN, SuperposedOuterProduct


def test_pairwise_products_by_hand() -> None:
    u = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])
    a = torch.tensor([[[[2.0, 1.0], [1.0, 1.0]], [[0.0, -1.0], [2.0, 0.0]]]])
    within, across = PairwiseProducts(2, 2)(u, a)
    assert within.tolist() == [[3.0]]
    # Of each candidate: its first field with both of the request, its second with both, its own two.
    assert across.tolist() == [[[4.0, 6.0, 3.0, 3.0, 3.0], [-2.0, 0.0, 2.0, 6.0, 0.0]]]


def test_the_superposed_outer_product_by_hand() -> None:
    # f = (1, 2) + (3, -5) = (4, -3): the outer product is [[16, -12], [-12, 9]].
    total = torch.tensor([1.0, 2.0]) + torch.tensor([3.0, -5.0])
    assert SuperposedOuterProduct(2)(total).tolist() == [16.0, -12.0, 9.0]


def first_layer(network: Network, fields: list[Tensor], request: int) -> Tensor:
    """l_z + l_p + b_1 of eq. 2 `(D_1,)`, the weights of the layer taken apart into W_z and W_p."""
    weight, bias = network.tower.first.weight, network.tower.first.bias
    width = len(fields[0])
    # Columns: the request's fields, its pairs, the candidate's fields, the pairs with one of those or the outer product.
    parts, position = {}, 0
    for i in range(request):
        parts["z", i] = weight[:, position : position + width]
        position += width
    if isinstance(network, IPNN):
        for pair in combinations(range(request), 2):
            parts["p", *pair] = weight[:, position]
            position += 1
    for i in range(request, len(fields)):
        parts["z", i] = weight[:, position : position + width]
        position += width
    signals = bias + sum(parts["z", i] @ fields[i] for i in range(len(fields)))
    if isinstance(network, OPNN):
        total = torch.stack(fields).sum(0)
        return signals + sum(weight[:, position + n] * total[i] * total[j] for n, (i, j) in enumerate(upper(width)))
    order = [(i, j) for j in range(request, len(fields)) for i in range(request)] + list(combinations(range(request, len(fields)), 2))
    for n, pair in enumerate(order):
        parts["p", *pair] = weight[:, position + n]
    return signals + sum(parts["p", i, j] * (fields[i] @ fields[j]) for i, j in combinations(range(len(fields)), 2))


def upper(width: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(width) for j in range(i, width)]


def after(tower: Tower, signals: Tensor) -> float:
    return float(tower.rest(signals[None, None]).flatten())


@pytest.mark.parametrize("text", SCHEMAS)
@pytest.mark.parametrize("family", ["ipnn", "opnn"])
def test_logits_are_the_mlp_on_linear_and_quadratic_signals(family: str, text: str) -> None:
    network, parts = small.network(family, text), small.parts(text)
    with torch.no_grad():
        logits = small.click(network, *parts)
        for row in range(3):
            for candidate in range(5):
                fields = vectors(network.embed, parts, row, candidate)
                signals = first_layer(network, fields, network.fields.request)
                assert float(logits[row, candidate]) == pytest.approx(after(network.tower, signals), abs=1e-4, rel=1e-4)
