"""The true reward of the world `revision`, as `RewardSuite` takes it."""

from __future__ import annotations

from collections.abc import Sequence

from tokengrain.worlds.arithmetic import rewards


def correct(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    truncated: Sequence[bool] | None = None,
) -> list[float]:
    """1 for completions whose last total before `>` is right, else 0, whatever the answer after it says."""
    return rewards.correct(prompts, completions, completion_ids, truncated, ending="marker")
