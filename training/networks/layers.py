"""The layers that networks are made of, and what they become for serving. They take tensors; none knows of a field, a loss or a file.

Batch normalisation melts into the linear layer before it. So does most of Dice: where z = (x - μ) / s is what the layer then gives,

    x (α + (1 - α) σ(z)) = s (1 - α) · (z + m) (β + σ(z)),   m = μ / s,   β = α / (1 - α),

and the factor in front melts into the layer after it.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NEAREST_ALPHA = 2.0**-22
"""How near α may come to 1, where β is infinite; that far off, the result moves by less than a rounding error."""

VARIANCE_EPS = 1e-5


class SplitLinear(nn.Linear):
    """A linear layer over [request side, candidate], its request half computed once a request, not once a candidate.

    W [u; a] + b = (W_u u + b) + W_a a, exactly.
    """

    def __init__(self, request: int, candidate: int, out: int) -> None:
        super().__init__(request + candidate, out)
        self.request = request

    def forward(self, request: Tensor, candidate: Tensor) -> Tensor:  # type: ignore[override]
        """`(R, C, out)` from `request (R, request)` and `candidate (R, C, candidate)`."""
        once = F.linear(request, self.weight[:, : self.request], self.bias)
        return once.unsqueeze(1) + F.linear(candidate, self.weight[:, self.request :])


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over every axis but the last."""

    def forward(self, x: Tensor) -> Tensor:
        """Of `(..., features)`, that shape."""
        if not self.num_features:  # torch's fails on none, such as those of a user side without fields
            return x
        return super().forward(x.flatten(0, -2)).view(x.shape)


class Dropout(nn.Dropout):
    """Dropout whose units are drawn by 16 bits each on the CPU, where torch draws a double for each: a quarter of the time.

    The share that is hidden is `p` rounded to 1 / 65,536, and what stays is scaled by just that.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        """Of `(...)`, that shape."""
        if not (self.training and input.is_cpu and 0 < self.p < 1):
            return super().forward(input)
        hidden, count = round(self.p * 2**16), input.numel()
        bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count].view(input.shape)
        return input * (bits >= hidden - 2**15).to(input.dtype).mul_(2**16 / (2**16 - hidden))


class VarianceNorm(nn.Module):
    """Variance-only layer norm (Wang et al. 2020, https://arxiv.org/abs/2006.12753): x / σ, σ over a row's features.

    Layer norm without its mean, its gain and its bias, which the paper finds to matter little in CTR models.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Of `(..., features)`, that shape."""
        return x * (x.var(-1, correction=0, keepdim=True) + VARIANCE_EPS).rsqrt()


NORMS: dict[str, Callable[[int], list[nn.Module]]] = {
    "none": lambda _: [],
    "batch": lambda features: [BatchNorm(features)],
    "layer": lambda features: [nn.LayerNorm(features)],
    "variance": lambda _: [VarianceNorm()],
}
"""What normalises so many features, by name."""


def norms_named(name: str) -> Callable[[int], list[nn.Module]]:
    """One of `NORMS`.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in NORMS:
        raise ValueError(f"there is no norm {name!r}; choose one of {', '.join(NORMS)}")
    return NORMS[name]


class Dice(nn.Module):
    """DIN eq. 3: x (p + (1 - p) α), p = sigmoid of x normalised over the batch; α is learned."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = BatchNorm(features, affine=False, eps=1e-8)
        self.alpha = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """Of `(..., features)`, that shape."""
        if self.training:
            self.norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]  # batch norm's own count
            flat: Tensor = _TrainedDice.apply(x.flatten(0, -2).to(self.alpha.dtype), self.alpha, self.norm)  # type: ignore[no-untyped-call]
            return flat.view(x.shape)
        p = torch.sigmoid(self.norm(x))
        return x * (self.alpha + p * (1 - self.alpha))


class _TrainedDice(torch.autograd.Function):
    """Dice over a batch, of `x (N, features)`, with half of the passes over memory that autograd would take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, norm: nn.BatchNorm1d) -> Tensor:
        p, mean, deviation = torch.native_batch_norm(
            x, None, None, norm.running_mean, norm.running_var, True, norm.momentum or 0.0, norm.eps
        )
        gate = torch.addcmul(alpha, p.sigmoid_(), 1 - alpha)
        ctx.save_for_backward(x, alpha, p, gate, mean, deviation)
        ctx.eps = norm.eps
        return x * gate

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, alpha, p, gate, mean, deviation = ctx.saved_tensors
        direct = gradient * x
        through = direct * p
        of_alpha = direct.sum(0) - through.sum(0)
        through.addcmul_(through, p, value=-1)  # with batch norm's factor 1 - α that of its outputs
        of_norm = (x, 1 - alpha, None, None, mean, deviation, True, ctx.eps, (True, False, False))
        of_x: Tensor = torch.ops.aten.native_batch_norm_backward(through, *of_norm)[0]
        return of_x.addcmul_(gradient, gate), of_alpha, None


