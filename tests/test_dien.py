import math

import numpy as np
import pytest
import small
import torch
from torch import Tensor
from torch.nn.functional import softplus

from tests.test_networks import CLOSE, HISTORY_AND_ADS
from training.networks.contract import Fields, Labels, Part, RequestTensors
from training.networks.dien import BEHAVIOURS, DIEN, Attention, auxiliary_loss
from training.networks.recurrent import AUGRU, GRU, last_state


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def literal_step(state: np.ndarray, given: np.ndarray, weights: dict[str, np.ndarray], attention: float) -> np.ndarray:
    """Eq. 2 to 4, 11 and 12 for one state `(H,)`, gate by gate, each with its two biases."""
    w, u, b, c = (np.split(weights[name], 3) for name in ("w", "u", "b", "c"))
    reset, renew = (sigmoid(w[g] @ given + b[g] + u[g] @ state + c[g]) for g in (0, 1))
    new = np.tanh(w[2] @ given + b[2] + reset * (u[2] @ state + c[2]))
    return (1 - attention * renew) * state + attention * renew * new


def weights_of(block: AUGRU) -> dict[str, np.ndarray]:
    found = {"w": block.input.weight, "b": block.input.bias, "u": block.state.weight, "c": block.state.bias}
    return {name: value.detach().numpy() for name, value in found.items()}


def literal_augru(block: AUGRU, inputs: Tensor, attention: Tensor) -> np.ndarray:
    weights = weights_of(block)
    requests, candidates, behaviours = attention.shape
    last = np.zeros((requests, candidates, block.state.in_features))
    for r in range(requests):
        for c in range(candidates):
            for t in range(behaviours):
                last[r, c] = literal_step(last[r, c], inputs[r, t].numpy(), weights, float(attention[r, c, t]))
    return last


def augru() -> AUGRU:
    torch.manual_seed(0)
    return small.scrambled(AUGRU(3, 4), deviation=0.8)


@pytest.mark.parametrize("behaviours", [1, 5])
def test_an_augru_and_its_scan_are_the_papers_equations(behaviours: int) -> None:
    block = augru()
    inputs, attention = torch.randn(2, behaviours, 3), torch.rand(2, 3, behaviours)
    attention[0, 1] = 0
    with torch.no_grad():
        expected = literal_augru(block, inputs, attention)
        assert np.allclose(block(inputs, attention), expected, atol=1e-6)
        assert np.allclose(block.fused(None)(inputs, attention), expected, atol=1e-6)
    assert not expected[0, 1].any()  # nothing that it attends to, nothing that changes


def test_the_biases_of_an_augru_are_two() -> None:
    block = augru()
    assert {name for name, _ in block.named_parameters()} == {"input.weight", "input.bias", "state.weight", "state.bias"}
    inputs, attention = torch.randn(2, 5, 3), torch.rand(2, 3, 5)
    with torch.no_grad():
        before = block(inputs, attention)
        block.input.bias[8:] += 1  # of the new state: outside of what is reset
        moved = block(inputs, attention) - before
        block.input.bias[8:] -= 1
        block.state.bias[8:] += 1  # inside of it
        assert (block(inputs, attention) - before - moved).abs().amax() > 0.05


@pytest.mark.parametrize("behaviours", [1, 5])
def test_a_gru_and_its_scan_give_the_papers_state_after_each_behaviour(behaviours: int) -> None:
    torch.manual_seed(1)
    block = small.scrambled(GRU(3, 4), deviation=0.8)
    inputs = torch.randn(2, behaviours, 3)
    names = {"w": "weight_ih_l0", "u": "weight_hh_l0", "b": "bias_ih_l0", "c": "bias_hh_l0"}
    weights = {name: block.state_dict()[key].numpy().copy() for name, key in names.items()}
    for each in weights.values():
        each[4:8] *= -1  # torch's update gate is 1 less the paper's
    with torch.no_grad():
        for states in (block(inputs), block.fused(None)(inputs)):
            for r in range(2):
                state = np.zeros(4)
                for t in range(behaviours):
                    state = literal_step(state, inputs[r, t].numpy(), weights, 1.0)
                    assert np.allclose(states[r, t], state, atol=1e-6)


def test_the_last_state_is_that_of_the_last_behaviour() -> None:
    states = torch.arange(24.0).view(3, 4, 2) + 1
    mask = torch.tensor([[True, True, False, False], [True] * 4, [False] * 4])
    assert last_state(states, mask).tolist() == [[3, 4], [15, 16], [0, 0]]


def test_attention_is_a_softmax_over_the_behaviours() -> None:
    torch.manual_seed(0)
    block = small.scrambled(Attention(4, 3))
    interests, candidates = torch.randn(2, 5, 4), torch.randn(2, 3, 3)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    with torch.no_grad():
        weights = block(interests, candidates, mask)
        for r, length in enumerate((5, 2)):
            for c in range(3):
                e = [math.exp(float(interests[r, t] @ block.weight.weight.T @ candidates[r, c])) for t in range(length)]
                assert weights[r, c].tolist() == pytest.approx([x / sum(e) for x in e] + [0.0] * (5 - length), abs=1e-6)
        assert not block(interests, candidates, torch.zeros_like(mask)).any()


