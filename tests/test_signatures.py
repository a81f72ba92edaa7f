import pytest
import small
import torch

from training.networks.contract import RequestTensors
from training.networks.din import DIN
from training.networks.signatures import GRID, Signatures, newest


def test_a_candidate_s_interest_is_the_mean_of_its_buckets_each_of_length_one() -> None:
    torch.manual_seed(0)
    block, q, k = Signatures(4, groups=3, bits=2), torch.randn(2, 5, 4), torch.randn(2, 9, 4)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    expected = torch.zeros(2, 5, 4)
    for r in range(2):
        for c in range(5):
            for group in range(3):
                planes = block.planes[:, 2 * group : 2 * group + 2]
                mine, theirs = (q[r, c] @ planes > 0), (k[r] @ planes > 0)
                bucket = sum((k[r, t] for t in range(9) if mask[r, t] and torch.equal(mine, theirs[t])), torch.zeros(4))
                expected[r, c] += bucket / max(float(bucket.norm()), 1e-12) / 3
    assert expected.abs().sum(-1).gt(0).any(1).all()
    assert torch.allclose(block(q, k, mask), expected, atol=1e-5)


def test_signs_do_not_depend_on_how_sums_are_rounded() -> None:
    block = Signatures(8)
    x = torch.randn(1, 4000, 8, generator=torch.Generator().manual_seed(1))
    x[0, :2000, 7] = -(x[0, :2000, :7] * block.planes[:7, 0]).sum(-1) * block.planes[7, 0]  # on the first plane but for rounding
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    shuffled = Signatures(8)
    shuffled.planes.copy_(block.planes[order])
    assert torch.equal(shuffled.buckets(x[..., order]), block.buckets(x))
    assert torch.equal(block.buckets(x), torch.cat([block.buckets(x[:, i : i + 1]) for i in range(4000)], 1))
    assert float((torch.round(x * GRID) @ block.planes).abs().max()) < 2**24


def test_vectors_that_point_the_same_way_meet_more_often() -> None:
    """With random planes two vectors share a sign with probability 1 - angle / π (eq. 3); 3 bits meet with its cube."""
    block = Signatures(64, groups=300)
    a = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
    b = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1))
    b = b - (a * b).sum() / (a * a).sum() * a
    for angle in (0.3, 1.0, 2.0):
        turned = torch.cos(torch.tensor(angle)) * a / a.norm() + torch.sin(torch.tensor(angle)) * b / b.norm()
        met = float((block.buckets(a) * block.buckets(turned)).sum()) / 300
        assert met == pytest.approx((1 - angle / torch.pi) ** 3, abs=0.06)


def test_the_newest_are_weighed_where_they_lie() -> None:
    mask = torch.arange(6) < torch.tensor([[6], [4], [1], [0]])
    assert newest(mask, 4).tolist() == [[2, 3, 4, 5], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    network = small.network("din", long="sdim", newest=2)
    assert isinstance(network, DIN)
    user, history, ad = small.parts()
    request = RequestTensors(user, history, ad)
    with torch.no_grad():
        weights = network.explained(request).attention
        assert weights is not None
        compared = network.compared(network.embed("ad", ad), request)
        everything = network.attention.explained(*compared)
    for r, count in enumerate(history.behaviours().sum(1).tolist()):
        first = max(count - 2, 0)
        assert torch.allclose(weights[r, :, first:count], everything[r, :, first:count], atol=1e-6)
        assert not weights[r, :, :first].any()
        assert not weights[r, :, count:].any()
