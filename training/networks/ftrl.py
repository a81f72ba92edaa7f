"""FTRL-Proximal: weights that carry no signal are exactly 0 (McMahan et al. 2013, https://doi.org/10.1145/2487575.2488200)."""

from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor


class FTRL(torch.optim.Optimizer):
    """Algorithm 1 of the paper, for every weight: α is `lr`, β, λ1 and λ2 are as there.

    A weight that begins elsewhere than at 0 begins with the z that gives it.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, beta: float = 1.0, l1: float = 0.0, l2: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "l1": l1, "l2": l2})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step, from the gradients as they are."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step(weight, weight.grad, group)
        return loss

    def _step(self, weight: Tensor, gradient: Tensor, group: dict[str, float]) -> None:
        state, alpha, beta, l1, l2 = self.state[weight], group["lr"], group["beta"], group["l1"], group["l2"]
        if not state:
            state["n"] = torch.zeros_like(weight)
            state["z"] = -weight * (beta / alpha + l2) - weight.sign() * l1
        # What has no gradient stays as it is, so a sparse one, which has each row once, is the same step.
        rows = gradient._indices()[0] if gradient.is_sparse else slice(None)
        gradient = gradient._values() if gradient.is_sparse else gradient
        n, z = state["n"][rows], state["z"][rows]
        after = n + gradient.square()
        z = z + (gradient - (after.sqrt() - n.sqrt()) / alpha * weight[rows])
        state["n"][rows], state["z"][rows] = after, z
        weight[rows] = torch.where(z.abs() <= l1, 0.0, (z.sign() * l1 - z) / ((beta + after.sqrt()) / alpha + l2))
