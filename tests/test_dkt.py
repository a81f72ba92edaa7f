import pytest
import small
import torch

from tests.test_networks import CLOSE, HISTORY_AND_ADS
from training.networks.contract import Part


@pytest.mark.parametrize("text", [small.SCHEMA, HISTORY_AND_ADS])
def test_logits_are_the_last_state_against_each_candidate(text: str) -> None:
    network = small.network("dkt", text, state=5)
    user, history, ad = small.parts(text)
    lengths = (history.ids[..., 0] > 0).sum(1).tolist()
    assert lengths == [4, 4, 2]
    with torch.no_grad():
        logits = small.click(network, user, history, ad)
        past, ads = network.embed("history", history).flatten(2), network.embed("ad", ad).flatten(2)
        users = network.embed("user", user).flatten(1) if "user" in network.embed else torch.zeros(3, 0)
        pooled = [network.first("history", history)[r, : lengths[r]].mean(0).sum() for r in range(3)]
        for r in range(3):
            _, state = torch.nn.GRU.forward(network.gru, past[r : r + 1, : lengths[r]])
            given = torch.cat([state[0, 0], users[r]])
            once = pooled[r] + (network.first("user", user)[r].sum() if "user" in network.embed else 0)
            for c in range(5):
                row = network.read.weight.T @ ads[r, c]
                answer = row @ given + network.read.bias @ ads[r, c] + network.first("ad", ad)[r, c].sum()
                assert torch.allclose(logits[r, c], answer + once + network.bias[0], **CLOSE)


def test_the_order_of_behaviours_matters() -> None:
    network, (user, history, ad) = small.network("dkt"), small.parts()
    with torch.no_grad():
        turned = small.click(network, user, Part(history.ids.flip(1), history.numbers.flip(1)), ad)
        assert (turned - small.click(network, user, history, ad))[:2].abs().amax() > 1e-2
