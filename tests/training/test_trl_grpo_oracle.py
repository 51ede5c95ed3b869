"""Independent oracle: TRL's GRPOTrainer, given the same rollouts, has the same quantities, loss and gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.training.test_trl_oracle import tokenizer
from tests.training.tiny import make_samples, tiny_llama
from tokengrain.batch import Sample, TokenBatch
from tokengrain.errors import read_log
from tokengrain.loss import Counts, LossOutput, make_normaliser
from tokengrain.method import make_objective
from tokengrain.methods.grpo import group_advantages, grpo_loss
from tokengrain.methods.gspo import gspo_loss
from tokengrain.rollout.sampler import PromptItem, Rollouts, SampledCompletion
from tokengrain.scoring.score import score
from tokengrain.training.config import OnlineConfig
from tokengrain.training.online import OnlineTrainer

pytest.importorskip("trl")

PROMPTS, GENERATIONS, MAX_LENGTH = 4, 4, 12
TRL_EPS = 1e-4
TOLERANCE = 1e-5
ROWS = [{"prompt": f"the cat {i}"} for i in range(PROMPTS)]  # TRL wants texts; the rollout says what their ids are


@dataclass(frozen=True)
class Case:
    """One objective as TRL's settings and as ours.

    Attributes:
        trl: keys of GRPOConfig.
        ours: settings of the loss function; normaliser: what makes a scalar of its losses.
        micro_batches: of both sides; their losses and gradients are added up.
    """

    trl: dict[str, Any]
    ours: dict[str, Any]
    normaliser: str = "mean"
    loss: Callable[..., LossOutput] = grpo_loss
    scale: str = "group"
    micro_batches: int = 1

    @property
    def temperature(self) -> float:
        return float(self.trl.get("temperature", 1.0))


TOKEN_MEAN: dict[str, Any] = {"reduction": "sum"}
CASES = {
    "grpo": Case({"loss_type": "grpo"}, {}),
    "grpo in micro-batches": Case({"loss_type": "grpo"}, {}, micro_batches=2),
    "grpo with k3 KL": Case(
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False}, {"beta": 0.3, "kl": "k3"}
    ),
    "grpo with weighed KL": Case(
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": True},
        {"beta": 0.3, "kl": "k3", "kl_importance": True},
    ),
    "grpo at temperature 0.7": Case(
        {"loss_type": "grpo", "temperature": 0.7, "beta": 0.3, "use_bias_correction_kl": False}, {"beta": 0.3}
    ),
    "dual clip": Case({"loss_type": "grpo", "delta": 1.5}, {"ratio_cap": 1.5}),
    "bnpo": Case({"loss_type": "bnpo"}, TOKEN_MEAN, "token_mean"),
    "dapo": Case(
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
        {**TOKEN_MEAN, "epsilon": 0.2, "epsilon_high": 0.28},
        "token_mean",
        micro_batches=2,
    ),
    "dapo with k3 KL": Case(
        {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.1, "use_bias_correction_kl": False},
        {**TOKEN_MEAN, "epsilon_high": 0.28, "beta": 0.1},
        "token_mean",
    ),
    "dr_grpo": Case(
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"reduction": "constant", "max_length": MAX_LENGTH},
        scale="none",
    ),
    "batch scaling": Case({"loss_type": "grpo", "scale_rewards": "batch"}, {}, scale="batch"),
    "gspo": Case(
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
        {"epsilon": 0.02, "epsilon_high": 0.03},
        loss=gspo_loss,
    ),
    "gspo with k3 KL": Case(
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.02,
            "epsilon_high": 0.03,
            "beta": 0.2,
            "use_bias_correction_kl": False,
        },
        {"epsilon": 0.02, "epsilon_high": 0.03, "beta": 0.2},
        loss=gspo_loss,
    ),
}


def rollouts(count: int = 1) -> list[TokenBatch]:
    """Batches of the same prompts with other completions, of unequal lengths."""
    samples = make_samples(PROMPTS, completions=GENERATIONS * count)
    cuts = [slice(i * GENERATIONS, (i + 1) * GENERATIONS) for i in range(count)]
    return [TokenBatch.from_samples([Sample(s.prompt_ids, s.completions[c], s.row) for s in samples]) for c in cuts]


def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """A number that depends on every token; some completions of a prompt earn the same."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def completions_of(batch: TokenBatch) -> list[list[int]]:
    return [batch.completion(c).tolist() for c in range(batch.n_completions)]


def perturb(model: torch.nn.Module, seed: int, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)


