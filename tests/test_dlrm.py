from itertools import combinations

import pytest
import small
import torch
from torch import Tensor

from tests.test_dcn import mlp
from tests.test_networks import ONLY_AD_NUMBER, ONLY_ADS, ONLY_NUMBERS, SCHEMAS
from training.networks.contract import Part, RequestTensors
from training.networks.embeddings import Embeddings, numbers_of

WITH_CATEGORIES = [text for text in SCHEMAS if text not in (ONLY_NUMBERS, ONLY_AD_NUMBER)]
ONLY_CATEGORIES = 'name = "categories"\n[user.age]\nkind = "category"\nmissing = "unknown"\n[ad.ad_id]\nkind = "category"\n'
NUMBERS_OF_ADS = 'name = "numbers"\n[user.age]\nkind = "category"\nmissing = "unknown"\n[ad.price]\nkind = "number"\n'


def categories(embed: Embeddings, parts: tuple[Part, Part, Part], row: int, candidate: int) -> list[Tensor]:
    """One vector a category of one request and candidate, the history's as the mean over its behaviours."""
    user, history, ad = parts
    found = list(embed("user", user)[row]) if "user" in embed else []
    if "history" in embed:
        past = [embed("history", history)[row, t] for t in range(history.ids.shape[1]) if history.ids[row, t, 0] > 0]
        found += list(torch.stack(past).mean(0))
    return found + (list(embed("ad", ad)[row, candidate]) if "ad" in embed else [])


def numbers(parts: tuple[Part, Part, Part], row: int, candidate: int) -> Tensor:
    """All numbers of one request and candidate, the history's as the mean over its behaviours."""
    user, history, ad = parts
    past = [history.numbers[row, t] for t in range(history.numbers.shape[1]) if history.ids.shape[2] and history.ids[row, t, 0] > 0]
    mean = torch.stack(past).mean(0) if past else torch.zeros(0)
    return torch.cat([user.numbers[row], mean, ad.numbers[row, candidate]])


def test_the_numbers_are_those_of_user_behaviours_and_ad_whether_behaviours_are_spread_or_not() -> None:
    parts = small.parts()
    expected = torch.stack([torch.stack([numbers(parts, r, c) for c in range(5)]) for r in range(3)])
    assert torch.allclose(numbers_of(RequestTensors(*parts)), expected, atol=1e-6)
    user, history, ad = parts
    rows = torch.arange(12).view(3, 4)
    distinct = Part(history.ids.flatten(0, 1), history.numbers.flatten(0, 1), rows)
    assert torch.allclose(numbers_of(RequestTensors(user, distinct, ad)), expected, atol=1e-6)


@pytest.mark.parametrize("text", [*WITH_CATEGORIES, ONLY_CATEGORIES, NUMBERS_OF_ADS])
def test_logits_are_a_top_mlp_on_the_dense_vector_and_the_product_of_every_pair(text: str) -> None:
    network, parts = small.network("dlrm", text, bottom=()), small.parts(text)
    count = network.fields.categories.request
    with torch.no_grad():
        logits = small.click(network, *parts)
        for row in range(3):
            for candidate in range(5):
                found = categories(network.embed, parts, row, candidate)
                dense = [] if network.bottom is None else [mlp(network.bottom, numbers(parts, row, candidate))]
                u, a = found[:count], [*dense, *found[count:]]
                within = [x @ y for x, y in combinations(u, 2)]
                beyond = [y @ x for y in a for x in u] + [x @ y for x, y in combinations(a, 2)]
                request = torch.stack(within)[None] if within else torch.zeros(1, 0)
                each = torch.cat([*dense, *([torch.stack(beyond)] if beyond else [])])
                expected = float(network.top(request, each[None, None]))
                assert float(logits[row, candidate]) == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_a_product_is_of_two_different_fields_and_each_pair_counts_once() -> None:
    network = small.network("dlrm", ONLY_ADS, bottom=())
    a = torch.tensor([[[[1.0, 0, 0, 0], [2.0, 1, 0, 0], [0, 3.0, 0, 0], [0, 0, 0, 5.0]]]])
    _, each = network.products(torch.zeros(1, 0, 1), a)
    assert each.tolist() == [[[2.0, 0.0, 0.0, 3.0, 0.0, 0.0]]]