class Tower(nn.Module):
    """The MLP of a network, from [request side, candidate] to one logit a candidate; its first layer is split.

    `norm` is one of `NORMS`, before each ReLU, or `dice`: Dice instead of both, and a normalised input. Decayed embeddings are
    tiny, and Dice, unlike a norm before ReLU, would let them stay so.
    """

    def __init__(self, request: int, candidate: int, hidden: tuple[int, ...], dropout: float, norm: str = "batch") -> None:
        super().__init__()
        self.norms = nn.ModuleList([BatchNorm(request), BatchNorm(candidate)] if norm == "dice" else [])
        self.first = SplitLinear(request, candidate, hidden[0])
        rest: list[nn.Module] = []
        for i, width in enumerate(hidden):
            rest += [nn.Linear(hidden[i - 1], width)] if i else []
            rest += [Dice(width)] if norm == "dice" else [*norms_named(norm)(width), nn.ReLU()]
            rest += [Dropout(dropout)] if dropout else []
        self.rest = nn.Sequential(*rest, nn.Linear(hidden[-1], 1))
        begin_linear(self.first, *self.rest)

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the logit."""
        last = self.rest[-1]
        assert isinstance(last, nn.Linear)  # noqa: S101  # as it was made
        return last

    @property
    def bias(self) -> Tensor:
        """What every logit has in it `(1,)`."""
        return self.last.bias

    def forward(self, request: Tensor, candidate: Tensor) -> Tensor:
        """Logits `(R, C)` from `request (R, request)` and `candidate (R, C, candidate)`."""
        if self.norms:
            request, candidate = self.norms[0](request), self.norms[1](candidate)
        logits: Tensor = self.rest(self.first(request, candidate))
        return logits.squeeze(-1)

    @property
    def melts(self) -> bool:
        """Whether it can be a `FusedTower`."""
        return melt(self.rest)

    def fused(self, _tile: int | None) -> nn.Module | None:
        """See `fuse.py`."""
        return FusedTower(self) if self.melts else None


class MLP(nn.Module):
    """Linear layers, after each of them a norm (one of `NORMS`), ReLU and dropout: what a network has below its last layer."""

    def __init__(self, width: int, hidden: tuple[int, ...], dropout: float, norm: str = "batch") -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden[0])
        rest: list[nn.Module] = []
        for i, units in enumerate(hidden):
            rest += [nn.Linear(hidden[i - 1], units)] if i else []
            rest += [*norms_named(norm)(units), nn.ReLU(), *([Dropout(dropout)] if dropout else [])]
        self.rest = nn.Sequential(*rest)
        begin_linear(self.first, *self.rest)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., hidden[-1])` of `x (..., width)`."""
        values: Tensor = self.rest(self.first(x))
        return values

    def fused(self, _tile: int | None) -> nn.Module | None:
        """See `fuse.py`."""
        return FusedMLP(self) if melt(self.rest) else None


class SplitMLP(MLP):
    """An `MLP` over [request side, candidate] whose first layer is split."""

    def __init__(self, request: int, candidate: int, hidden: tuple[int, ...], dropout: float) -> None:
        super().__init__(request + candidate, hidden, dropout)
        self.first = SplitLinear(request, candidate, hidden[0])
        begin_linear(self.first)

    def forward(self, request: Tensor, candidate: Tensor) -> Tensor:  # type: ignore[override]
        """`(R, C, hidden[-1])` from `request (R, request)` and `candidate (R, C, candidate)`."""
        values: Tensor = self.rest(self.first(request, candidate))
        return values


def begin_linear(*blocks: nn.Module) -> None:
    """Fresh weights for the linear layers among some blocks."""
    for layer in blocks:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)


def melt(blocks: Iterable[nn.Module]) -> bool:
    """Whether all norms among some blocks melt into linear layers: those over a batch do, those over a row's features do not."""
    return not any(isinstance(block, nn.LayerNorm | VarianceNorm) for block in blocks)


class Layer(NamedTuple):
    """A linear layer and what is left of the activation after it: nothing (`mean` is None) or Dice's m and β."""

    weight: Tensor
    bias: Tensor
    mean: Tensor | None
    beta: Tensor | None


def merged(first: nn.Linear, rest: Iterable[nn.Module]) -> list[Layer]:
    """The layers of an MLP, in float64; after all but the last comes Dice, or ReLU where there is no `mean`."""
    layers = []
    weight, bias, mean, beta = first.weight.double(), first.bias.double(), None, None
    scale = torch.ones(len(bias), dtype=torch.float64)
    for module in rest:
        if isinstance(module, BatchNorm | Dice):
            norm = module.norm if isinstance(module, Dice) else module
            gain, shift = affine(norm)
            weight, bias, scale = weight * gain[:, None], bias * gain + shift, torch.ones_like(gain)
            if isinstance(module, Dice):
                left = 1 - module.alpha.double()
                left = torch.where(left.abs() < NEAREST_ALPHA, NEAREST_ALPHA, left)
                mean, beta, scale = -shift, (1 - left) / left, left / gain
        elif isinstance(module, nn.Linear):
            layers.append(Layer(weight, bias, mean, beta))
            weight, bias, mean, beta = module.weight.double() * scale, module.bias.double(), None, None
    return [*layers, Layer(weight, bias, None, None)]


