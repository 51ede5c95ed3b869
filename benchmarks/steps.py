"""One optimiser step of a preference method, in three implementations that share nothing but the input.

Each class builds its own policy and frozen reference from the same seed and offers `step() -> loss`:
reference forward, policy forward, loss, backward, AdamW step. Tokenisation, collation and logging are
outside all three, except what TRL's `training_step` does inside (its metrics).
"""

from __future__ import annotations

import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.setting import Setting, build_model, build_samples, word_tokenizer

LEARNING_RATE = 1e-5
BETA, ALPHA = 0.1, 0.5


def optimiser_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0)


class OursStep:
    """tokengrain: shared prompts, fused head, flat tensors."""

    name = "tokengrain"

    def __init__(self, setting: Setting, layout: str = "auto") -> None:
        from tokengrain.batch import TokenBatch
        from tokengrain.scoring import prepare
        from tokengrain.scoring.reference import FrozenReference

        self.policy = build_model(setting, setting.attention)
        prepare(self.policy, layout=layout)
        self.needs_kl = setting.method == "tdpo2"
        self.reference = FrozenReference(build_model(setting, setting.attention))
        self.batch = TokenBatch.from_samples(build_samples(setting)).to(setting.device)
        self.optimiser = optimiser_of(self.policy)

    def step(self) -> float:
        from tokengrain.objectives import dpo_loss, tdpo_loss
        from tokengrain.scoring import score

        batch = self.batch
        frozen = self.reference(batch, {"logps", "distribution"} if self.needs_kl else {"logps"})
        if self.needs_kl:
            scores = score(self.policy, batch, ("logps", "kl"), reference=frozen.distribution)
            output = tdpo_loss(
                scores.logps, batch.segments, ref_logps=frozen.logps, kl=scores.kl, beta=BETA, alpha=ALPHA
            )
        else:
            scores = score(self.policy, batch)
            output = dpo_loss(scores.logps, batch.segments, ref_logps=frozen.logps, beta=BETA)
        loss = output.losses.mean()
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()


class PlainStep:
    """What most code does: pad chosen and rejected into one batch, full logits, log-softmax, gather."""

    name = "plain transformers"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.policy = build_model(setting)
        self.reference = build_model(setting).eval().requires_grad_(False)
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
        with torch.no_grad():
            ref_full, ref_logps = self.quantities(self.reference)
            if self.setting.method == "dpo":
                del ref_full
        full, logps = self.quantities(self.policy)
        chosen, rejected = (logps - ref_logps).sum(1).chunk(2)
        margin = chosen - rejected
        if self.setting.method == "tdpo2":
            kl = (ref_full.exp() * (ref_full - full)).sum(-1) * self.inputs["counted"][:, 1:]
            kl_chosen, kl_rejected = kl.sum(1).chunk(2)
            margin = margin - ALPHA * (kl_rejected - kl_chosen.detach())
        loss = -F.logsigmoid(BETA * margin).mean()
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()


class TrlStep:
    """TRL's `DPOTrainer.training_step` at its fastest settings for this size: no gradient checkpointing."""

    name = "TRL"

    def __init__(self, setting: Setting) -> None:
        from datasets import Dataset
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
        self.policy = build_model(setting)
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
            model=self.policy,
            ref_model=build_model(setting),
            args=args,
            # The constructor wants text; the measured rows are token ids and go straight to its collator.
            train_dataset=Dataset.from_list([{"prompt": "w3 w4", "chosen": " w5", "rejected": " w6"}]),
            processing_class=word_tokenizer(setting.vocabulary),
        )
        self.optimiser = optimiser_of(self.policy)
        self.trainer.current_gradient_accumulation_steps = 1  # set by its training loop, which is not timed
        self.inputs = self.trainer.data_collator(rows)

    def step(self) -> float:
        loss = self.trainer.training_step(self.policy, dict(self.inputs), num_items_in_batch=None)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return float(loss)


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
