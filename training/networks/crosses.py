"""Cross layers: products of the whole input with itself, one degree more a layer. They take tensors `(..., D)` and give that shape."""

import torch
from torch import Tensor, nn


class VectorCross(nn.Module):
    """Eq. 3 of DCN: x_{l+1} = x_0 (x_lᵀ w_l) + b_l + x_l."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.init.xavier_normal_(torch.empty(1, width)).flatten() for _ in range(layers))
        self.biases = nn.ParameterList(torch.zeros(width) for _ in range(layers))

    def forward(self, start: Tensor) -> Tensor:
        """x_L of x_0, each `(..., D)`."""
        x = start
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = start * (x * weight).sum(-1, keepdim=True) + bias + x
        return x


class MatrixCross(nn.Module):
    """Eq. 1 of DCN-V2: x_{l+1} = x_0 ⊙ (W_l x_l + b_l) + x_l; with a `rank`, W_l = U_l V_lᵀ as in its eq. 2."""

    def __init__(self, width: int, layers: int, rank: int = 0) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(layers) if rank)
        self.up = nn.ModuleList(nn.Linear(rank or width, width) for _ in range(layers))
        for linear in (*self.down, *self.up):
            nn.init.xavier_normal_(linear.weight)

    def forward(self, start: Tensor) -> Tensor:
        """x_L of x_0, each `(..., D)`."""
        x = start
        for i, up in enumerate(self.up):
            x = start * up(self.down[i](x) if self.down else x) + x
        return x


class Experts(nn.Module):
    """One layer of eq. 3 of DCN-V2: x_{l+1} = Σ_i G_i(x_l) E_i(x_l) + x_l, its gates G a softmax over the experts,

    and E_i(x_l) = x_0 ⊙ (U_i g(C_i g(V_iᵀ x_l)) + b), g = tanh. As the gates sum to 1, the weighted sum over experts may be taken
    before U, which makes one product of all U_i.
    """

    def __init__(self, width: int, rank: int, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.down = nn.Linear(width, experts * rank, bias=False)
        self.middle = nn.Parameter(torch.stack([nn.init.xavier_normal_(torch.empty(rank, rank)) for _ in range(experts)]))
        self.up = nn.Linear(experts * rank, width)
        self.gate = nn.Linear(width, experts)
        for linear in (self.down, self.up, self.gate):
            nn.init.xavier_normal_(linear.weight)

    def forward(self, start: Tensor, x: Tensor) -> Tensor:
        """x_{l+1} of x_0 and x_l, each `(..., D)`."""
        gates = self.gate(x).softmax(-1).unsqueeze(-1)  # (..., experts, 1)
        low = torch.tanh(self.down(x))
        low = low.view(*low.shape[:-1], self.experts, 1, -1) @ self.middle.transpose(1, 2)
        mixed: Tensor = self.up((gates * torch.tanh(low.squeeze(-2))).flatten(-2))
        return start * mixed + x


class MixtureCross(nn.Module):
    """Layers of `Experts`."""

    def __init__(self, width: int, layers: int, rank: int, experts: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts(width, rank, experts) for _ in range(layers))

    def forward(self, start: Tensor) -> Tensor:
        """x_L of x_0, each `(..., D)`."""
        x = start
        for layer in self.layers:
            x = layer(start, x)
        return x