def trimmed(layers: list[Layer]) -> list[Layer]:
    """The same layers without the units that nothing listens to; of each at least one is left."""
    for i in range(len(layers) - 1, 0, -1):
        heard = layers[i].weight.abs().sum(0) > 0
        heard[0] |= not heard.any()
        if not heard.all():
            layers[i] = layers[i]._replace(weight=layers[i].weight[:, heard])
            layers[i - 1] = Layer(*(None if values is None else values[heard] for values in layers[i - 1]))  # type: ignore[arg-type]
    return layers


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Batch normalisation in evaluation as `gain` and `shift` of x, in float64."""
    assert isinstance(norm, BatchNorm)  # noqa: S101
    assert norm.running_mean is not None  # noqa: S101  # ours all keep their statistics
    assert norm.running_var is not None  # noqa: S101
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * gain
    if norm.affine:
        gain, shift = gain * norm.weight.double(), shift * norm.weight.double() + norm.bias.double()
    return gain, shift


class Linear(nn.Module):
    """A linear layer of given weights, of which there may be none."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Buffer(weight.float()), None if bias is None else nn.Buffer(bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """`(..., out)` of `x (..., in)`."""
        return F.linear(x, self.weight, self.bias)


class Activation(nn.Module):
    """ReLU, or what is left of Dice."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.mean, self.beta = (None if value is None else nn.Buffer(value.float()) for value in (layer.mean, layer.beta))

    def forward(self, z: Tensor) -> Tensor:
        """Of the layer's outputs, `(..., width)`."""
        if self.mean is None or self.beta is None:
            return F.relu(z)
        return (z + self.mean) * (torch.sigmoid(z) + self.beta)

    def spread(self, *shape: int) -> Callable[[Tensor], Tensor]:
        """The same for outputs of just `(*shape, width)`."""
        if self.mean is None or self.beta is None:
            return F.relu
        mean, beta = self.mean.expand(*shape, -1), self.beta.expand(*shape, -1)
        return lambda z: (z + mean) * (torch.sigmoid(z) + beta)


class FusedTower(nn.Module):
    """A `Tower` of linear layers and activations alone, its first layer still split.

    With `blind` above 0, every vector of that many values has one more, which the tower does not look at.
    """

    def __init__(self, tower: Tower, blind: int = 0) -> None:
        super().__init__()
        first, *rest = trimmed(merged(tower.first, tower.rest))
        weight, bias = first.weight, first.bias
        if tower.norms:
            gain, shift = (torch.cat(values) for values in zip(*(affine(norm) for norm in tower.norms), strict=True))
            weight, bias = weight * gain, bias + weight @ shift
        request, candidate = weight[:, : tower.first.request], weight[:, tower.first.request :]
        if blind:
            request, candidate = (F.pad(half.reshape(len(half), -1, blind), (0, 1)).flatten(1) for half in (request, candidate))
        self.request = Linear(request, bias)
        self.candidate = Linear(candidate, None)
        self.activations = nn.ModuleList(map(Activation, (first, *rest[:-1])))
        self.rest = nn.ModuleList(Linear(layer.weight, layer.bias) for layer in rest)

    def forward(self, request: Tensor, candidate: Tensor) -> Tensor:
        """Logits `(R, C)` from `request (R, request)` and `candidate (R, C, candidate)`."""
        x = (self.request(request).unsqueeze(1) + self.candidate(candidate)).flatten(0, 1)  # 2-D: bias and ReLU join the product
        for activation, linear in zip(self.activations, self.rest, strict=True):
            x = linear(activation(x))
        logits: Tensor = x.view(candidate.shape[:2])
        return logits


class FusedMLP(nn.Module):
    """An `MLP`, split or not, of linear layers and ReLU alone."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        first, *rest = merged(mlp.first, mlp.rest)
        self.first = mlp.first
        self.first.weight, self.first.bias = (nn.Parameter(values.float()) for values in (first.weight, first.bias))
        self.rest = nn.ModuleList(Linear(layer.weight, layer.bias) for layer in rest)

    def forward(self, *inputs: Tensor) -> Tensor:
        """See `MLP` and `SplitMLP`."""
        once: Tensor = self.first(*inputs)
        x = F.relu(once.flatten(0, -2))  # 2-D: bias and ReLU join the product
        for linear in self.rest:
            x = F.relu(linear(x))
        return x.view(*once.shape[:-1], x.shape[-1])
