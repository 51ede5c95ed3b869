"""One optimiser step of a preference method, in three implementations that share nothing but the input.

Each class builds its own policy and frozen reference from the same seed and offers `step() -> loss`:
reference forward, policy forward, loss, backward, AdamW step. Tokenisation, collation and logging are
outside all three, except what TRL's `training_step` does inside (its metrics).
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from benchmarks.setting import Setting, build_model, build_policy, build_samples, lora_config, word_tokenizer
from tokengrain.batch import TokenBatch
from tokengrain.method import make_objective
from tokengrain.methods.aligndistil import ContrastiveTeacher
from tokengrain.scoring.prepare import prepare
from tokengrain.scoring.reference import AdapterOffReference, FrozenReference, Reference
from tokengrain.training.step import PreferenceLoss

LEARNING_RATE = 1e-5
BETA, ALPHA = 0.1, 0.5
HYPER: dict[str, dict[str, float]] = {
    "dpo": {"beta": BETA},
    "tdpo2": {"beta": BETA, "alpha": ALPHA},
    "rrpo": {"beta": BETA, "alpha": 0.05},
    "sepo": {"gamma": 2.1},
    "aligndistil": {"beta0": BETA},
}


def optimiser_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW as both trainers have it by default: fused."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


TEACHER = {"beta0": BETA, "r": 20.0}


class Step(ABC):
    """Reference forward, policy forward, loss, backward, AdamW, of a subclass that has `policy` and `optimiser`."""

    policy: Any
    optimiser: torch.optim.Optimizer

    @abstractmethod
    def loss(self) -> Tensor:
        """The loss of one step, with gradient."""

    def step(self) -> float:
        loss = self.loss()
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()


class OursStep:
    """tokengrain: shared prompts, fused head, flat tensors; the trainer's own path from batch to losses."""

    name = "tokengrain"

    def __init__(self, setting: Setting) -> None:
        self.policy = build_policy(setting, setting.attention)
        prepare(self.policy)
        objective = make_objective(setting.method, **HYPER[setting.method])
        needs = objective.needs
        frozen: list[Reference] = [FrozenReference(m) for m in other_models(setting, setting.attention)]
        frozen += [AdapterOffReference(self.policy)] if setting.lora else []
        taught = "teacher_kl" in needs
        self.loss = PreferenceLoss(
            objective,
            frozen[0] if needs & {"ref_logps", "kl"} else None,
            None,
            teacher=ContrastiveTeacher(target=frozen[0], contrast=frozen[1], **TEACHER) if taught else None,
        )
        self.batch = TokenBatch.from_samples(build_samples(setting)).to(setting.device)
        self.optimiser = optimiser_of(self.policy)

    def step(self) -> float:
        loss = self.loss(self.policy, self.batch).output.losses.mean()
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()


class PlainStep:
    """What most code does: pad chosen and rejected into one batch, full logits, log-softmax, gather."""

    name = "plain transformers"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.policy: Any = build_policy(setting)
        self.frozen = [m.eval().requires_grad_(False) for m in other_models(setting)]
        self.optimiser = optimiser_of(self.policy)
        self.inputs = {k: v.to(setting.device) for k, v in padded(setting).items()}

    def quantities(self, model: torch.nn.Module) -> tuple[Tensor, Tensor]:
        """Log-probabilities of all tokens `[2P, T-1, V]` and of the labels, masked `[2P, T-1]`."""
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logps = F.log_softmax(logits.float(), dim=-1)
        labels = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
        return logps, labels * self.inputs["counted"][:, 1:]

    def step(self) -> float:
        loss = self.distillation() if self.setting.method == "aligndistil" else self.margin()
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()

    def margin(self) -> Tensor:
        with torch.no_grad(), self.policy.disable_adapter() if self.setting.lora else nullcontext():
            ref_full, ref_logps = self.quantities(self.policy if self.setting.lora else self.frozen[0])
            if self.setting.method == "dpo":
                del ref_full
        full, logps = self.quantities(self.policy)
        chosen, rejected = (logps - ref_logps).sum(1).chunk(2)
        margin = chosen - rejected
        if self.setting.method == "tdpo2":
            kl = (ref_full.exp() * (ref_full - full)).sum(-1) * self.inputs["counted"][:, 1:]
            kl_chosen, kl_rejected = kl.sum(1).chunk(2)
            margin = margin - ALPHA * (kl_rejected - kl_chosen.detach())
        return -F.logsigmoid(BETA * margin).mean()

    def distillation(self) -> Tensor:
        """AlignDistil as its authors write it, with the half in the total variation."""
        counted = self.inputs["counted"][:, 1:]
        with torch.no_grad():
            target, contrast = (self.quantities(model)[0] for model in self.frozen)
            alpha = TEACHER["r"] * 0.5 * (target.exp() - contrast.exp()).abs().sum(-1) + 1e-3
            teacher = (target + alpha[..., None] * (target - contrast)).log_softmax(-1)
        full, _ = self.quantities(self.policy)
        kl = (full.exp() * (full - teacher)).sum(-1)
        return ((BETA / alpha * kl * counted).sum(1) / counted.sum(1)).mean()


