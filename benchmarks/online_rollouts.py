"""Tokens per second of sampling beside a bare `generate`, and where the time of a whole online step goes."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import GenerationConfig, TrainerCallback

from benchmarks.online_updates import BETA, OnlineSetting, build_rollout
from benchmarks.setting import build_model, word_tokenizer
from benchmarks.timing import Timing, ratio, synchronise
from tokengrain.errors import read_log
from tokengrain.method import make_objective
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import PromptItem, SamplingConfig
from tokengrain.training.config import OnlineConfig
from tokengrain.training.online import OnlineTrainer

PHASES = ("rollout", "reward", "scoring", "credit", "update")


def prompts_of(setting: OnlineSetting, count: int | None = None) -> list[PromptItem]:
    """Random prompts."""
    batch, _ = build_rollout(setting.with_(prompts=count or setting.prompts, minibatches=1))
    return [PromptItem(batch.prompt(p).tolist(), row=p) for p in range(batch.n_prompts)]


class OursRollout:
    """`HFGenerate` on the benchmark's llama; every completion has `completion[1]` tokens."""

    name = "tokengrain HFGenerate"

    def __init__(self, setting: OnlineSetting) -> None:
        self.setting, self.prompts = setting, prompts_of(setting)
        self.sampler = HFGenerate(build_model(setting.model))
        self.seed = 0

    def sample(self) -> int:
        """Completion tokens drawn."""
        self.seed += 1
        sampling = SamplingConfig(max_new_tokens=self.setting.model.completion[1], stop_ids=(), seed=self.seed)
        rollouts = self.sampler.sample(self.prompts, n=self.setting.generations, sampling=sampling)
        return sum(len(c.ids) for c in rollouts.completions)


class PlainRollout:
    """`model.generate` with samples of every prompt in one call, which is what most code does."""

    name = "bare generate"

    def __init__(self, setting: OnlineSetting) -> None:
        self.model: Any = build_model(setting.model).eval()
        self.model.generation_config.eos_token_id = None  # completions of full length, as ours
        prompts = prompts_of(setting)
        width = max(len(p.ids) for p in prompts)
        ids = torch.tensor([[0] * (width - len(p.ids)) + p.ids for p in prompts], device=setting.model.device)
        lengths = torch.tensor([len(p.ids) for p in prompts], device=ids.device)
        mask = (torch.arange(width, device=ids.device) >= width - lengths[:, None]).long()
        config = GenerationConfig(
            max_new_tokens=setting.model.completion[1],
            do_sample=True,
            top_k=0,
            num_return_sequences=setting.generations,
            pad_token_id=0,
        )
        self.inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "generation_config": config}

    def sample(self) -> int:
        """Completion tokens drawn."""
        with torch.no_grad():
            found = self.model.generate(**self.inputs)
        return found[:, self.inputs["input_ids"].shape[1] :].numel()


def rollout_speed(setting: OnlineSetting, repeats: int) -> dict[str, Any]:
    """Ours and bare `generate` in turn."""
    sides = [OursRollout(setting), PlainRollout(setting)]
    timings, tokens = [Timing(s.name, [], 0.0) for s in sides], [0, 0]
    for round_ in range(1 + repeats):
        for index, side in enumerate(sides):
            gc.collect()
            synchronise(setting.model.device)
            started = time.perf_counter()
            tokens[index] = side.sample()
            synchronise(setting.model.device)
            if round_:
                timings[index].seconds.append(time.perf_counter() - started)
    if tokens[0] != tokens[1]:
        raise RuntimeError(f"the sides drew {tokens} tokens; expected the same number")
    return {
        "setting": setting.label(),
        "tokens": tokens[0],
        "sides": [t.summary(tokens[0]) for t in timings],
        "faster_than": ratio(timings[1], timings[0]),
    }


def parity(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
    """A reward that half of all random completions earn; it asks for the texts, so that they are decoded."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def step_split(setting: OnlineSetting, rollouts: int, credit: tuple[str, ...] = ("group",)) -> dict[str, Any]:
    """Seconds of each phase of a rollout in `OnlineTrainer`, from its own log, and the wall clock beside them.

    Args:
        rollouts: after the first, which is left out.
        credit: names of rollout credits.
    """

    ends: list[float] = []

    class Clock(TrainerCallback):
        """When optimiser steps ended."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    steps = setting.minibatches
    with tempfile.TemporaryDirectory() as folder:
        trainer = OnlineTrainer(
            build_model(setting.model, setting.model.attention),
            OnlineConfig(
                folder,
                use_cpu=setting.model.device == "cpu",
                disable_tqdm=True,
                save_strategy="no",
                logging_steps=steps,
                max_steps=steps * (1 + rollouts),
                prompts_per_rollout=setting.prompts,
                num_generations=setting.generations,
                minibatches=steps,
                max_new_tokens=setting.model.completion[1],
                stop_ids=[],
            ),
            objective=make_objective("grpo", beta=BETA, kl_importance=True),
            rewards=parity,
            credit=list(credit),
            train_dataset=prompts_of(setting, 4 * setting.prompts),
            processing_class=word_tokenizer(setting.model.vocabulary),
            callbacks=[Clock()],
        )
        trainer.train()
        entries = [e for e in read_log(f"{folder}/log.jsonl") if "seconds/update" in e][1:]
    wall = [b - a for a, b in zip(ends[steps - 1 :: steps], ends[2 * steps - 1 :: steps], strict=False)]
    seconds = {name: statistics.median(e[f"seconds/{name}"] for e in entries) for name in PHASES}
    result = {"setting": setting.label(), "credit": list(credit), "wall_s": statistics.median(wall), "seconds": seconds}
    if "thr" in credit:
        result["thr_mixed"] = statistics.mean(e["thr/mixed"] for e in entries)
    return result


def thr_share(setting: OnlineSetting, repeats: int, rollouts: int) -> dict[str, Any]:
    """What THR adds to a step: its own time and that of the hidden states it needs, as a share of the step with it.

    Runs with and without it alternate; sampling, rewards and updates are the same work in both.
    """
    without, thr = [], []
    for _ in range(repeats):
        without.append(step_split(setting, rollouts))
        thr.append(step_split(setting, rollouts, ("group", "thr")))
    shares = []
    for plain, more in zip((r["seconds"] for r in without), (r["seconds"] for r in thr), strict=True):
        added = more["credit"] - plain["credit"] + more["scoring"] - plain["scoring"]
        shares.append(added / (sum(plain.values()) + added))
    return {
        "setting": setting.label(),
        "share": {"median": statistics.median(shares), "min": min(shares), "max": max(shares)},
        "mixed_groups": statistics.mean(r["thr_mixed"] for r in thr),
        "credit_s": statistics.median(r["seconds"]["credit"] for r in thr),
        "scoring_with_s": statistics.median(r["seconds"]["scoring"] for r in thr),
        "scoring_without_s": statistics.median(r["seconds"]["scoring"] for r in without),
        "step_without_s": statistics.median(sum(r["seconds"].values()) for r in without),
    }