@pytest.mark.parametrize("text", [small.SCHEMA, HISTORY_AND_ADS])
def test_logits_are_the_tower_over_what_evolved_for_each_candidate(text: str) -> None:
    network = small.network("dien", text)
    user, history, ad = small.parts(text)
    seen: list[torch.Size] = []
    network.extract.register_forward_hook(lambda _block, given, _states: seen.append(given[0].shape))
    with torch.no_grad():
        logits = small.click(network, user, history, ad)
        assert seen == [(3, 4, 16)]  # once a request
        past, ads = network.embed("history", history).flatten(2), network.embed("ad", ad).flatten(2)
        interests, mask = network.extract(past), history.ids[..., 0] > 0
        attention = torch.zeros(3, 5, 4)
        for r in range(3):
            length = int(mask[r].sum())
            for c in range(5):
                scores = interests[r, :length] @ network.attention.weight.weight.T @ ads[r, c]
                attention[r, c, :length] = scores.softmax(0)
        evolved = torch.from_numpy(literal_augru(network.evolve, interests, attention)).float()
        request = network.embed("user", user).flatten(1) if "user" in network.embed else torch.zeros(3, 0)
        assert torch.allclose(logits, network.tower(request, torch.cat([evolved, ads], dim=-1)), **CLOSE)


def test_the_auxiliary_loss_is_the_mean_over_what_is_no_padding() -> None:
    interests = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]])
    following, other = torch.tensor([[[2.0, 9.0], [9.0, 0.5], [7.0, 7.0]]]), torch.tensor([[[-1.0, 3.0], [4.0, 1.0], [7.0, 7.0]]])
    known, distinct = torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])
    loss = auxiliary_loss(interests, (following, known), (other, distinct))
    # Inner products: 2 and 1 with what follows, -1 with the one other that is none of it; the third step is padding.
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2 + math.log1p(math.exp(-1))
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    nothing = torch.zeros_like(known)
    assert float(auxiliary_loss(interests, (following, nothing), (other, nothing))) == 0


def losses(network: DIEN, history: Part, catalogue: Part) -> tuple[float, float]:
    """The loss of three rows, of the clicks alone and as it is."""
    user, _, ad = small.parts(candidates=1)
    request, labels = RequestTensors(user, history, ad), Labels({"click": torch.tensor([1.0, 0.0, 1.0])})
    network.begin(catalogue)
    with torch.no_grad():
        outputs = network.train()(request)
        whole = float(network.loss(outputs, request, labels))
        network.auxiliary = 0.0
        clicks = float(network.loss(outputs, request, labels))
        network.auxiliary = 1.0
    return clicks, whole


def one_ad(ad_id: int) -> Part:
    """A catalogue of one ad, so that each draw is certain."""
    _, _, ad = small.parts()
    ids = ad.ids[:1, 0].clone()
    ids[:, 0] = ad_id
    return Part(ids, ad.numbers[:1, 0])


def test_a_negative_is_an_ad_of_the_catalogue_that_is_not_what_follows() -> None:
    network, (_, history, _) = small.network("dien"), small.parts()
    history.ids[..., 0] = torch.tensor([[3, 4, 4, 5], [4, 4, 4, 4], [5, 6, 0, 0]])
    catalogue = one_ad(4)
    clicks, whole = losses(network, history, catalogue)
    with torch.no_grad():
        past = network.embed("history", history).flatten(2)
        states, negative = network.extract(past), network.embed("history", network.fields.behaviours_of(catalogue)).flatten()
        places = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0))
        hits = [softplus(-(states[r, t] @ past[r, t + 1])) for r, t in places]
        misses = [softplus(states[r, t] @ negative) for r, t in ((0, 2), (2, 0))]  # what follows the others is ad 4 itself
        expected = float(torch.stack(hits).mean() + torch.stack(misses).mean())
    assert whole - clicks == pytest.approx(expected, rel=1e-4)


def test_padding_does_not_change_the_loss() -> None:
    network, (_, history, _) = small.network("dien"), small.parts()
    ids, numbers = (torch.nn.functional.pad(values, (0, 0, 0, 6)) for values in (history.ids, history.numbers))
    ids[:, 4:, 1:] = 2
    assert losses(network, Part(ids, numbers), one_ad(2)) == pytest.approx(losses(network, history, one_ad(2)), rel=1e-5)


def test_negatives_are_drawn_from_all_ads() -> None:
    network, (user, history, ad) = small.network("dien").train(), small.parts(requests=64, candidates=1)
    _, _, ads = small.parts(candidates=6)
    network.begin(Part(ads.ids[0], ads.numbers[0]))
    drawn: list[Tensor] = []
    network.embed.register_forward_hook(lambda _block, given, _vectors: drawn.append(given[1].ids))
    outputs = network(RequestTensors(user, history, ad))
    drawn.clear()
    network.loss(outputs, RequestTensors(user, history, ad), Labels({"click": torch.zeros(64)}))
    columns = network.fields.behaviours_of(Part(ads.ids[0], ads.numbers[0])).ids
    assert {tuple(row) for row in drawn[0].tolist()} == {tuple(row) for row in columns.tolist()}


def test_what_the_auxiliary_loss_needs_is_given_while_training_alone() -> None:
    network, parts = small.network("dien"), small.parts()
    assert set(network(RequestTensors(*parts))) == {"click"}
    assert network.train()(RequestTensors(*parts))[BEHAVIOURS].shape == (3, 4, 16)


def test_ads_as_behaviours_are_what_the_encoder_makes_of_them() -> None:
    text = small.SCHEMA.replace('"ad_id", "genre", "tags", "price"', '"ad_id", "price", "tags"')
    encoder = small.encoder(text)
    block = encoder.encode("ad", {"ad_id": ["a1", "a3"], "genre": ["news", "drama"], "tags": [["x"], ["y", "z"]], "price": [1.0, 2.0]}, 2)
    expected = encoder.history_of(block)
    found = Fields.of(small.schema(text), small.vocabularies(text)).behaviours_of(Part(*map(torch.from_numpy, (block.ids, block.numbers))))
    assert np.array_equal(found.ids, expected.ids)
    assert np.array_equal(found.numbers, expected.numbers)
