"""Trained networks rearranged for serving: fewer products and fewer passes over memory, equal in exact arithmetic.

Batch normalisation melts into the linear layer before it. So does most of Dice: where z = (x - μ) / s is what the layer then gives,

    x (α + (1 - α) σ(z)) = s (1 - α) · (z + m) (β + σ(z)),   m = μ / s,   β = α / (1 - α),

and the factor in front melts into the layer after it.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

from .blocks import BatchNorm, Dice, Embeddings, Part, Tower, offsets_of
from .deepfm import DeepFM
from .din import LocalActivation

TILE = 512
"""Pairs of candidate and behaviour that are weighed at once on a CPU: few enough for its second cache, many enough for a loop."""
NEAREST_ALPHA = 2.0**-22
"""How near α may come to 1, where β is infinite; that far off, the result moves by less than a rounding error."""


class Layer(NamedTuple):
    """A linear layer and what is left of the activation after it: nothing (`mean` is None) or Dice's m and β."""

    weight: Tensor
    bias: Tensor
    mean: Tensor | None
    beta: Tensor | None


def fold(first: nn.Linear, rest: Iterable[nn.Module]) -> list[Layer]:
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


class FoldedEmbeddings(Embeddings):
    """`Embeddings` whose table has a row of zeros for each vocabulary, so that an id needs an addition to be a row and no choice."""

    def __init__(self, embed: Embeddings) -> None:
        nn.Module.__init__(self)
        self.layouts, self.sizes, self.scales = embed.layouts, embed.sizes, embed.scales
        starts, pieces, row, old = {}, [], 0, 1
        for vocabulary, size in embed.sizes.items():
            starts[vocabulary] = row
            pieces += [torch.zeros(1, embed.table.embedding_dim), embed.table.weight[old : old + size - 1].detach()]
            row, old = row + size, old + size - 1
        self.table = _table(torch.cat(pieces) if pieces else embed.table.weight)
        for name, layout in self.layouts.items():
            self.register_buffer(f"{name}_offsets", offsets_of(layout, starts))

    def table_rows(self, name: str, ids: Tensor) -> Tensor:
        """See `Embeddings`."""
        return ids + self.get_buffer(f"{name}_offsets")


def _table(rows: Tensor) -> nn.Embedding:
    table: nn.Embedding = nn.Embedding.from_pretrained(rows)  # type: ignore[no-untyped-call]
    return table


class FoldedTower(nn.Module):
    """A `Tower` of linear layers and activations alone, its first layer still split.

    With `blind` above 0, every vector of that many values has one more, which the tower does not look at.
    """

    def __init__(self, tower: Tower, blind: int = 0) -> None:
        super().__init__()
        first, *rest = fold(tower.first, tower.rest)
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


class FoldedDeepFM(nn.Module):
    """A `DeepFM` whose fields are all single categories. Of eq. 2 only the square of the sum is left:

    what a field subtracts, half its vector's square, joins its first-order weight, which is the last value of its vector here.
    """

    def __init__(self, network: DeepFM) -> None:
        super().__init__()
        self.embed = FoldedEmbeddings(network.second)
        vectors, weights = self.embed.table.weight, FoldedEmbeddings(network.first).table.weight
        last = weights - 0.5 * vectors.double().square().sum(1, keepdim=True).float()
        self.embed.table = _table(torch.cat([vectors, last], 1))
        self.tower = FoldedTower(network.tower, blind=vectors.shape[1])
        self.bias = network.bias

    @staticmethod
    def fits(network: DeepFM) -> bool:
        """Whether it can stand for the network."""
        layouts = network.second.layouts
        single = all(slot.field.length == 1 for layout in layouts.values() for slot in layout.ids)
        return single and set(layouts) == {"user", "ad"} and not any(layout.numbers for layout in layouts.values())

    def forward(self, user: Part, _history: Part, ad: Part) -> Tensor:
        """See `DeepFM`."""
        u, a = self.embed("user", user), self.embed("ad", ad)
        total = u.sum(1).unsqueeze(1) + a.sum(2)
        logits: Tensor = 0.5 * total[..., :-1].square().sum(-1) + total[..., -1] + self.bias + self.tower(u.flatten(1), a.flatten(2))
        return logits


