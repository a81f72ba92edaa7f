"""Any network with more than one head: a network for each, all on the same embeddings (shared-bottom: Caruana 1997)."""

from typing import Any

import torch
from torch import Tensor, nn

from .contract import CLICK, Explained, Fields, Labels, Network, Outputs, Part, RequestTensors
from .embeddings import Embeddings


class SharedEmbeddings(Network):
    """A network for each head, all on the embeddings of the click's."""

    many_heads = True

    def __init__(self, kind: type[Network], fields: Fields, settings: Any) -> None:
        super().__init__(fields, settings)
        self.embedding_l2, self.starts_from, self.retrieves = kind.embedding_l2, kind.starts_from, kind.retrieves
        self.splits = kind.splits
        self.networks = nn.ModuleDict({head: kind(fields, settings) for head in fields.heads})
        self.settles_after = self.of(CLICK).settles_after
        shared = dict(self.of(CLICK).named_modules())
        for head in fields.heads:
            for name, block in list(self.of(head).named_modules()):
                if isinstance(block, Embeddings):
                    self.of(head).set_submodule(name, shared[name])

    def of(self, head: str) -> Network:
        """The network of a head."""
        network = self.networks[head]
        assert isinstance(network, Network)  # noqa: S101  # as it was made
        return network

    @property
    def intercept(self) -> Tensor:
        """See `Network`."""
        return self.of(CLICK).intercept

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)` by head; what a network gives for its own loss is called `head/name`."""
        outputs = {}
        for head in self.heads:
            for name, values in self.networks[head](request).items():
                outputs[head if name == CLICK else f"{head}/{name}"] = values
        return outputs

    def ad_vectors(self, ads: Part) -> Tensor | None:
        """See `Network`; the click's."""
        return self.of(CLICK).ad_vectors(ads)

    def request_vectors(self, request: RequestTensors) -> Tensor | None:
        """See `Network`; the click's."""
        return self.of(CLICK).request_vectors(request)

    def explained(self, request: RequestTensors) -> Explained:
        """See `Network`; the click's."""
        return self.of(CLICK).explained(request)

    def loss(self, outputs: Outputs, request: RequestTensors, labels: Labels) -> Tensor:
        """The sum of what each network wants less of."""
        losses = []
        for head in self.heads:
            more = {name.removeprefix(f"{head}/"): each for name, each in outputs.items() if name.startswith(f"{head}/")}
            own = {CLICK: outputs[head], **more}
            maturity = {CLICK: labels.maturity[head]} if head in labels.maturity else {}
            losses.append(self.of(head).loss(own, request, Labels({CLICK: labels.heads[head]}, labels.weight, maturity)))
        return sum(losses[1:], losses[0])

    def begin(self, ads: Part) -> None:
        """See `Network`."""
        for head in self.heads:
            self.of(head).begin(ads)

    def flatten(self) -> None:
        """See `Network`."""
        for head in self.heads:
            self.of(head).flatten()

    def first_weights(self) -> list[nn.Parameter]:
        """See `Network`."""
        return [weight for head in self.heads for weight in self.of(head).first_weights()]

    def optimisers(self, learning_rate: float) -> list[torch.optim.Optimizer]:
        """Each network's own; what they share is trained by the click's."""
        found, taken = [], set[nn.Parameter]()
        for head in self.heads:
            for optimiser in self.of(head).optimisers(learning_rate):
                for group in optimiser.param_groups:
                    group["params"] = [weight for weight in group["params"] if weight not in taken]
                if any(group["params"] for group in optimiser.param_groups):
                    found.append(optimiser)
            taken |= set(self.of(head).parameters())
        return found

    def after_step(self, steps: int) -> None:
        """See `Network`."""
        for head in self.heads:
            self.of(head).after_step(steps)
