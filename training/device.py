"""Where the tensors of a training are, and how its batches come there."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .train_settings import TrainError

AHEAD = 2
"""Batches that are made while the device works."""
T = TypeVar("T")


def device_of(asked: str) -> torch.device:
    """The device that a setting names; `auto`: CUDA where there is one.

    Raises:
        TrainError: there is no such device here.
    """
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise TrainError("device is cuda, and torch finds no CUDA device here; say --device cpu, or install a torch that was built for it")
    if asked == "cpu" or not there:
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it the order of cuBLAS's sums is left to chance
    return torch.device("cuda")


def generators(device: torch.device) -> list[torch.Generator]:
    """What draws there, beside what has a generator of its own."""
    return [torch.default_generator, *([torch.cuda.default_generators[torch.cuda.current_device()]] if device.type == "cuda" else [])]


def home(network: nn.Module) -> torch.device:
    """Where the weights of a network are."""
    return next(network.parameters()).device


def moved(tensors: T, device: torch.device) -> T:
    """Tuples and dicts of tensors, on a device; of the CPU's as they are."""
    return tensors if device.type == "cpu" else tree_map_only(Tensor, lambda each: each.to(device), tensors)


def delivered(batches: Iterator[T], device: torch.device) -> Iterator[T]:
    """Batches on the device: those of the CPU one by one, others made ahead, in pinned memory that is copied while the device works."""
    return batches if device.type == "cpu" else ahead(_sent(batches, device))


def _sent(batches: Iterator[T], device: torch.device) -> Iterator[T]:
    for batch in batches:
        yield tree_map_only(Tensor, lambda each: each.pin_memory().to(device, non_blocking=True), batch)


def ahead(made: Iterator[T]) -> Iterator[T]:
    """The same, of which a thread makes `AHEAD` before they are asked for."""
    end = object()
    with ThreadPoolExecutor(1, "batches") as thread:
        waiting = deque(thread.submit(next, made, end) for _ in range(AHEAD))
        while (found := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, made, end))
            yield found  # type: ignore[misc]  # it is no end