class FoldedActivation(nn.Module):
    """A `LocalActivation` whose first layer is one matrix a behaviour, made once a request and shared by its candidates.

    W [q; k; q - k; q * k] + b = ((Wq + Wd) + Wp diag(k)) q + ((Wk - Wd) k + b): one product, with a 1 at the end of q. Where a
    `tile` is given, so many pairs are weighed at a time that what lies between two products stays in the processor's cache.
    """

    def __init__(self, unit: LocalActivation, tile: int | None) -> None:
        super().__init__()
        self.tile, self.softmax = tile, unit.softmax
        *hidden, last = fold(unit.first, unit.rest)
        layers = [*map(_with_one, hidden[:-1]), hidden[-1]]
        self.matrices = Linear(*_matrix_layer(layers[0]))
        self._activations = [Activation(layer) for layer in layers]
        self.activations = nn.ModuleList(self._activations)
        self.rest = nn.ModuleList(Linear(torch.cat([layer.weight, layer.bias[:, None]], 1), None) for layer in layers[1:])
        self.last = Linear(last.weight, None)
        self.bias = nn.Buffer(last.bias.float())

    def forward(self, candidates: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        """See `LocalActivation`."""
        history = history * mask.unsqueeze(-1)
        q = F.pad(candidates, (0, 1), value=1.0).unsqueeze(1)
        weights = self._weigh(q, history) if self.tile is None else self._weigh_in_tiles(q, history, self.tile)
        weights = weights.transpose(1, 2)
        if self.softmax:
            return torch.matmul(weights.masked_fill(~mask.unsqueeze(1), -1e9).softmax(-1), history)
        return torch.matmul(weights, history) + self.bias * history.sum(1, keepdim=True)

    def _weigh(self, q: Tensor, history: Tensor) -> Tensor:
        """Weights `(R, T, C)`, the last layer's bias left out, of `history (R, T, D)` for `q (R, 1, C, D + 1)`."""
        return self._mlp(torch.matmul(q, self._matrices(q, history)), self._activations).squeeze(-1)

    def _weigh_in_tiles(self, q: Tensor, history: Tensor, tile: int) -> Tensor:
        """The same, `tile` pairs at a time: some behaviours with all candidates."""
        requests, _, candidates, _ = q.shape
        behaviours = history.shape[1]
        most = torch.sym_max(1, tile // (requests * candidates))  # type: ignore[no-untyped-call]
        count = (behaviours + most - 1) // most  # not -(-a // b): ONNX rounds a division towards zero
        width = (behaviours + count - 1) // count
        blocks = F.pad(history, (0, 0, 0, count * width - behaviours)).reshape(requests, count, width, -1).transpose(0, 1)
        # ONNX Runtime adds a vector to each row much more slowly than a whole tensor, so they are spread out, once for all tiles.
        activations = [activation.spread(requests, width, candidates) for activation in self._activations]

        def weigh(nothing: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
            return nothing.clone(), self._mlp(torch.matmul(q, matrices), activations)

        _, weights = scan(weigh, q.new_zeros(()), self._matrices(q, blocks))
        together: Tensor = weights.squeeze(-1).transpose(0, 1).flatten(1, 2)[:, :behaviours]
        return together

    def _matrices(self, q: Tensor, history: Tensor) -> Tensor:
        """A matrix `(D + 1, H)` for each behaviour `(D,)`."""
        rows: Tensor = self.matrices(history.reshape(-1, history.shape[-1]))  # 2-D: the bias joins the product
        return rows.view(*history.shape[:-1], q.shape[-1], -1)

    def _mlp(self, x: Tensor, activations: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """From what the first layer gives `(..., H)` to weights `(..., 1)`."""
        x = activations[0](x)
        for linear, activation in zip(self.rest, activations[1:], strict=True):
            x = activation(linear(x))
        weights: Tensor = self.last(x)
        return weights


def _matrix_layer(layer: Layer) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear layer that makes of a behaviour `(D,)` its matrix `(D + 1, H)`, written as one row."""
    wq, wk, wd, wp = layer.weight.chunk(4, dim=1)
    width, units = wq.shape[1], len(wq)
    weight = torch.zeros(width + 1, units, width, dtype=wq.dtype)
    weight[range(width), :, range(width)] = wp.T
    weight[width] = wk - wd
    return weight.flatten(0, 1), torch.cat([(wq + wd).T, layer.bias[None]]).flatten()


def _with_one(layer: Layer) -> Layer:
    """The layer with one more unit, which always gives 1 and so carries the next layer's bias."""
    assert layer.mean is not None  # noqa: S101  # the activation unit has Dice throughout
    assert layer.beta is not None  # noqa: S101
    mean, beta = F.pad(layer.mean, (0, 1), value=1.0), F.pad(layer.beta, (0, 1), value=0.5)
    return Layer(F.pad(layer.weight, (0, 0, 0, 1)), F.pad(layer.bias, (0, 1)), mean, beta)


def folded(network: nn.Module, tile: int | None = TILE) -> nn.Module:
    """A copy of a network with every block folded that has a folded form; `tile` as `FoldedActivation` takes it."""
    if isinstance(network, DeepFM) and FoldedDeepFM.fits(network):
        return FoldedDeepFM(network).eval()
    network = copy.deepcopy(network).eval()
    for parent in list(network.modules()):
        for name, block in parent.named_children():
            if isinstance(block, Tower):
                setattr(parent, name, FoldedTower(block))
            elif isinstance(block, LocalActivation):
                setattr(parent, name, FoldedActivation(block, tile))
            elif isinstance(block, Embeddings):
                setattr(parent, name, FoldedEmbeddings(block))
    return network
