from itertools import combinations

import pytest
import small
import torch
from torch import Tensor

from tests.test_networks import CLOSE, SCHEMAS
from training.networks.contract import Part
from training.networks.deepfm import DeepFM
from training.networks.embeddings import Embeddings


def vectors(embed: Embeddings, parts: tuple[Part, Part, Part], row: int, candidate: int) -> list[Tensor]:
    """One vector a field of one request and candidate, the history's as the mean over its behaviours."""
    user, history, ad = parts
    found = list(embed("user", user)[row]) if "user" in embed else []
    if "history" in embed:
        past = [embed("history", history)[row, t] for t in range(history.ids.shape[1]) if history.ids[row, t, 0] > 0]
        mean = torch.stack(past).mean(0) if past else torch.zeros_like(embed("history", history)[row, 0])
        found += list(mean)
    return found + list(embed("ad", ad)[row, candidate])


@pytest.mark.parametrize("text", SCHEMAS)
def test_logits_are_first_order_pairs_and_tower(text: str) -> None:
    network = small.network("deepfm", text)
    assert isinstance(network, DeepFM)
    parts = small.parts(text)
    with torch.no_grad():
        logits = small.click(network, *parts)
        assert logits.shape == (3, 5)
        for row in range(3):
            for candidate in range(5):
                first = sum(float(v) for v in vectors(network.first, parts, row, candidate))
                second = vectors(network.second, parts, row, candidate)
                pairs = sum(float(a @ b) for a, b in combinations(second, 2))
                split = len(second) - len(network.second("ad", parts[2])[row, candidate])
                request, ad = torch.cat([*second[:split], torch.zeros(0)]), torch.cat(second[split:])
                deep = float(network.tower(request[None], ad[None, None]))
                expected = first + pairs + deep + float(network.bias)
                assert float(logits[row, candidate]) == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_the_order_of_behaviours_does_not_matter() -> None:
    user, history, ad = small.parts()
    network = small.network("deepfm")
    with torch.no_grad():
        turned = small.click(network, user, Part(history.ids.flip(1), history.numbers.flip(1)), ad)
        assert torch.allclose(turned, small.click(network, user, history, ad), **CLOSE)
