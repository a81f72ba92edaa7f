import pytest
import small
import torch
from torch import Tensor

from tests.test_networks import HISTORY_AND_ADS
from training.networks import vae_cf
from training.networks.contract import Labels, Part, RequestTensors
from training.networks.vae_cf import VAECF


def built(text: str = small.SCHEMA, **settings: object) -> VAECF:
    return small.network("vae_cf", text, **settings)


def code(network: VAECF, history: Part, row: int) -> Tensor:
    """Mean and log variance of one history, behaviour by behaviour."""
    fields = network.past("history", history)[row]
    shown = [fields[t].sum(0) for t in range(len(fields)) if history.ids[row, t, 0] > 0]
    x = torch.tanh(sum(shown) / len(shown) ** 0.5 + network.start)
    first, _, last = network.encoder
    return last.weight @ torch.tanh(first.weight @ x + first.bias) + last.bias


def user_of(network: VAECF, latent: Tensor) -> Tensor:
    """What a code is decoded to."""
    x = latent
    for linear in network.decoder[::2]:
        x = torch.tanh(linear.weight @ x + linear.bias)
    return x


@pytest.mark.parametrize("text", [small.SCHEMA, HISTORY_AND_ADS])
def test_a_logit_is_an_ad_s_row_of_the_last_layer_times_the_decoded_mean(text: str) -> None:
    network, (user, history, ad) = built(text, hidden=(6, 5), latent=3), small.parts(text)
    with torch.no_grad():
        logits = small.click(network, user, history, ad)
        for row in range(3):
            decoded = user_of(network, code(network, history, row)[:3])
            for candidate in range(5):
                last = network.items("ad", ad)[row, candidate].sum(0)
                assert float(logits[row, candidate]) == pytest.approx(float(decoded @ last[:-1] + last[-1] + network.bias), abs=1e-4)


@pytest.mark.parametrize("distinct", [False, True])
def test_the_loss_is_the_click_s_and_the_negative_lower_bound_of_the_behaviours(distinct: bool) -> None:
    network, (user, history, ad) = built(latent=3, reconstruction=0.7, beta=0.4, anneal=10).train(), small.parts(candidates=1)
    ads = Part(*(values[[0, 2, 3, 4]] for values in (small.parts(requests=1, candidates=9, seed=3)[2].ids[0], torch.randn(9, 1))))
    ads.ids[:, 0] = torch.tensor([2, 3, 4, 5])
    history.ids[0, :, 0], history.ids[1, :, 0], history.ids[2, :2, 0] = torch.tensor([2, 3, 9, 2]), torch.tensor([5, 5, 5, 4]), 9
    network.begin(ads)  # ad 9 has left the catalogue: it says who the user is, and is not to be found
    network.after_step(5)
    if distinct:
        history = Part(history.ids.flatten(0, 1), history.numbers.flatten(0, 1), torch.arange(12).view(3, 4))
    request, labels = RequestTensors(user, history, ad), Labels({"click": torch.tensor([1.0, 0.0, 1.0])})
    with torch.no_grad():
        outputs = network(request)
        total, found = 0.0, 0
        for row, behaviours in enumerate(([2, 3, 2], [5, 5, 5, 4], [])):
            scores = torch.stack([outputs["user"][row] @ item[:-1] + item[-1] for item in network.items("ad", ads).sum(1)])
            total += sum(float(scores.log_softmax(0)[each - 2]) for each in behaviours)
            found += len(behaviours)
            mean, variance = outputs["mean"][row], outputs["log_variance"][row].exp()
            total -= 0.4 * 0.5 * float(0.5 * (mean**2 + variance - 1 - variance.log()).sum())  # half of the way to beta
        click = torch.nn.functional.binary_cross_entropy_with_logits(outputs["click"][:, 0], labels.heads["click"])
        assert network.loss(outputs, request, labels).item() == pytest.approx(float(click) - 0.7 * total / found, rel=1e-4)


def test_a_code_is_drawn_about_its_mean_in_training_and_is_it_in_service() -> None:
    network, (user, history, ad) = built(latent=3), small.parts(candidates=1)
    request = RequestTensors(user, Part(*(values[:1].expand(4000, -1, -1) for values in history[:2])), ad)
    network.decoder = torch.nn.Sequential()  # so that the output is the code
    network.items = torch.nn.Module()
    network.items.forward = lambda *_: torch.zeros(4000, 1, 1, 4)
    with torch.no_grad():
        drawn = network.train()(request._replace(user=Part(*(v[:1].expand(4000, -1) for v in user[:2]))))
    mean, deviation = drawn["mean"][0], (0.5 * drawn["log_variance"][0]).exp()
    assert torch.allclose(drawn["user"].mean(0), mean, atol=0.1 * float(deviation.max()))
    assert torch.allclose(drawn["user"].std(0) / deviation, torch.ones(3), atol=0.1)
    assert set(network.eval()(request)) == {"click"}


def test_a_user_s_other_fields_play_no_part() -> None:
    network, (user, history, ad) = built(), small.parts()
    with torch.no_grad():
        logits = small.click(network, user, history, ad)
        assert torch.equal(small.click(network, Part(user.ids.flip(0), user.numbers + 1), history, ad), logits)


def test_more_ads_than_a_step_can_sum_over_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_cf, "MOST_ADS", 10)
    message = r"^vae_cf sums over all ads in each step, 14 of them, and 10 are the most; train two_tower, which draws some$"
    with pytest.raises(ValueError, match=message):
        small.network("vae_cf")
