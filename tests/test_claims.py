"""The parts that the papers' claims are tried with."""

import numpy as np
import torch

from benchmarks.claims import PReLU, replaced, shortened
from training.networks.layers import Dice, Tower


def test_prelu_has_a_slope_a_feature_of_the_last_axis() -> None:
    unit = PReLU(2)
    unit.alpha.data = torch.tensor([0.5, -1.0])
    x = torch.tensor([[[-2.0, -2.0], [3.0, 3.0]]])
    assert unit(x).tolist() == [[[-1.0, 2.0], [3.0, 3.0]]]


def test_every_dice_is_replaced() -> None:
    tower = Tower(4, 4, (8, 6), 0.0, norm="dice")
    widths = [len(layer.alpha) for layer in tower.modules() if isinstance(layer, Dice)]
    assert widths
    replaced(tower, PReLU)
    assert not any(isinstance(layer, Dice) for layer in tower.modules())
    assert [len(layer.alpha) for layer in tower.modules() if isinstance(layer, PReLU)] == widths


def test_a_shorter_history_keeps_the_last_behaviours() -> None:
    history = np.array([[1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0], [7, 8, 9, 0]], np.int32)
    assert shortened(history, 2).tolist() == [[3, 4], [5, 6], [0, 0], [8, 9]]
    assert shortened(history, 4).tolist() == history.tolist()
