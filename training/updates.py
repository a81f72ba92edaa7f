"""What a loss does to the weights of a network: gradients, the decay of its embeddings, clipping, and the optimisers' steps."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .cooccurrence import Cooccurrence
from .datasets.encoded import Rows
from .distributed import ONLY, Process
from .networks.contract import Network, RequestTensors
from .networks.embeddings import Embeddings
from .networks.lookup import EmbeddingTable
from .sparse import SparseTables, lazily
from .unknown import occurrences, parts_of

if TYPE_CHECKING:
    from .train_settings import TrainSettings


class Updates:
    """The steps of one training."""

    def __init__(
        self, network: Network, rows: Rows, settings: "TrainSettings", more: Cooccurrence | None = None, process: Process = ONLY
    ) -> None:
        """`more` is a second task, whose weights learn too; `process` has a share of each step's rows."""
        self.network, self.clip = network, settings.clip
        self.modules: list[nn.Module] = [network, more] if more else [network]
        self.tables = SparseTables.among(self.modules, settings.sparse_above, process)
        optimisers = network.optimisers(settings.learning_rate) + ([more.optimiser(settings.learning_rate)] if more else [])
        optimisers += [network.position_bias.optimiser()] if network.position_bias else []
        self.optimisers = lazily(optimisers, self.tables)
        self.decay = EmbeddingDecay(network, rows, settings)

    def summary(self) -> Iterator[str]:
        """What is updated sparsely, a line a table."""
        for table in self.tables.tables:
            where = f", and split over the workers, {table.shard.each:,} each" if table.shard else ""
            yield f"a table of {table.num_embeddings:,} rows is updated sparsely{where}: a step changes and decays the rows of its batch"

    def step(self, loss: Tensor, batch: RequestTensors) -> None:
        """One step down a loss, `batch` being its rows."""
        self.network.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.tables.gather()
        self.decay.add_gradient(batch)
        clip(self.network.parameters(), self.clip, [table for table in self.tables.tables if table.shard], self.tables.process)
        for optimiser in self.optimisers:
            optimiser.step()


@torch.no_grad()
def clip(weights: Iterable[nn.Parameter], most: float, split: Sequence[EmbeddingTable], process: Process) -> None:
    """`clip_grad_norm_` of torch, which knows no sparse gradients, nor that of `split` tables others have the rest."""
    parts = {id(table.weight) for table in split}
    found = [(id(weight) in parts, weight.grad) for weight in weights if weight.grad is not None]
    gradients = [(part, gradient._values() if gradient.is_sparse else gradient) for part, gradient in found]
    norm = nn.utils.get_total_norm([gradient for part, gradient in gradients if not part])
    if split:
        norm = norm.hypot(process.norm(nn.utils.get_total_norm([gradient for part, gradient in gradients if part])))
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for _, gradient in gradients:
        gradient.mul_(factor)


class EmbeddingDecay:
    """L2 of the embeddings, added to the gradient of a step rather than to the loss: the same sum, without the graph.

    Rows that no step can use are left as they are: a warm start must not forget what its window does not show.
    """

    def __init__(self, network: Network, rows: Rows, settings: "TrainSettings") -> None:
        self.l2 = network.embedding_l2 if settings.embedding_l2 == -1 else settings.embedding_l2
        self.embeddings = [module for module in network.modules() if isinstance(module, Embeddings) and module.sizes]
        first = {id(weight) for weight in network.first_weights()}
        self.of_table = [(settings.first_l2 if id(each.table.weight) in first else 0.0) or self.l2 for each in self.embeddings]
        self.counts, self.unseen = [], dict[int, Tensor]()
        for i, embeddings in enumerate(self.embeddings):
            if settings.regularise == "table" and isinstance(embeddings.table, EmbeddingTable) and embeddings.table.touched is not None:
                continue  # the rows that a step has are no secret
            counts = occurrences(embeddings, rows)
            for vocabulary in embeddings.sizes:  # about as often as values are hidden
                counts[embeddings.rows_of(vocabulary)][0] += 2 * settings.unknown_rate * counts[embeddings.rows_of(vocabulary)].sum()
            self.unseen[i] = (counts == 0).nonzero().flatten()
            if settings.regularise == "batch":
                self.counts.append(counts.clamp(min=1))

    @torch.no_grad()
    def add_gradient(self, batch: RequestTensors) -> None:
        """Add the decay of one step, `batch` being its rows. Of a sparse gradient, which has each row once, only its rows decay."""
        for i, (embeddings, l2) in enumerate(zip(self.embeddings, self.of_table, strict=True)):
            weight, counts = embeddings.table.weight, self.counts[i] if self.counts else None
            if (gradient := weight.grad) is None:  # it is held still
                continue
            if gradient.is_sparse:
                rows = gradient._indices()[0]
                share = l2 if counts is None else (self.l2 / counts[rows])[:, None]
                gradient._values().add_(weight.index_select(0, rows).mul_(share))
            elif counts is None:
                gradient.add_(weight, alpha=l2)
                gradient[self.unseen[i]] = 0
            else:
                rows = torch.unique(torch.cat([embeddings.table_rows(name, p.ids).flatten() for name, p in parts_of(batch, embeddings)]))
                gradient[rows] += weight[rows] * (self.l2 / counts[rows])[:, None]
