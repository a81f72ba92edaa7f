"""Recurrent layers over a history: a GRU, which runs once a request, and DIEN's AUGRU, which runs once a candidate.

Both know gates in torch's order: reset r, update u, new n. Padding lies at the end, so it comes after every state that counts.
While training they are loops over a batch's T steps. For serving the loop is one operator, a scan, and T may be any length.
"""

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from .layers import Linear


class GRU(nn.GRU):
    """A GRU over a history (DIEN eq. 2 to 5). Torch's update gate keeps the state, where the paper's renews it: 1 - u of the paper."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:  # type: ignore[override]
        """The states `(R, T, H)` after each of `inputs (R, T, I)`."""
        return super().forward(inputs)[0]

    def fused(self, _tile: int | None) -> nn.Module:
        """See `fuse.py`."""
        return ScannedGRU(self)


def last_state(states: Tensor, mask: Tensor) -> Tensor:
    """The state `(R, H)` after the last behaviour, of `states (R, T, H)` where `mask (R, T)` says what is no padding.

    Of an empty history it is zero, as it was before the first.
    """
    last = (mask.sum(1) - 1).clamp(min=0)[:, None, None].expand(-1, 1, states.shape[2])
    return states.gather(1, last)[:, 0] * mask.any(1, keepdim=True)


class AUGRU(nn.Module):
    """A GRU whose update gate is scaled by how much a candidate attends to a behaviour (DIEN eq. 11 and 12).

    What of a step depends on the behaviour alone, W i + b, is computed once a request; the state is the candidate's own.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.input, self.state = nn.Linear(inputs, 3 * width), nn.Linear(width, 3 * width)  # biases of their own, as a GRU has

    def forward(self, inputs: Tensor, attention: Tensor) -> Tensor:
        """Last states `(R, C, H)` over `inputs (R, T, I)`, with `attention (R, C, T)`, which is 0 where there is padding."""
        state = inputs.new_zeros((*attention.shape[:2], self.state.in_features))
        steps = zip(self.input(inputs).unsqueeze(2).unbind(1), attention.unsqueeze(-1).unbind(2), strict=True)
        for given, weight in steps:
            state = self.step(state, given, weight)
        return state

    def step(self, state: Tensor, given: Tensor, weight: Tensor) -> Tensor:
        """The next `state (R, C, H)`, from `given (R, 1, 3 H)`, which is W i + b, and `weight (R, C, 1)`."""
        r, u, n = given.chunk(3, dim=-1)
        from_r, from_u, from_n = self.state(state).chunk(3, dim=-1)
        update = weight * torch.sigmoid(u + from_u)
        new = torch.tanh(n + torch.sigmoid(r + from_r) * from_n)
        return state + update * (new - state)

    def fused(self, _tile: int | None) -> nn.Module:
        """See `fuse.py`."""
        return ScannedAUGRU(self)


class ScannedGRU(nn.Module):
    """A `GRU` as one scan."""

    def __init__(self, gru: GRU) -> None:
        super().__init__()
        self.width = gru.hidden_size
        weights = gru.state_dict()
        self.input = Linear(weights["weight_ih_l0"], weights["bias_ih_l0"])
        self.state = Linear(weights["weight_hh_l0"], weights["bias_hh_l0"])

    def forward(self, inputs: Tensor) -> Tensor:
        """See `GRU`."""

        def step(state: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
            r, u, n = given.chunk(3, dim=-1)
            from_r, from_u, from_n = self.state(state).chunk(3, dim=-1)
            new = torch.tanh(n + torch.sigmoid(r + from_r) * from_n)
            state = new + torch.sigmoid(u + from_u) * (state - new)
            return state, state.clone()

        given = self.input(inputs).transpose(0, 1)
        states: Tensor = scan(step, inputs.new_zeros((len(inputs), self.width)), given)[1]
        return states.transpose(0, 1)


class ScannedAUGRU(nn.Module):
    """An `AUGRU` as one scan."""

    def __init__(self, augru: AUGRU) -> None:
        super().__init__()
        self.augru = augru

    def forward(self, inputs: Tensor, attention: Tensor) -> Tensor:
        """See `AUGRU`."""

        def step(state: Tensor, xs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return self.augru.step(state, *xs), state[:1, :1, :1].clone()  # a scan has to give something of each step

        begin = inputs.new_zeros((*attention.shape[:2], self.augru.state.in_features))
        given = self.augru.input(inputs).transpose(0, 1).unsqueeze(2)
        last: Tensor = scan(step, begin, (given, attention.permute(2, 0, 1).unsqueeze(-1)))[0]
        return last
