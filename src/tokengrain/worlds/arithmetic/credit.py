"""Credit that is known exactly in the world `arithmetic`: which token is to blame, and where something is decided."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.worlds.arithmetic.audit import audit, read, symbols, upto
from tokengrain.worlds.arithmetic.problems import Problem

if TYPE_CHECKING:
    from tokengrain.worlds.arithmetic.world import ArithmeticWorld


def _completions(world: ArithmeticWorld, batch: TokenBatch) -> list[tuple[Problem, list[str]]]:
    """Problem and symbols of every completion."""
    found = world.prompt_problems(batch)
    return [(found[g], symbols(batch.completion(c).tolist())) for c, g in enumerate(batch.group.tolist())]


def culprits(world: ArithmeticWorld, batch: TokenBatch) -> Tensor:
    """−1 at the culprit of every completion whose reward is 0, and 0 elsewhere, float `[N]`.

    Raises:
        DataError: a prompt that is not this world's.
    """
    values = torch.zeros(len(batch.completion_ids))
    starts = batch.completion_offsets.tolist()
    for c, (problem, tokens) in enumerate(_completions(world, batch)):
        found = audit(problem, tokens, world.ending)
        if found.index is not None:
            values[starts[c] + found.index] = -1.0
    return values[batch.counted.cpu()].to(batch.device)


def decisions(world: ArithmeticWorld, batch: TokenBatch) -> Tensor:
    """Digits of totals and what follows them (a check or a separator), bool `[N]`."""
    values = torch.zeros(len(batch.completion_ids), dtype=torch.bool)
    starts = batch.completion_offsets.tolist()
    for c, (problem, tokens) in enumerate(_completions(world, batch)):
        steps, _ = read(tokens, len(problem.steps), world.ending)
        end = len(upto(tokens, world.ending))
        for step in steps:
            # From the first total (after label, operator, operand) to the separator after the one in force.
            values[starts[c] + step.first + 3 : starts[c] + min(step.total + 3, end)] = True
    return values[batch.counted.cpu()].to(batch.device)
