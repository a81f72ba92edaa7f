import math

import pytest
import small
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.test_deepfm import vectors
from tests.test_networks import HISTORY_AND_ADS, WITHOUT_HISTORY, rows_of_training
from training.networks.contract import Labels, Part
from training.networks.sampled_softmax import Frequencies, sampled_softmax
from training.networks.two_tower import FieldTower, TwoTower

COUNTS = torch.tensor([6, 3, 2, 1])
"""How often each of four ads is in a batch of twelve."""


def built(text: str = small.SCHEMA, **settings: object) -> TwoTower:
    return small.network("two_tower", text, **settings)


def test_the_softmax_is_that_of_scores_less_the_logarithm_of_how_often_an_ad_is_drawn() -> None:
    scores, expected = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 3.0]]), torch.tensor([2.0, 0.5, 0.25])
    total, weight = 0.0, torch.tensor([1.0, 3.0])
    for i in range(2):
        powers = [math.exp(float(scores[i, j])) / float(expected[j]) for j in range(3)]
        total -= float(weight[i]) * math.log(powers[i] / sum(powers))
    assert float(sampled_softmax(scores, expected, weight)) == pytest.approx(total / 4, rel=1e-5)
    assert float(sampled_softmax(scores, expected, torch.zeros(2))) == 0.0


@pytest.mark.parametrize("negatives", [0, 1, 5])
def test_with_no_tastes_the_right_scores_are_the_logarithms_of_how_often_ads_are_clicked(negatives: int) -> None:
    """So popular ads score higher. Uncorrected all would score alike, and with the wrong sign they would score lower."""
    ads, drawn = torch.arange(4).repeat_interleave(COUNTS), torch.arange(4).repeat(negatives)
    columns = torch.cat([ads, drawn])
    expected = (COUNTS + negatives).float()[columns]

    def slope(expected: Tensor) -> Tensor:
        scores = torch.log(COUNTS / 12.0).requires_grad_()
        sampled_softmax(scores[columns].expand(12, -1), expected, torch.ones(12)).backward()
        return scores.grad.abs().max()

    assert slope(expected) < 1e-6
    assert slope(1 / expected) > 0.05
    assert slope(torch.ones(len(columns))) > 0.05


def test_frequencies_follow_a_stream_whatever_its_batches() -> None:
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)
    stream = torch.multinomial(shares, 40_000, replacement=True, generator=generator)
    for batch in (1000, 50, 1):
        frequencies = Frequencies(5)
        frequencies.begin(4)
        for ids in stream[: 4000 if batch == 1 else None].split(batch):
            frequencies.update(ids)
        assert torch.allclose(frequencies.of(torch.arange(4)) / shares, torch.ones(4), atol=0.5)
    assert frequencies.of(torch.tensor([4])).item() == 0.25  # never seen: one of four
    frequencies.begin(2)
    assert frequencies.of(torch.arange(5)).tolist() == [0.5] * 5


def test_an_ad_that_is_in_every_batch_twice_is_half_of_batches_of_four() -> None:
    frequencies = Frequencies(3)
    for _ in range(200):
        frequencies.update(torch.tensor([1, 1, 2, 0]))
    assert frequencies.of(torch.tensor([1, 2])).tolist() == pytest.approx([0.5, 0.25], abs=1e-3)


@pytest.mark.parametrize("tower", ["mlp", "dcn_v2", "transformer"])
@pytest.mark.parametrize("text", [small.SCHEMA, WITHOUT_HISTORY, HISTORY_AND_ADS])
def test_a_logit_is_the_cosine_of_two_towers_over_the_temperature(text: str, tower: str) -> None:
    network, parts = built(text, tower=tower, temperature=0.5), small.parts(text)
    with torch.no_grad():
        logits = small.click(network, *parts)
        for row in range(3):
            for candidate in range(5):
                found = vectors(network.embed, parts, row, candidate)
                split = len(found) - network.fields.count("ad")
                user, ad = literal_tower(network.of_user, found[:split]), literal_tower(network.of_ad, found[split:])
                cosine = float(user @ ad / (user.norm() * ad.norm()))
                assert float(logits[row, candidate]) == pytest.approx(cosine / 0.5 + float(network.bias), abs=1e-4, rel=1e-4)


def literal_tower(tower: FieldTower, fields: list[Tensor]) -> Tensor:
    """What a tower gives before it is cut to length 1, for the vectors of one row."""
    stacked = torch.stack(fields)
    if tower.columns is not None:
        stacked = tower.attention(stacked[None, None] + tower.columns)[0, 0]
    x = start = stacked.flatten()
    for up in tower.cross.up:
        x = start * (up.weight @ x + up.bias) + x
    z = tower.deep.first.weight @ x + tower.deep.first.bias
    norm = tower.deep.rest[0]
    assert isinstance(norm, torch.nn.LayerNorm)
    z = (z - z.mean()) / torch.sqrt(z.var(correction=0) + norm.eps) * norm.weight + norm.bias
    return tower.last.weight @ z.clamp(min=0) + tower.last.bias


def test_the_loss_adds_the_softmax_over_ads_of_the_rows_that_were_clicked() -> None:
    network, (request, labels) = built(softmax=0.5, negatives=7).train(), rows_of_training(small.SCHEMA, 6)
    network.begin(Part(request.ad.ids[:, 0], request.ad.numbers[:, 0]))
    weight = torch.tensor([1.0, 2.0, 1.0, 0.5, 1.0, 3.0])
    labels = Labels({"click": torch.tensor([1.0, 0, 1, math.nan, 0, 1])}, weight)
    outputs = network(request)
    torch.manual_seed(3)
    loss = network.loss(outputs, request, labels)
    torch.manual_seed(3)
    chosen = torch.randint(6, (7,))
    ids = torch.cat([request.ad.ids[:, 0, 0], request.ad.ids[chosen, 0, 0]])
    ads = torch.cat([outputs["ad"][:, 0], outputs["ad"][chosen, 0]])
    expected = 6 * network.frequencies.of(ids) + 7 / 6
    total = torch.tensor(0.0)
    for i, share in ((0, 1.0), (2, 1.0), (5, 3.0)):
        corrected = outputs["user"][i] @ ads.T / network.temperature - expected.log()
        total -= share * corrected.log_softmax(0)[i] / 5
    known = torch.tensor([0, 1, 2, 4, 5])
    click = F.binary_cross_entropy_with_logits(outputs["click"][known, 0], labels.heads["click"][known], weight[known], reduction="sum") / 8
    assert loss.item() == pytest.approx((click + 0.5 * total).item(), rel=1e-4)


def test_the_vectors_order_ads_as_the_logits_do_whatever_else_is_in_the_request() -> None:
    network, (user, history, ad) = built(), small.parts()
    request, ads = rows_of_training(small.SCHEMA, 3)[0], Part(ad.ids[0], ad.numbers[0])
    with torch.no_grad():
        found = network.request_vectors(request._replace(user=user, history=history)) @ network.ad_vectors(ads).T
        logits = small.click(network, user, history, Part(ad.ids[:1].expand(3, -1, -1), ad.numbers[:1].expand(3, -1, -1)))
    assert torch.allclose(found / network.temperature + network.bias, logits, atol=1e-4)
    assert torch.allclose(network.ad_vectors(ads).norm(dim=-1), torch.ones(5), atol=1e-5)
