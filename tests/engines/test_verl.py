"""The plugin for verl, against verl's own losses. `make test-verl` installs both and runs this."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError
from tokengrain.loss import Counts, make_normaliser
from tokengrain.method import make_objective
from tokengrain.methods.grpo import group_advantages

pytestmark = pytest.mark.verl
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
FLAT = {
    "token-mean": ("sum", "token_mean"),
    "seq-mean-token-sum": ("sum", "mean"),
    "seq-mean-token-mean": ("mean", "mean"),
}
LOSSES = ("grpo", "gspo", "dcpo", "reinforce")


@pytest.fixture(scope="module")
def core() -> Any:
    import verl  # noqa: F401  # loads the plugin by its entry point
    from verl.trainer.ppo import core_algos

    return core_algos


def made(seed: int = 0, rows: int = 6, longest: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logps, old logps, advantages, mask) `[B, T]`, with completions of unequal lengths and a hole."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    mask = torch.arange(longest) < lengths[:, None]
    mask[0, 2] = False  # a token of a tool
    logps = -3 * torch.rand(rows, longest, generator=generator, dtype=torch.float64)
    old = logps + 0.4 * torch.randn(rows, longest, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, 1, generator=generator, dtype=torch.float64).expand(-1, longest) * mask
    return logps, old, advantages, mask


def config(**counts: Any) -> Any:
    from verl.workers.config import ActorConfig

    clips = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0}
    made = ActorConfig(strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=2, **clips)
    made.global_batch_info.update(counts)
    return made


def through(core: Any, name: str, mode: str, given: Any, **counts: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient as verl gets them."""
    logps, old, advantages, mask = given
    logps = logps.clone().requires_grad_()
    loss, metrics = core.get_policy_loss_fn(name)(
        old_log_prob=old,
        log_prob=logps,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode=mode,
        config=config(**counts),
        rollout_is_weights=None,
    )
    assert all(isinstance(value, float) or name in ("vanilla", "gspo") for value in metrics.values())
    loss.backward()
    return loss.detach(), logps.grad


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", FLAT)
def test_it_is_the_flat_loss(core: Any, name: str, mode: str) -> None:
    logps, old, advantages, mask = made()
    found = through(core, f"tokengrain_{name}", mode, made())
    own = logps.clone().requires_grad_()
    flat, segments = Segments.from_padded(own, mask)
    reduction, normaliser = FLAT[mode]
    objective = make_objective(name, **({} if name == "gspo" else {"reduction": reduction}))
    given = {"old_logps": old[mask], "advantages": advantages[mask]}
    taken = {n: v for n, v in given.items() if n in objective.needs | objective.optional}
    out = objective(segments=segments, logps=flat, **taken)
    if name == "gspo" and reduction == "sum":
        out.losses = out.losses * segments.lengths
    want = make_normaliser(normaliser)(out, Counts.of(segments, pairs=False, prompts=3))
    want.backward()
    torch.testing.assert_close(found[0], want.detach())
    torch.testing.assert_close(found[1], own.grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("ours", "theirs", "more"), [("grpo", "vanilla", {"ratio_cap": 3.0}), ("gspo", "gspo", {})])
def test_it_is_verls_own(core: Any, ours: str, theirs: str, more: Any, mode: str, monkeypatch: Any) -> None:
    import json

    clip = {"epsilon": 0.2, "epsilon_high": 0.28, **more}
    monkeypatch.setenv("TOKENGRAIN_VERL", json.dumps({ours: clip}))
    for seed in range(5):
        found = through(core, f"tokengrain_{ours}", mode, made(seed))
        want = through(core, theirs, mode, made(seed))
        torch.testing.assert_close(found[0], want[0])
        torch.testing.assert_close(found[1], want[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_on_two_ranks_give_the_whole_batch(core: Any, name: str, mode: str) -> None:
    given = made()
    counts = {"batch_num_tokens": int(given[3].sum()), "global_batch_size": 6, "loss_scale_factor": 9}
    whole = through(core, f"tokengrain_{name}", mode, given, dp_size=1, **counts)
    cuts = [slice(0, 2), slice(2, 4), slice(4, 6)]
    parts = [through(core, f"tokengrain_{name}", mode, [x[cut] for x in given], dp_size=2, **counts) for cut in cuts]
    torch.testing.assert_close(sum(part[0] for part in parts) / 2, whole[0])
    torch.testing.assert_close(torch.cat([part[1] for part in parts]) / 2, whole[1])


def test_groups(core: Any, monkeypatch: Any) -> None:
    import numpy

    mask = made()[3]
    rewards = torch.zeros(mask.shape)
    rewards[:, 0] = torch.rand(len(mask))
    index = numpy.array(["b", "b", "a", "a", "c", "c"], dtype=object)
    ask = {"token_level_rewards": rewards, "response_mask": mask, "index": index}
    found, returns = core.get_adv_estimator_fn("tokengrain_group")(**ask, config=None)
    theirs, _ = core.get_adv_estimator_fn("grpo")(**ask)
    torch.testing.assert_close(found, theirs)
    assert torch.equal(found, returns)
    monkeypatch.setenv("TOKENGRAIN_VERL", '{"group": {"baseline": "leave_one_out", "scale": "none"}}')
    found, _ = core.get_adv_estimator_fn("tokengrain_group")(**ask, config=None)
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    want = group_advantages(rewards.sum(-1), group, baseline="leave_one_out", scale="none")
    torch.testing.assert_close(found, want[:, None] * mask)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "expected an object of objects"),
        ('{"thr": {}}', "has thr; expected grpo, gspo"),
        ('{"grpo": {"reduction": "sum"}}', "expected verl's loss_agg_mode"),
        ('{"grpo": {"epsilonn": 0.2}}', "epsilon"),
    ],
)
def test_wrong_settings(core: Any, given: str, message: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("TOKENGRAIN_VERL", given)
    with pytest.raises(RecipeError, match=message):
        through(core, "tokengrain_grpo", "token-mean", made())


def test_a_worker_of_ray_has_it(core: Any) -> None:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20)
    try:

        @ray.remote
        def names() -> list[str]:
            import verl  # noqa: F401
            from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

            return sorted(name for name in POLICY_LOSS_REGISTRY if name.startswith("tokengrain"))

        assert ray.get(names.remote(), timeout=900) == sorted(f"tokengrain_{name}" for name in LOSSES)
    finally:
        ray.shutdown()
