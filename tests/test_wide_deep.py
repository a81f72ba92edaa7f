"""Wide & Deep: crosses pair by pair, FTRL weight by weight, and who trains what."""

import math
from itertools import product

import pytest
import small
import torch
from torch import nn

from training.networks.contract import Fields, Part, RequestTensors
from training.networks.crossed import Crosses, parse_crosses
from training.networks.ftrl import FTRL
from training.networks.interactions import first_order

CROSSES = "user_id*ad_id, history.ad_id*ad_id, interests*ad.tags, age*slot"


def fields() -> Fields:
    return Fields.of(small.schema(), small.vocabularies())


def test_a_cross_is_the_mean_weight_of_the_pairs_that_both_fields_have() -> None:
    block, parts = Crosses(parse_crosses(CROSSES, fields()), 1000), dict(zip(("user", "history", "ad"), small.parts(), strict=True))
    with torch.no_grad():
        block.table.weight.normal_()
        block.table.weight[0] = 0
        weights = block(RequestTensors(**parts))
        for row, candidate in product(range(3), range(5)):
            user, past, ad = parts["user"].ids[row].tolist(), parts["history"].ids[row].tolist(), parts["ad"].ids[row, candidate].tolist()
            # Columns: user_id, age, three interests, slot; ad_id, genre, two tags, and so in the history.
            pairs = [
                [(user[0], ad[0])],
                [(behaviour[0], ad[0]) for behaviour in past],
                [(interest, tag) for interest in user[2:5] for tag in ad[2:4]],
                [(user[1], user[5])],
            ]
            total = 0.0
            for number, of_cross in enumerate(pairs):
                rows = [int(block.rows(number, torch.tensor(a), torch.tensor(b))) for a, b in of_cross if a > 1 and b > 1]
                assert all(1 <= each <= 1000 for each in rows)
                total += sum(float(block.table.weight[each]) for each in rows) / max(len(rows), 1)
            assert float(weights[row, candidate]) == pytest.approx(total, abs=1e-5)


def test_pairs_of_values_fall_evenly_into_the_table_and_crosses_apart() -> None:
    block = Crosses(parse_crosses("user_id*ad_id", fields()), 1000)
    ids = torch.arange(2, 302)
    rows = block.rows(0, ids.unsqueeze(1), ids)  # 90,000 pairs into 1,000 rows: 90 each, give or take a few deviations of 9.5
    counts = torch.bincount(rows.flatten(), minlength=1001)[1:]
    assert counts.min() > 45
    assert counts.max() < 135
    assert (rows != rows.T).float().mean() > 0.9  # (a, b) is not (b, a)
    assert (rows != block.rows(1, ids.unsqueeze(1), ids)).float().mean() > 0.99
    large = block.rows(0, torch.tensor(2**31 - 2), torch.tensor(2**31 - 5))  # as many buckets as a schema may have
    assert 1 <= int(large) <= 1000
    python = ((2**31 - 2) * 1_000_003 % (2**31 - 1) + 2**31 - 5) % (2**31 - 1) * 69_069 % (2**31 - 1)
    assert int(large) == (python + 1) * 1_566_083_941 % (2**31 - 1) % 1000 + 1  # nothing overflowed


def test_logits_are_first_order_crosses_and_tower() -> None:
    network, parts = small.network("wide_deep", crosses=CROSSES), small.parts()
    request = RequestTensors(*parts)
    with torch.no_grad():
        u, a = network.second.of_request(request).flatten(1), network.second("ad", request.ad).flatten(2)
        expected = first_order(network.first, request) + network.crosses(request) + network.tower(u, a)
        assert torch.allclose(small.click(network, *parts), expected, atol=1e-5)
        network.crosses.table.weight[1:].normal_(std=3.0)
        assert (small.click(network, *parts) - expected).abs().amax() > 0.1


def test_history_given_by_distinct_ads_has_the_same_crosses() -> None:
    network, (user, history, ad) = small.network("wide_deep", crosses="history.genre*genre"), small.parts()
    rows = torch.arange(history.ids.shape[0] * history.ids.shape[1]).view(history.ids.shape[:2])
    distinct = Part(history.ids.flatten(0, 1), history.numbers.flatten(0, 1), rows)
    with torch.no_grad():
        assert torch.allclose(small.click(network, user, distinct, ad), small.click(network, user, history, ad), atol=1e-5)


def test_a_name_of_two_sides_has_to_say_which() -> None:
    text = small.SCHEMA.replace("[user.age]", "[user.genre]")
    with pytest.raises(ValueError, match=r"^crosses: genre in 'genre\*slot' may be user\.genre or ad\.genre; write it so$"):
        parse_crosses("genre*slot", Fields.of(small.schema(text), small.vocabularies()))


def test_the_wide_part_is_trained_by_ftrl_and_the_deep_part_by_adagrad() -> None:
    network = small.network("wide_deep", crosses=CROSSES)
    trained = {type(each).__name__: {id(p) for group in each.param_groups for p in group["params"]} for each in network.optimisers(0.01)}
    wide = {id(p) for name, p in network.named_parameters() if name.startswith(("first.", "crosses."))}
    assert trained == {"FTRL": wide, "Adagrad": {id(p) for p in network.parameters()} - wide}


def test_ftrl_takes_the_steps_of_its_paper() -> None:
    """Algorithm 1 with α = 0.5, β = 1, λ1 = 0.3, λ2 = 0.1, in plain numbers."""
    weight = nn.Parameter(torch.zeros(2))
    optimiser = FTRL([weight], lr=0.5, beta=1.0, l1=0.3, l2=0.1)
    z, n, w = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for gradients in ([1.0, 0.2], [-0.4, 0.05], [0.7, -0.1]):
        weight.grad = torch.tensor(gradients)
        optimiser.step()
        for i, g in enumerate(gradients):
            sigma = (math.sqrt(n[i] + g * g) - math.sqrt(n[i])) / 0.5
            z[i] += g - sigma * w[i]
            n[i] += g * g
            w[i] = 0.0 if abs(z[i]) <= 0.3 else -(z[i] - math.copysign(0.3, z[i])) / ((1.0 + math.sqrt(n[i])) / 0.5 + 0.1)
        assert weight.tolist() == pytest.approx(w, abs=1e-6)
    assert weight[1] == 0  # its gradients never passed λ1


def test_ftrl_goes_on_from_weights_that_are_there() -> None:
    weight = nn.Parameter(torch.tensor([0.7, -0.2, 0.0]))
    weight.grad = torch.zeros(3)
    FTRL([weight], lr=0.5, l1=0.3, l2=0.1).step()
    assert weight.tolist() == pytest.approx([0.7, -0.2, 0.0])
