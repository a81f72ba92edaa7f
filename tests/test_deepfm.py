from itertools import combinations

import pytest
import small
import torch
from torch import Tensor

from training.networks.contract import Part
from training.networks.deepfm import DeepFM
from training.networks.embeddings import Embeddings

WITHOUT_HISTORY = small.SCHEMA.replace(small.HISTORY, "")
ONLY_ADS = 'name = "ads"\n' + small.AD
ONLY_NUMBERS = 'name = "numbers"\n[user.income]\nkind = "number"\n[ad.price]\nkind = "number"\n'
ONLY_AD_NUMBER = 'name = "number"\n[ad.price]\nkind = "number"\n'
HISTORY_AND_ADS = 'name = "history"\n' + small.HISTORY + small.AD
SCHEMAS = [small.SCHEMA, WITHOUT_HISTORY, ONLY_ADS, ONLY_NUMBERS, ONLY_AD_NUMBER, HISTORY_AND_ADS]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # float32 sums in another order


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


@pytest.mark.parametrize("text", SCHEMAS)
def test_candidates_are_scored_each_by_itself(text: str) -> None:
    check_candidates(small.network("deepfm", text), text)


def check_candidates(network: torch.nn.Module, text: str) -> None:
    """C candidates in one request are C requests of one candidate, in any order."""
    user, history, ad = small.parts(text)
    with torch.no_grad():
        logits = small.click(network, user, history, ad)
        assert logits.std() > 0.05
        for c in range(5):
            one = small.click(network, user, history, Part(ad.ids[:, c : c + 1], ad.numbers[:, c : c + 1]))
            assert torch.allclose(one[:, 0], logits[:, c], **CLOSE)
        order = torch.tensor([3, 1, 4, 0, 2])
        assert torch.allclose(small.click(network, user, history, Part(ad.ids[:, order], ad.numbers[:, order])), logits[:, order], **CLOSE)
        for r in range(3):
            alone = small.click(network, *(Part(part.ids[r : r + 1], part.numbers[r : r + 1]) for part in (user, history, ad)))
            assert torch.allclose(alone[0], logits[r], **CLOSE)


def test_padding_changes_nothing() -> None:
    check_padding(small.network("deepfm"))


def check_padding(network: torch.nn.Module) -> None:
    user, history, ad = small.parts()
    ids = torch.nn.functional.pad(history.ids, (0, 0, 0, 6))
    numbers = torch.nn.functional.pad(history.numbers, (0, 0, 0, 6))
    with torch.no_grad():
        logits = small.click(network, user, history, ad)
        assert torch.allclose(small.click(network, user, Part(ids, numbers), ad), logits, **CLOSE)
        # Whatever stands in a padded place is masked: its other columns too.
        numbers[:, -1], ids[:, -1, 1:] = 7.0, 2
        assert torch.allclose(small.click(network, user, Part(ids, numbers), ad), logits, **CLOSE)
        # But a behaviour is not.
        ids[:, -1, 0] = 2
        assert not torch.allclose(small.click(network, user, Part(ids, numbers), ad), logits, atol=1e-2)


def test_an_empty_history_is_finite_and_leaves_finite_gradients() -> None:
    check_empty(small.network("deepfm"))


def check_empty(network: torch.nn.Module) -> None:
    user, history, ad = small.parts()
    network.train()
    logits = small.click(network, user, Part(torch.zeros_like(history.ids), torch.zeros_like(history.numbers)), ad)
    assert torch.isfinite(logits).all()
    logits.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters() if parameter.grad is not None)


def test_the_order_of_behaviours_does_not_matter() -> None:
    user, history, ad = small.parts()
    network = small.network("deepfm")
    with torch.no_grad():
        turned = small.click(network, user, Part(history.ids.flip(1), history.numbers.flip(1)), ad)
        assert torch.allclose(turned, small.click(network, user, history, ad), **CLOSE)
