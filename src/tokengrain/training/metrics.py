"""Means of metrics over many batches and ranks, with the right weights, and an interval for proportions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]


def wide(values: Tensor) -> Tensor:
    """`values` in float64; on the host if their device has no such numbers (Apple's)."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


class WeightedMeans:
    """Sums and weights of named quantities; `means` divides. Sums are float64, on the host.

    A mean of batch means is wrong as soon as batches differ in size; every quantity is added here as a sum
    over the things it is a mean of (pairs, tokens), with their number as the weight.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def add(self, name: str, total: float, weight: float) -> None:
        """Add `total`, the sum over `weight` things."""
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.weights[name] = self.weights.get(name, 0.0) + float(weight)

    def merge(self, other: WeightedMeans) -> None:
        for name, total in other.sums.items():
            self.add(name, total, other.weights[name])

    def scaled(self, factor: float) -> WeightedMeans:
        """The same quantities with sums and weights times `factor`; 0 keeps the names alone."""
        out = WeightedMeans()
        for name, total in self.sums.items():
            out.add(name, total * factor if factor else 0.0, self.weights[name] * factor)
        return out

    def clear(self) -> None:
        self.sums.clear()
        self.weights.clear()

    def means(self) -> dict[str, float]:
        """Mean of every quantity that has weight, in order of first use."""
        return {name: total / self.weights[name] for name, total in self.sums.items() if self.weights[name] > 0}

    def reduced(self, all_reduce: AllReduce) -> WeightedMeans:
        """The same over all ranks; every rank must hold the same names."""
        names = sorted(self.sums)
        values = [self.sums[n] for n in names] + [self.weights[n] for n in names]
        total = all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()
        out = WeightedMeans()
        for i, name in enumerate(names):
            out.add(name, total[i], total[len(names) + i])
        return out

    def state(self) -> dict[str, Any]:
        """JSON-like state; floats survive JSON exactly."""
        return {"sums": dict(self.sums), "weights": dict(self.weights)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.sums, self.weights = dict(state["sums"]), dict(state["weights"])


def add_metrics(means: WeightedMeans, metrics: Mapping[str, Tensor], n_losses: int) -> None:
    """Add an objective's metrics: a vector is one value per pair, a scalar the mean over `n_losses` pairs."""
    vectors = {name: wide(value.detach()) for name, value in metrics.items()}
    totals = torch.stack([v.sum() if v.dim() else v * n_losses for v in vectors.values()]).tolist() if vectors else []
    for (name, value), total in zip(vectors.items(), totals, strict=True):
        means.add(name, total, value.numel() if value.dim() else n_losses)
