"""What a bundle has for the search of ads, where its network has vectors: those of the ads, and a graph of each tower."""

import io
from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from ..networks.contract import Network, Part, RequestTensors

AD_VECTORS = "ad_vectors.parquet"
AT_ONCE = 8192


def ad_vectors(network: Network, ad_ids: Sequence[str], ads: Part) -> bytes | None:
    """A parquet file of `ad_id` and `vector`, K numbers of float32 a row, of ads `(A, W)`; None where the network has no vectors."""
    found = []
    with torch.no_grad():
        for start in range(0, len(ads.ids), AT_ONCE):
            vectors = network.ad_vectors(Part(ads.ids[start : start + AT_ONCE], ads.numbers[start : start + AT_ONCE]))
            if vectors is None:
                return None
            found.append(vectors.numpy())
    if not found:
        return None
    vectors_of_all, file = np.concatenate(found), io.BytesIO()
    pl.DataFrame({"ad_id": list(ad_ids), "vector": vectors_of_all}, schema_overrides={"ad_id": pl.String}).write_parquet(file)
    return file.getvalue()


class AdVectors(nn.Module):
    """The vectors `(R, C, K)` of ads, of their tensors of `Schema.tensors`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        """See above."""
        vectors: Tensor = self.network.ad_vectors(RequestTensors.of(tensors).ad)  # type: ignore[operator]  # a `Network`, fused
        return vectors


class RequestVectors(nn.Module):
    """The vectors `(R, K)` of requests, of the tensors of `Schema.tensors` but the ads'."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        """See above."""
        request = RequestTensors.of(tensors)
        vectors: Tensor = self.network.request_vectors(request)  # type: ignore[operator]  # a `Network`, fused
        return vectors
