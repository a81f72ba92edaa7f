from itertools import combinations

import pytest
import small
import torch
from torch import Tensor

from tests.test_networks import CLOSE, SCHEMAS
from training.networks.contract import Part
from training.networks.deepfm import FusedDeepFM
from training.networks.embeddings import Embeddings
from training.networks.fuse import fused

NORMS = [{"norm": "none"}, {"norm": "layer", "norm_embedding": "variance"}, {"norm": "variance", "norm_embedding": "layer"}]
ONLY_CATEGORIES = 'name = "categories"\n[user.user_id]\nkind = "category"\n[ad.ad_id]\nkind = "category"\n[ad.genre]\nkind = "category"\n'


def vectors(embed: Embeddings, parts: tuple[Part, Part, Part], row: int, candidate: int) -> list[Tensor]:
    """One vector a field of one request and candidate, the history's as the mean over its behaviours."""
    user, history, ad = parts
    found = list(embed("user", user)[row]) if "user" in embed else []
    if "history" in embed:
        past = [embed("history", history)[row, t] for t in range(history.ids.shape[1]) if history.ids[row, t, 0] > 0]
        mean = torch.stack(past).mean(0) if past else torch.zeros_like(embed("history", history)[row, 0])
        found += list(mean)
    return found + list(embed("ad", ad)[row, candidate])


@pytest.mark.parametrize(("text", "settings"), [*((text, {}) for text in SCHEMAS), *((small.SCHEMA, settings) for settings in NORMS)])
def test_logits_are_first_order_pairs_and_tower(text: str, settings: dict[str, str]) -> None:
    network = small.network("deepfm", text, **settings)
    parts = small.parts(text)
    assert "history" not in network.first  # its weights would be the ads'
    with torch.no_grad():
        logits = small.click(network, *parts)
        assert logits.shape == (3, 5)
        for row in range(3):
            for candidate in range(5):
                first = sum(float(v) for v in vectors(network.first, parts, row, candidate))
                second = [network.norm(vector) for vector in vectors(network.second, parts, row, candidate)]
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


@pytest.mark.parametrize("settings", [{}, *NORMS, {"norm_embedding": "variance"}])
def test_what_a_norm_over_a_row_does_stays_in_the_fused_network(settings: dict[str, str]) -> None:
    parts = small.parts(ONLY_CATEGORIES)
    network = small.network("deepfm", ONLY_CATEGORIES, **settings)
    better = fused(network)
    assert isinstance(better, FusedDeepFM) == (settings in ({}, {"norm": "none"}))
    with torch.no_grad():
        assert torch.allclose(small.click(better, *parts), small.click(network, *parts), **CLOSE)


def test_weights_of_bundles_from_before_the_norms_still_fit() -> None:
    names = {name for name in small.network("deepfm").state_dict() if not name.startswith(("first.", "second."))}
    norm = {f"tower.rest.0.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert names == {"bias", "tower.first.weight", "tower.first.bias", "tower.rest.2.weight", "tower.rest.2.bias", *norm}
