import pytest
import small
import torch

from tests.test_networks import CLOSE, HISTORY_AND_ADS


@pytest.mark.parametrize("text", [small.SCHEMA, HISTORY_AND_ADS])
def test_logits_are_the_tower_over_user_mean_of_behaviours_and_ad(text: str) -> None:
    network = small.network("youtube_dnn", text)
    user, history, ad = small.parts(text)
    with torch.no_grad():
        logits, past, ads = small.click(network, user, history, ad), network.embed("history", history), network.embed("ad", ad)
        for r, length in enumerate((4, 4, 2)):
            mean = sum(past[r, t] for t in range(length)) / length
            request = torch.cat([network.embed("user", user)[r].flatten() if "user" in network.embed else torch.zeros(0), mean.flatten()])
            for c in range(5):
                assert torch.allclose(logits[r, c], network.tower(request[None], ads[r, c].flatten()[None, None]), **CLOSE)
