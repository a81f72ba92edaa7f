"""A network that goes on from an older one, whose vocabularies have grown meanwhile."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from features.vocabulary import UNKNOWN

from .contract import Network
from .embeddings import Embeddings


@torch.no_grad()
def warm_start(old: Network, new: Network, shift: float = 0.0, renewed: Mapping[str, Sequence[int]] | None = None) -> None:
    """Give a network the weights of an older one whose vocabularies it extends: it scores every row as that one did, plus `shift`.

    Values that are new begin with the row of the unknown, as which they have been served until now; so do ids that are `renewed`, by
    vocabulary, which stood for another value. A shift is needed where the rows
    are sampled otherwise than those that the older one was trained on: else all of the network would move to make up for it.

    Raises:
        ValueError: the networks differ in more than the length of their vocabularies.
    """
    weights, before = dict(old.state_dict()), dict(old.named_modules())
    for name, embeddings in new.named_modules():
        if isinstance(embeddings, Embeddings) and isinstance(known := before.get(name), Embeddings):
            weights[f"{name}.table.weight"] = _extended(known, embeddings, renewed or {})
    try:
        new.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the network to go on from is another one: {' '.join(str(error).split())}") from error
    if shift:
        new.intercept.add_(shift)


def _extended(old: Embeddings, new: Embeddings, renewed: Mapping[str, Sequence[int]]) -> Tensor:
    table = torch.zeros(new.table.num_embeddings, old.table.embedding_dim)
    for vocabulary in new.sizes:
        if vocabulary in old.sizes:
            known, rows = old.table.weight[old.rows_of(vocabulary)], new.rows_of(vocabulary)
            table[rows] = known[UNKNOWN - 1]
            table[rows][: len(known)] = known
            table[rows][[i - UNKNOWN for i in renewed.get(vocabulary, ())]] = known[UNKNOWN - 1]
    return table
