"""The plugin for verl, against verl's own losses. `make test-verl` installs both and runs this."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.engines.vllm import saved_model
from tokengrain.batch import Completion, Sample, Segments, TokenBatch
from tokengrain.errors import RecipeError, RolloutError
from tokengrain.loss import Counts, make_normaliser
from tokengrain.method import make_credit, make_objective
from tokengrain.methods.grpo import group_advantages
from tokengrain.models import load_trained_reward_model, reward_model_from
from tokengrain.scoring.token_scores import ScoreStatistics, set_statistics

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
    rewards[0, 2] = 1.0  # at a tool's token, as of a response that ends with one
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
        ('{"thr": {}}', "has thr; expected grpo, gspo, dcpo, reinforce, group or tokens"),
        ('{"grpo": {"reduction": "sum"}}', "expected verl's loss_agg_mode"),
        ('{"grpo": {"epsilonn": 0.2}}', "epsilon"),
    ],
)
def test_wrong_settings(core: Any, given: str, message: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("TOKENGRAIN_VERL", given)
    with pytest.raises(RecipeError, match=message):
        through(core, "tokengrain_grpo", "token-mean", made())


# ---- Token rewards: from the agent loop to advantages, all verl's own but its server and its store ----

PROMPT = "What is 1 + 2?"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy, its tokenizer, a guide of the same kind, and a token-level reward model."""
    folder = tmp_path_factory.mktemp("models")
    policy, tokenizer = saved_model(folder / "policy")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder / "policy")
    torch.manual_seed(3)
    type(policy)(policy.config).save_pretrained(folder / "guide")
    reward_model = reward_model_from(policy, share=False)
    set_statistics(reward_model, ScoreStatistics(0.1, 0.5))
    reward_model.save_pretrained(folder / "reward")
    (folder / "score.py").write_text("def compute_score(solution_str, **rest):\n    return 0.25\n")
    return folder


def from_agent_loop(models: Path, agent: str, responses: list[list[int]], monkeypatch: Any) -> Any:
    """What verl's trainer finds in its store, of one group of responses."""
    import transfer_queue
    import verl
    from hydra import compose, initialize_config_dir
    from verl.experimental.agent_loop import AgentLoopWorker
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
    from verl.workers.rollout.replica import TokenOutput

    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        asked = {
            "actor_rollout_ref.model.path": models / "policy",
            "reward.reward_manager.name": "tokengrain_tokens",
            "reward.custom_reward_function.path": models / "score.py",
            "actor_rollout_ref.rollout.name": "vllm",
        }
        made = compose("ppo_trainer", overrides=[f"{name}={value}" for name, value in asked.items()])
    judge, left, stored = RewardLoopWorker(made), list(responses), []

    class Server:
        async def generate(self, **_: Any) -> TokenOutput:
            return TokenOutput(token_ids=left.pop(0))

    async def put(**given: Any) -> None:
        stored.append(given["fields"])

    monkeypatch.setattr(transfer_queue, "async_kv_batch_put", put)
    handle = SimpleNamespace(compute_score=SimpleNamespace(remote=judge.compute_score))
    kind: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class
    worker = object.__new__(kind)
    AgentLoopWorker.__init__(worker, made, Server(), reward_loop_worker_handles=[handle])  # without a store
    row = {"raw_prompt": [{"role": "user", "content": PROMPT}], "uid": "u", "global_steps": 1, "data_source": "x"}
    row |= {"reward_model": {"ground_truth": "3"}, "extra_info": {}, "index": 0}

    async def run() -> None:
        trajectory = {"step": 1, "sample_index": 0, "rollout_n": 0, "validate": False}
        for session, _ in enumerate(responses):
            await worker._run_agent_loop({}, trajectory, agent_name=agent, trace=False, session_id=session, **row)

    judge.loop.run_until_complete(run())
    return stored


RESPONSES = [[40, 41, 42, 2], [50, 2], [60, 61, 62, 63, 64]]
SOURCES = {
    "Q-RM": ({"name": "reward_model", "model": "reward"}, 1.0),
    "RTO": ({"name": "guide", "model": "guide", "reference": "policy", "beta": 0.05, "clip": 0.02}, 0.0),
}


