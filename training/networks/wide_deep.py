"""Wide & Deep: memorised crosses beside an MLP, trained jointly (Cheng et al. 2016, https://arxiv.org/abs/1606.07792).

Eq. 3: logit = w_wideᵀ [x, φ(x)] + w_deepᵀ a_L + b, where φ are the crosses of eq. 1 that `crosses` states. As in the paper the wide part
is trained by FTRL with L1 and the deep part by Adagrad. Their learning rates are multiples of the loop's, which is meant for Adam.

Different from it: crosses are hashed into a table; a cross of fields with several values, such as of the ad with each behaviour, is
the mean over the pairs; the wide part has all fields, not only stated ones; the MLP has batch norm.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import CLICK, Explained, Fields, MLPSettings, Network, RequestTensors
from .crossed import Crosses, parse_crosses
from .embeddings import Embeddings, flat
from .ftrl import FTRL
from .interactions import each_field, first_order
from .layers import Tower


@dataclass(frozen=True)
class WideDeepSettings(MLPSettings):
    """Crosses, widths and optimisers of a Wide & Deep."""

    crosses: str = ""
    """Pairs of fields whose values have weights together, such as `user_id*ad_id,slot*genre`; `history.genre*genre` crosses with each
    behaviour's."""
    cross_rows: int = 100_000
    """Rows of the table that all crosses are hashed into."""
    wide_rate: float = 50.0
    """FTRL's learning rate, as a multiple of `learning_rate`: its steps shrink as they go."""
    wide_l1: float = 1e-4
    """FTRL's λ1, which keeps weights that tell little at 0; of a mean over the batch."""
    deep_rate: float = 10.0
    """Adagrad's learning rate, as a multiple of `learning_rate`."""


class WideDeep(Network):
    """Stated crosses of fields beside an MLP, by FTRL and Adagrad (Cheng et al. 2016)."""

    settings = WideDeepSettings
    splits = False
    intercept_at = "tower.bias"

    def __init__(self, fields: Fields, settings: WideDeepSettings) -> None:
        super().__init__(fields, settings)
        if settings.cross_rows < 1:
            raise ValueError(f"cross_rows is {settings.cross_rows}; it must be at least 1")
        width, crosses = settings.embedding, parse_crosses(settings.crosses, fields)
        self.rates = settings
        self.first, self.second = Embeddings(fields, 1), Embeddings(fields, width)
        self.crosses = Crosses(crosses, settings.cross_rows) if crosses else None
        self.tower = Tower(fields.request * width, fields.count("ad") * width, settings.hidden, settings.dropout)

    def forward(self, request: RequestTensors) -> dict[str, Tensor]:
        """Logits `(R, C)`."""
        wide = first_order(self.first, request)
        if self.crosses is not None:
            wide = wide + self.crosses(request)
        u, a = self.second.of_request(request), self.second("ad", request.ad)
        return {CLICK: wide + self.tower(flat(u), a.flatten(2))}

    def explained(self, request: RequestTensors) -> Explained:
        """Each field's weight and each cross's; the MLP is the rest."""
        crosses = [] if self.crosses is None else [self.crosses.explained(request)]
        return Explained.of(each_field(self.first, request), *crosses)

    def optimisers(self, learning_rate: float) -> list[torch.optim.Optimizer]:
        """FTRL for the wide part and Adagrad for the deep one, which begins with TensorFlow's accumulator, as the authors' did."""
        wide: list[nn.Parameter] = [*self.first.parameters(), *(self.crosses.parameters() if self.crosses is not None else ())]
        deep = [*self.second.parameters(), *self.tower.parameters()]
        rates = self.rates
        return [
            torch.optim.Adagrad(deep, lr=learning_rate * rates.deep_rate, initial_accumulator_value=0.1),
            FTRL(wide, lr=learning_rate * rates.wide_rate, l1=rates.wide_l1),
        ]