class TrlStep:
    """TRL's `DPOTrainer.training_step` at its fastest settings for this size: no gradient checkpointing."""

    name = "TRL"

    def __init__(self, setting: Setting) -> None:
        from trl import DPOConfig, DPOTrainer

        if setting.method != "dpo":
            raise ValueError(f"TRL has no {setting.method}; compare it with --peer plain")
        samples = build_samples(setting)
        rows = [
            {
                "prompt_ids": s.prompt_ids,
                "chosen_ids": s.completions[0].ids,
                "rejected_ids": s.completions[1].ids,
            }
            for s in samples
        ]
        adapted = build_policy(setting) if setting.lora else None
        args = DPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=setting.pairs,
            beta=BETA,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=setting.device == "cpu",
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            lr_scheduler_type="constant",
            learning_rate=LEARNING_RATE,
        )
        self.trainer = DPOTrainer(
            model=build_model(setting),
            ref_model=None if adapted else build_model(setting),  # of adapters: the model without them
            peft_config=lora_config(setting) if adapted else None,
            args=args,
            # The constructor wants text; the measured rows are token ids and go straight to its collator.
            train_dataset=Dataset.from_list([{"prompt": "w3 w4", "chosen": " w5", "rejected": " w6"}]),
            processing_class=word_tokenizer(setting.vocabulary),
        )
        self.policy = self.trainer.model
        if adapted:  # start where the others do
            self.policy.load_state_dict(adapted.state_dict())
        self.optimiser = optimiser_of(self.policy)
        self.trainer.current_gradient_accumulation_steps = 1  # set by its training loop, which is not timed
        self.inputs = self.trainer.data_collator(rows)

    def step(self) -> float:
        loss = self.trainer.training_step(self.policy, dict(self.inputs), num_items_in_batch=None)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return float(loss)


def other_models(setting: Setting, attention: str = "sdpa") -> list[torch.nn.Module]:
    """The frozen models: the reference, equal to the policy; for aligndistil two teachers with a head of their own.

    With adapters there is none: the reference is the policy without them.
    """
    if setting.method == "sepo" or setting.lora:
        return []
    models = [build_model(setting, attention) for _ in range(2 if setting.method == "aligndistil" else 1)]
    if setting.method == "aligndistil":
        for seed, model in enumerate(models):
            generator = torch.Generator(model.device).manual_seed(seed)
            weight = model.get_output_embeddings().weight
            with torch.no_grad():
                weight += 0.02 * torch.randn(weight.shape, generator=generator, device=weight.device).to(weight)
    return models


STEPS = {"ours": OursStep, "plain": PlainStep, "trl": TrlStep}


def padded(setting: Setting) -> dict[str, Tensor]:
    """Chosen rows, then rejected rows, right-padded to the longest."""
    samples = build_samples(setting)
    rows = [(s.prompt_ids, s.completions[side].ids) for side in (0, 1) for s in samples]
    width = max(len(p) + len(c) for p, c in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention, counted = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        attention[row, :end] = 1
        counted[row, len(prompt) : end] = 1
    return {"input_ids": ids, "attention_mask": attention, "counted": counted}