@pytest.mark.parametrize("agent", ["tokengrain_single_turn", "tokengrain_tool"])
@pytest.mark.parametrize("source", SOURCES)
def test_token_rewards_reach_the_advantages(
    core: Any, source: str, agent: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy
    from tensordict import TensorDict
    from verl import DataProto
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    given, outcome = SOURCES[source]
    folders = {name: str(models / given[name]) for name in ("model", "reference") if name in given}
    own = {"token_rewards": {"credit": {**given, **folders}, "outcome": outcome}}
    monkeypatch.setenv("TOKENGRAIN_VERL", json.dumps(own))
    stored = from_agent_loop(models, agent, RESPONSES, monkeypatch)
    # The same credit, asked of the same completions by tokengrain.
    load = load_trained_reward_model if source == "Q-RM" else AutoModelForCausalLM.from_pretrained
    credit = make_credit(**{**given, **{name: load(folder).eval() for name, folder in folders.items()}})
    prompt = stored[0]["prompts"][0].tolist()
    samples = [Sample(prompt, [Completion(ids)]) for ids in RESPONSES]
    expected = list(credit(batch := TokenBatch.from_samples(samples)).split(batch.segments.lengths.tolist()))
    for field, values, ids in zip(stored, expected, RESPONSES, strict=True):
        values[-1] += 0.25 * outcome
        assert field["responses"][0].tolist() == ids
        torch.testing.assert_close(field["rm_scores"][0], values, rtol=1e-4, atol=1e-5)
        assert "tokengrain_token_rewards" not in field["extra_fields"][0]["reward_extra_info"]  # it is no metric
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    rewards, mask = (pad([field[name][0] for field in stored]) for name in ("rm_scores", "response_mask"))
    data = DataProto(batch=TensorDict({"token_level_rewards": rewards, "response_mask": mask}, batch_size=3))
    data.non_tensor_batch["uid"] = numpy.array(["u"] * 3, dtype=object)
    keys = [f"u_{session}_0" for session in range(3)]
    found = compute_advantage_for_multi_trajectories(data, keys, adv_estimator="tokengrain_tokens")
    flat = torch.cat(expected)
    want = (flat - flat.mean()) / flat.std(correction=0)
    torch.testing.assert_close(found.batch["advantages"][mask.bool()], want, rtol=1e-4, atol=1e-4)
    assert not found.batch["advantages"][~mask.bool()].any()


def test_tokens_of_a_tool_earn_nothing_and_missing_ones_are_an_error(core: Any) -> None:
    from tokengrain_verl_tokens import OUTCOME, TOKENS, TokenRewarded

    def output(rewards: list[float], mask: Sequence[int] = (1, 0, 1)) -> Any:
        extra = {"reward_extra_info": {"acc": 1.0, TOKENS: rewards, OUTCOME: 10.0}}
        return TokenRewarded(
            prompt_ids=[1],
            response_ids=[5, 6, 7],
            response_mask=list(mask),
            reward_score=9.0,
            metrics={},
            extra_fields=extra,
        )

    found = output([1.0, 2.0, 3.0]).as_dict()
    assert found["rm_scores"].tolist() == [1.0, 0.0, 13.0]
    assert found["extra_fields"]["reward_extra_info"] == {"acc": 1.0}
    assert output([1.0, 2.0, 3.0], (1, 1, 0)).as_dict()["rm_scores"].tolist() == [1.0, 12.0, 0.0], "verl's own is kept"
    with pytest.raises(RolloutError, match="2 token rewards for a response of 3 tokens"):
        output([1.0, 2.0]).as_dict()


def test_advantages_of_tokens(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate, mask = core.get_adv_estimator_fn("tokengrain_tokens"), torch.tensor([[1, 1, 1], [1, 1, 0]])
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 4.0, 99.0]])
    monkeypatch.setenv("TOKENGRAIN_VERL", '{"tokens": {"scaling": "none", "rescore_last": true}}')
    found, _ = estimate(token_level_rewards=rewards, response_mask=mask)
    assert found.tolist() == [[1.0, 2.0, 3.0], [0.0, 2.0, 0.0]]
    monkeypatch.setenv("TOKENGRAIN_VERL", '{"tokens": {"scalling": "none"}}')
    with pytest.raises(RecipeError, match="unknown setting 'scalling'; did you mean 'scaling'"):
        estimate(token_level_rewards=rewards, response_mask=mask)


def test_a_worker_of_ray_has_it(core: Any) -> None:
    import ray

    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20)
    try:

        @ray.remote
        def names() -> list[str]:
            import verl  # noqa: F401
            from verl.experimental.agent_loop.agent_loop import _agent_loop_registry as loops
            from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER
            from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

            known = (POLICY_LOSS_REGISTRY, ADV_ESTIMATOR_REGISTRY, REWARD_MANAGER, loops)
            return [name for one in known for name in sorted(one) if name.startswith("tokengrain")]

        names_of_losses = sorted(f"tokengrain_{name}" for name in LOSSES)
        others = ["group", "tokens", "tokens", "single_turn", "tool"]
        assert ray.get(names.remote(), timeout=900) == [*names_of_losses, *(f"tokengrain_{name}" for name in others)]
    finally:
        ray.shutdown()
