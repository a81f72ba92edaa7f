"""Values hidden from a step of training, so that the unknown id, which no row of the train split has, learns what it stands for.

With `min_count = 1` a vocabulary holds every value of the train split. What is unknown when it is served would meet an embedding
that no step ever trained, and rank wherever that happens to lie: above what is known, as a rule.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from features.encode import IDENTITIES, Block
from features.vocabulary import PADDING, UNKNOWN

from .datasets.encoded import Rows
from .device import home, moved
from .networks.contract import CLICK, Labels, Network, Part, RequestTensors
from .networks.embeddings import Embeddings
from .networks.lookup import EmbeddingTable
from .shards import own_rows
from .sparse import SparseTables, lazily

ROWS_AT_ONCE = 4096
SETTLING_STEPS, SETTLING_ROWS, SETTLING_RATE = 300, 128, 0.01
LEAST_TWINS = 8
"""Of a step: with one in a hundred rows of a small batch the unknown would still be on its way when the training ends."""
Chosen = np.ndarray[tuple[int], np.dtype[np.int64]]


class Hiding:
    """Hides values at random, each with probability `rate`: a row's user with its profile and history, a behaviour, a single value.

    As many rows, and `LEAST_TWINS` at least, get twins: the same request with an ad of which nothing is known, encoded as the service
    encodes it, and with any ad of the catalogue, each as likely. They have no label. The one is to score the middle of what the
    network says of the other: the labels' mean, which log loss would teach it, lies above most ads wherever a few are clicked much more.
    """

    def __init__(self, rows: Rows, rate: float, seed: int) -> None:
        """`seed` draws what is hidden: the same one, the same values."""
        self.rows, self.rate = rows, rate
        self.random = np.random.default_rng((seed, 1))

    def batch(self, chosen: Chosen, among: Rows | None = None) -> tuple[RequestTensors, Tensor]:
        """The tensors of some rows, or of some `among` those, as `Rows.batch` gives them, with values hidden; after them their twins, the
        T with an unknown ad and then the T with any ad. And the `(T,)` positions of those that have twins.
        """
        user, history, ad, ages = (self.rows if among is None else among).batch(chosen)
        for part in (user, history, ad) if self.rate else ():
            ids = part.ids.numpy()
            ids[self._drawn(ids.shape) & (ids > PADDING)] = UNKNOWN
        hidden = self._drawn(len(chosen))
        count = min(max(LEAST_TWINS, round(self.rate * len(chosen))), len(chosen)) if self.rate else 0
        twins = torch.from_numpy(self.random.choice(len(chosen), count, replace=False))
        nobody, nothing = self.rows.strangers.user, self.rows.strangers.ad
        user.ids.numpy()[hidden, : nobody.ids.shape[1]] = nobody.ids
        user.numbers.numpy()[hidden, : nobody.numbers.shape[1]] = nobody.numbers
        history = self._history(history, hidden)
        assert history.rows is not None  # noqa: S101  # `Rows.batch` has them
        both = torch.cat([twins, twins])
        user = Part(*(torch.cat([block, block[both]]) for block in (user.ids, user.numbers)))
        some = self._any_ads(len(twins))
        blocks = ((ad.ids, nothing.ids, some.ids), (ad.numbers, nothing.numbers, some.numbers))
        ad = Part(*(torch.cat([a, torch.from_numpy(b).expand(len(twins), 1, -1), torch.from_numpy(c)]) for a, b, c in blocks))
        if ages is not None:
            ages[hidden] = 0
            ages = torch.cat([ages, ages[both]])
        return RequestTensors(user, history._replace(rows=torch.cat([history.rows, history.rows[both]])), ad, ages), twins

    def batches(self, order: Iterable[tuple[Rows, Chosen]]) -> Iterator[tuple[RequestTensors, Labels, int, dict[str, Any]]]:
        """Each batch, its labels, the T of its twins, and what is drawn so far: a state of `random`. `order`: see `RowOrder.epoch`."""
        for read, chosen in order:
            batch, twins = self.batch(chosen, read)
            yield batch, read.labels_of(chosen), len(twins), dict(self.random.bit_generator.state)

    def _history(self, history: Part, hidden: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Part:
        """Behaviours on ads that nobody knows, and no behaviour of the users that are hidden."""
        if not history.ids.shape[-1]:  # a schema without a history
            return history
        assert history.rows is not None  # noqa: S101  # `Rows.batch` has them
        past, rows = self.rows.strangers.behaviour, history.rows.numpy()
        ids = torch.cat([history.ids, torch.from_numpy(past.ids), torch.zeros_like(history.ids[:1])])
        numbers = torch.cat([history.numbers, torch.from_numpy(past.numbers), torch.zeros_like(history.numbers[:1])])
        real = history.behaviours().numpy()
        rows = np.where(self._drawn(rows.shape) & real, len(history.ids), rows)
        rows[hidden] = len(history.ids) + 1
        return Part(ids, numbers, torch.from_numpy(rows))

    def settle(self, network: Network) -> None:
        """Put the unknown ad into the middle of the catalogue, as the network that was chosen scores them when it is served.

        Only the embeddings of what is unknown about such an ad move, its id's aside, which described ads share.
        """
        if not self.rate:
            return
        network.eval()
        blocks = [module for module in network.modules() if isinstance(module, Embeddings)]
        found = [(block.table, _movable(block)) for block in blocks]
        tables = SparseTables(
            [block.table for block in blocks if isinstance(block.table, EmbeddingTable) and block.table.touched is not None]
        )
        optimisers = lazily([torch.optim.Adam([table.weight for table, _ in found], lr=SETTLING_RATE)], tables)
        for step in range(SETTLING_STEPS):
            for group in [group for optimiser in optimisers for group in optimiser.param_groups]:
                group["lr"] = SETTLING_RATE * (1 - step / SETTLING_STEPS)
            user, history, _, ages = self.rows.batch(self.random.integers(0, len(self.rows), SETTLING_ROWS))
            any_ad = self._any_ads(SETTLING_ROWS)
            one = self.rows.strangers.ad.take(np.zeros((SETTLING_ROWS, 1), np.int64))
            pairs = ((one.ids, any_ad.ids), (one.numbers, any_ad.numbers))
            both = Part(*(torch.from_numpy(np.hstack(pair)) for pair in pairs))
            unknown, known = network(moved(RequestTensors(user, history, both, ages), home(network)))[CLICK].unbind(1)
            network.zero_grad()
            (unknown - known.detach()).abs().mean().backward()
            tables.gather()
            for table, movable in found:
                if (gradient := table.weight.grad) is not None:
                    sparse, (first, count) = gradient.is_sparse, own_rows(table)
                    rows = gradient._indices()[0] + first if sparse else torch.arange(count, device=movable.device)
                    (gradient._values() if sparse else gradient).mul_(torch.isin(rows, movable)[:, None])
            for optimiser in optimisers:
                optimiser.step()

    def _any_ads(self, count: int) -> Block:
        """Ads of the catalogue `(count, 1, W)`, each as likely."""
        return self.rows.catalogue.take(self.random.integers(0, max(len(self.rows.catalogue), 1), (count, 1)))

    def _drawn(self, shape: int | tuple[int, ...]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return self.random.random(shape) < self.rate


def _movable(embeddings: Embeddings) -> Tensor:
    """The rows of the table `(K,)` that stand for an unknown value of an ad."""
    slots = embeddings.layouts["ad"].ids if "ad" in embeddings else ()
    names = {slot.field.vocabulary for slot in slots if slot.field.name not in IDENTITIES} or {slot.field.vocabulary for slot in slots}
    rows = [embeddings.rows_of(vocabulary).start for vocabulary in names]
    return torch.tensor(rows, dtype=torch.int64, device=embeddings.table.weight.device)


class Unseen:
    """Rows of the embeddings that no row of train uses: buckets that nothing was hashed into, values beyond a list's length.

    Such a value is unknown in all but its id, so it takes the row of its vocabulary's unknown. What a warm start knows from
    before stays.
    """

    def __init__(self, network: nn.Module, rows: Rows, warm: bool) -> None:
        self.found: list[tuple[nn.Embedding, Tensor, Tensor]] = []
        """A table, rows of it that this process has, numbered from its first, and the row `(1,)` of their unknown in the whole table."""
        for embeddings in (module for module in network.modules() if isinstance(module, Embeddings)):
            counts, table = occurrences(embeddings, rows), embeddings.table.weight
            first, count = own_rows(embeddings.table)
            for vocabulary in embeddings.sizes:
                whole = embeddings.rows_of(vocabulary)
                own = slice(*(min(max(end - first, 0), count) for end in (whole.start, whole.stop)))
                never = counts[own] == 0
                if warm:
                    never &= (table[own] == table[own.start]).all(1)
                never[: max(0, whole.start + 1 - first - own.start)] = False
                unknown = torch.tensor([whole.start], device=table.device)
                self.found.append((embeddings.table, never.nonzero().flatten() + own.start, unknown))

    @torch.no_grad()
    def fill(self) -> None:
        """Give them the unknown's row as it is now."""
        for table, rows, unknown in self.found:
            table.weight[rows] = table(unknown)


def occurrences(embeddings: Embeddings, rows: Rows) -> Tensor:
    """How often each row of the table that this process has `(rows,)` is used by the rows of a split, behaviours included."""
    first, count = own_rows(embeddings.table)
    total = embeddings.table.weight.new_zeros(count + 1, dtype=torch.float64)  # in 32 bits it would stay at 2**24
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = moved(rows.batch(np.arange(start, min(start + ROWS_AT_ONCE, len(rows)))), total.device)
        for name, part in parts_of(batch, embeddings):
            times = total.new_ones(len(part.ids)) if part.rows is None else torch.bincount(part.rows.flatten()).double()
            ids = embeddings.table_rows(name, part.ids).flatten(1) - first
            total.index_add_(0, ids.where((ids >= 0) & (ids < count), count).flatten(), times.repeat_interleave(ids.shape[1]))
    return total[:count].float()


def parts_of(batch: RequestTensors, embeddings: Embeddings) -> Iterator[tuple[str, Part]]:
    """The parts of a batch that the embeddings are for, by name."""
    return ((name, part) for name, part in batch.parts().items() if name in embeddings)
