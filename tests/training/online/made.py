"""Made-up rollouts as rollout credits see them, and ranks as threads that meet where they gather."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.training.tiny import VOCABULARY
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.method import Rollout
from tokengrain.training.rollout import select_prompts

COLUMNS = ("old_logps", "ref_logps", "entropy", "values")


def made_batch(
    prompts: int = 4, generations: int = 3, *, seed: int = 0, longest: int = 9, **raw: Sequence[Any]
) -> TokenBatch:
    """Random prompts and completions of unequal lengths, with the columns that steps ask for."""
    g = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(3, VOCABULARY, (n,), generator=g).tolist()

    samples = []
    for row in range(prompts):
        completions = [Completion(ids(2, longest)) for _ in range(generations)]
        samples.append(Sample(ids(2, 6), completions, row=f"row {row}", raw={k: v[row] for k, v in raw.items()}))
    batch = TokenBatch.from_samples(samples)
    n = batch.segments.total
    columns = {name: torch.randn(n, generator=g) for name in COLUMNS}
    columns["old_logps"] = -columns["old_logps"].abs()
    columns["ref_logps"] = columns["old_logps"] + 0.2 * columns["ref_logps"]
    columns["entropy"] = columns["entropy"].abs()
    return batch.with_columns(**columns, truncated=torch.zeros(n))


def made_step(batch: TokenBatch | None = None, *, seed: int = 1, index: int = 0, **changes: Any) -> Rollout:
    """A step with random 0/1 outcomes, all kinds of groups among them."""
    batch = made_batch() if batch is None else batch
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 2, (batch.n_completions,), generator=g).float()
    settings: dict[str, Any] = {
        "rewards": rewards,
        "by_name": {},
        "prompt_ids": batch.rows,
        "index": index,
        "correct": rewards > 0.5,
        **changes,
    }
    return Rollout(replace(batch, columns=dict(batch.columns)), **settings)


def part(step: Rollout, prompts: Sequence[int]) -> Rollout:
    """The step with these prompts only."""
    return replace(select_prompts(step, list(prompts)), metrics={})


def on_two_ranks(step: Rollout, make: Callable[[], Any]) -> tuple[list[Rollout], list[Any]]:
    """The step shared out to two ranks as the trainer does, each with a rollout credit of its own, and what is left of
    both: (rollouts, credits)."""
    slots: list[Any] = [None, None]
    meeting = threading.Barrier(2, timeout=30)
    errors: list[BaseException] = []

    def exchange_of(rank: int) -> Callable[[Any], list[Any]]:
        def exchange(values: Any) -> list[Any]:
            slots[rank] = values
            meeting.wait()
            found = list(slots)
            meeting.wait()
            return found

        return exchange

    shares = [replace(part(step, range(r, step.batch.n_prompts, 2)), exchange=exchange_of(r)) for r in range(2)]
    steps = [make(), make()]

    def run(rank: int) -> None:
        try:
            steps[rank](shares[rank])
        except BaseException as error:
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return shares, steps


def reloaded(credit: Any, make: Callable[[], Any]) -> Any:
    """A new rollout credit with the other's state, through JSON."""
    fresh = make()
    fresh.load_state_dict(json.loads(json.dumps(credit.state_dict())))
    return fresh


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, check_dtype=False)
