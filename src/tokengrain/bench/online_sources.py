"""Credit of the online methods, as sources of `tokengrain bench credit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokengrain.bench.rollout_credit import OnlineCredit, advantages
from tokengrain.bench.setting import Bench, BenchSource, Credit
from tokengrain.credit.entropy_window import measured
from tokengrain.training.online.step import RolloutStep

WINDOW = 4


def _steps(
    *steps: dict[str, Any], read: Callable[[RolloutStep, Sequence[Any]], Tensor] = advantages
) -> Callable[[Bench], Credit]:
    return lambda bench: OnlineCredit(bench.world, lambda: steps, read)


def _influence(rollout: RolloutStep, steps: Sequence[Any]) -> Tensor:
    """THR with the sign of wrong completions turned back: low where a token lowers the likelihood of correct ones."""
    assert rollout.correct is not None  # the world grades
    return rollout.quantity("thr") * rollout.broadcast(torch.where(rollout.correct, 1.0, -1.0))


def _window(rollout: RolloutStep, steps: Sequence[Any]) -> Tensor:
    """Minus the window's entropy; 0 where the completion ends before the window does."""
    found = measured(rollout.quantity("entropy"), rollout.segments, mode="paper", window=WINDOW)
    return -torch.nan_to_num(found, nan=0.0)


def _window_entropy(bench: Bench) -> Credit:
    return OnlineCredit(bench.world, lambda: (), _window, needs=frozenset({"entropy"}))


def _rto(bench: Bench) -> Credit:
    guide = bench.model("guide")
    return OnlineCredit(
        bench.world,
        lambda: [{"name": "rto", "model": guide}],
        lambda rollout, steps: _given(rollout.token_rewards),
    )


def _gae(bench: Bench) -> Credit:
    critic = bench.model("critic")
    return OnlineCredit(bench.world, lambda: [{"name": "gae"}], advantages, critic=critic)


def _r3(power: float) -> Callable[[Bench], Credit]:
    def build(bench: Bench) -> Credit:
        step = {"name": "r3", "tokenizer": bench.world.tokenizer, "marker": ">", "power": power}
        return OnlineCredit(bench.world, lambda: [step], lambda rollout, steps: steps[0].last.weights)

    return build


def _given(values: Tensor | None) -> Tensor:
    assert values is not None  # the step sets them
    return values


GROUP = {"name": "group"}
HWE = {"name": "aepo", "mode": "paper", "triggers": None, "kl": "none"}
ON_CHAINS, ON_REFERENCES = ("chain",), ("reference",)

ONLINE = (
    BenchSource(
        "outcome",
        "untrained",
        "the outcome's advantage in its group, the same for all tokens of a completion (GRPO)",
        _steps(GROUP),
        questions=ON_CHAINS,
    ),
    BenchSource(
        "thr",
        "untrained",
        "hidden influence on the group's correct completions (THR), before signs and thresholds",
        _steps(GROUP, {"name": "thr"}, read=_influence),
        questions=ON_CHAINS,
    ),
    BenchSource(
        "thr_advantage",
        "untrained",
        "the group's advantage as THR leaves it, mask and p = 0.1",
        _steps(GROUP, {"name": "thr"}),
        questions=ON_CHAINS,
    ),
    BenchSource(
        "nthr_advantage",
        "untrained",
        "the group's advantage as NTHR leaves it",
        _steps(GROUP, {"name": "nthr"}),
        questions=ON_CHAINS,
    ),
    BenchSource(
        "window_entropy",
        "untrained",
        f"minus the mean entropy of a token and the next {WINDOW - 1} (AEPO)",
        _window_entropy,
        questions=ON_CHAINS,
    ),
    BenchSource(
        "hwe",
        "untrained",
        "-1 on the tokens that AEPO's entropy reward counts, 0 elsewhere",
        _steps(HWE, read=lambda rollout, steps: -rollout.quantity("hwe")),
        questions=ON_CHAINS,
    ),
    BenchSource(
        "rto",
        "trained",
        "token rewards of RTO: the guide's log-ratio, bounded",
        _rto,
        ("guide",),
        questions=ON_CHAINS,
    ),
    BenchSource(
        "gae",
        "trained",
        "advantages of PPO, with a critic trained on outcomes of the base model",
        _gae,
        ("critic",),
        questions=ON_CHAINS,
    ),
    BenchSource(
        "r3",
        "untrained",
        "weights of R3, by the deviation over the group's chains (DRO)",
        _r3(1.0),
        questions=ON_REFERENCES,
    ),
    BenchSource(
        "r3_variance",
        "untrained",
        "weights of R3 by the variance",
        _r3(2.0),
        questions=ON_REFERENCES,
    ),
)
