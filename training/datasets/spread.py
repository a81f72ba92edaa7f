"""Mean and deviation of numbers that come block by block, without the cancellation of E[x²] - E[x]²."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
ROUNDING = 16 * float(np.finfo(np.float64).eps)
"""Numbers that differ by no larger share are one number, rounded."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of some numbers: how many, their mean, the sum of squared differences from it, the least and the largest."""

    count: int
    mean: float
    squares: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Array) -> "Spread":
        """That of a block of finite numbers `(N,)`."""
        if not len(numbers):
            return NOTHING
        x = numbers.astype(np.float64)
        low, high = float(x.min()), float(x.max())
        shifted = x - low  # of numbers far from 0 this loses nothing, and its mean has all digits
        mean = float(shifted.mean())
        return cls(len(x), low + mean, float(((shifted - mean) ** 2).sum()), low, high)

    def beside(self, other: "Spread") -> "Spread":
        """That of both blocks (Chan, Golub and LeVeque 1979)."""
        if not self.count or not other.count:
            return self if self.count else other
        count, apart = self.count + other.count, other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        squares = self.squares + other.squares + apart**2 * (self.count * (other.count / count))
        return Spread(count, mean, squares, min(self.low, other.low), max(self.high, other.high))

    @property
    def deviation(self) -> float:
        """The standard deviation."""
        return float((self.squares / self.count) ** 0.5)

    @property
    def constant(self) -> bool:
        """Whether the numbers are one number, rounded, or written in 64 bits here and in 32 there."""
        if self.high - self.low <= ROUNDING * max(abs(self.low), abs(self.high)):
            return True
        if self.low.is_integer() or self.high.is_integer():  # seconds since 1970, say, whose 32 bits are minutes apart
            return False
        return float(np.float32(self.low)) == self.high or float(np.float32(self.high)) == self.low


NOTHING = Spread(0, 0.0, 0.0, 0.0, 0.0)