def trl_trainer(folder: Path, batches: Sequence[TokenBatch], parts: int = 1, **settings: Any) -> Any:
    """TRL's trainer, whose rollouts are `batches`, with a reference saved in `folder`."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    tiny_llama().save_pretrained(folder / "start")
    config = GRPOConfig(
        str(folder / "trl"),
        per_device_train_batch_size=PROMPTS * GENERATIONS // parts,
        gradient_accumulation_steps=parts,
        steps_per_generation=parts,
        num_generations=GENERATIONS,
        max_completion_length=MAX_LENGTH,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        shuffle_dataset=False,
        **{"num_iterations": 2, "beta": 0.0, **settings},
    )
    left = iter(batches)

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        batch = next(left)
        return {
            "prompt_ids": [batch.prompt(int(g)).tolist() for g in batch.group],
            "completion_ids": completions_of(batch),
            "logprobs": None,
        }

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rollout_func is called experimental
        return GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "start"),
            args=config,
            reward_funcs=reward,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer(),
            rollout_func=rollout,
        )


def relative(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", CASES)
def test_quantities_loss_and_gradient(name: str, tmp_path: Path) -> None:
    case, (batch,) = CASES[name], rollouts()
    trainer = trl_trainer(tmp_path, [batch], case.micro_batches, **case.trl)
    trainer.current_gradient_accumulation_steps = case.micro_batches  # set by its training loop
    model, mine = trainer.model.train(), tiny_llama()
    for policy in (model, mine):
        perturb(policy, 1)
    inputs = trainer._generate_and_score_completions([ROWS[int(g)] for g in batch.group])
    counted = inputs["completion_mask"].bool()

    heat = case.temperature
    old, ref = (score(m, batch, temperature=heat).logps.detach() for m in (mine, tiny_llama()))
    rewards = torch.tensor(reward(completions_of(batch)))
    advantages = group_advantages(rewards, batch.group, scale=case.scale, eps=TRL_EPS)
    torch.testing.assert_close(advantages, inputs["advantages"], rtol=TOLERANCE, atol=1e-6)
    assert relative(old, inputs["old_per_token_logps"][counted]) < TOLERANCE
    if case.trl.get("beta"):
        assert relative(ref, inputs["ref_per_token_logps"][counted]) < TOLERANCE

    for policy in (model, mine):
        perturb(policy, 2, 0.03)  # an update later: ratios are not 1
    theirs, size = 0.0, batch.n_completions // case.micro_batches
    for first in range(0, batch.n_completions, size):
        piece = {k: v[first : first + size] if v.dim() else v for k, v in inputs.items()}
        loss = trainer._compute_loss(model, piece)
        loss.backward()
        theirs += loss.item()

    columns = {"old_logps": old, "ref_logps": ref, "advantages": batch.segments.broadcast(advantages)}
    given = [c for c in columns if c != "ref_logps" or case.trl.get("beta")]
    counts = Counts.of(batch.segments, pairs=False, prompts=batch.n_prompts)
    ours, clipped = 0.0, 0.0
    for micro in batch.with_columns(**columns).split(None, parts=case.micro_batches):
        quantities = {name: micro.columns[name] for name in given}
        output = case.loss(score(mine, micro, temperature=heat).logps, micro.segments, **quantities, **case.ours)
        share = make_normaliser(cast(Any, case.normaliser))(output, counts)
        share.backward()
        ours += share.item()
        clipped += float(output.metrics["clip/tokens"].sum())
    assert clipped > 0, "nothing was clipped: the case would not see a wrong bound"
    assert ours == pytest.approx(theirs, rel=TOLERANCE)
    for (where, p), q in zip(mine.named_parameters(), model.parameters(), strict=True):
        assert relative(p.grad, q.grad) < TOLERANCE, where
    norms = [torch.cat([p.grad.flatten() for p in m.parameters()]).norm() for m in (mine, model)]
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=TOLERANCE)


class Replay:
    """A sampler that gives stored rollouts, one after the other."""

    name = "replay"

    def __init__(self, batches: Sequence[TokenBatch]) -> None:
        self.left = iter(batches)

    def sample(self, prompts: Sequence[PromptItem], *, n: int, sampling: Any) -> Rollouts:
        batch = next(self.left)
        assert [p.ids for p in prompts] == [batch.prompt(i).tolist() for i in range(batch.n_prompts)]
        drawn = [SampledCompletion(ids, None, None, "stop") for ids in completions_of(batch)]
        return Rollouts(tuple(prompts), tuple(tuple(drawn[i : i + n]) for i in range(0, len(drawn), n)), sampling)

    def refresh(self, model_or_path: Any) -> None:
        """Nothing is drawn from a model."""


SCHEDULE: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "seed": 7,
}
EPOCHS, ROLLOUTS = 3, 2


@pytest.mark.parametrize(
    "name", ["grpo with weighed KL", "grpo at temperature 0.7", "dapo with k3 KL", "dr_grpo", "gspo"]
)
def test_every_step_of_a_run(name: str, tmp_path: Path) -> None:
    """Several rollouts with several updates on each, through both trainers' own loops."""
    case, batches = CASES[name], rollouts(ROLLOUTS)
    schedule = {**SCHEDULE, "max_steps": EPOCHS * ROLLOUTS}
    theirs = trl_trainer(tmp_path, batches, **{**schedule, **case.trl, "num_iterations": EPOCHS})
    theirs.train()
    trainer = OnlineTrainer(
        tiny_llama(),
        OnlineConfig(
            str(tmp_path / "ours"),
            prompts_per_rollout=PROMPTS,
            num_generations=GENERATIONS,
            rollout_epochs=EPOCHS,
            max_new_tokens=MAX_LENGTH,
            shuffle_prompts=False,
            normaliser=case.normaliser,
            temperature=case.temperature,
            logps_at_temperature=True,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            **schedule,
        ),
        objective=make_objective("gspo" if case.loss is gspo_loss else "grpo", **case.ours),
        rewards=reward,
        credit=[{"name": "group", "scale": case.scale, "eps": TRL_EPS}],
        sampler=Replay(batches),
        train_dataset=[PromptItem(batches[0].prompt(i).tolist(), row=i) for i in range(PROMPTS)],
        processing_class=tokenizer(),
    )
    trainer.train()
    wanted = steps(theirs.state.log_history)
    found = steps(read_log(tmp_path / "ours" / "log.jsonl"))
    assert len(found) == len(wanted) == EPOCHS * ROLLOUTS
    for number, (mine, trls) in enumerate(zip(found, wanted, strict=True), 1):
        assert mine == pytest.approx(trls, rel=5 * TOLERANCE, abs=1e-6), f"step {number}"
    assert abs(found[0][0] - found[-1][0]) > 1e-3
    for (where, p), q in zip(trainer.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=where)


def steps(entries: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(e["loss"], e["grad_norm"]) for e in entries if "loss" in e]
