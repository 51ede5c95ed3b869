"""What is logged about a rollout, over all ranks; and `rollouts.jsonl`, some of its completions token by token."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokengrain.data.tokens import token_texts
from tokengrain.errors import read_log, write_text
from tokengrain.method import Rollout
from tokengrain.methods._clipped import kl_estimate, sampler_mismatch
from tokengrain.methods._shaping import GroupStatistics
from tokengrain.rewards.suite import RewardResult
from tokengrain.rollout.sampler import Rollouts
from tokengrain.training.checkpoint import append_text
from tokengrain.training.step import MicroRecord, wide

PHASES = ("rollout", "reward", "scoring", "credit")


@dataclass
class RolloutStats:
    """What one rank sampled for a rollout, filtered prompts included: plain lists, one entry per completion."""

    lengths: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    total: list[float] = field(default_factory=list)  # sums of rewards; NaN where there is no score
    correct: list[float] = field(default_factory=list)
    by_name: dict[str, list[float]] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)  # where a column names them
    counts: dict[str, float] = field(default_factory=dict)
    context: int = 0  # tokens that completions only share with others they branch off from; they were drawn once
    prompts: int = 0
    informative: int = 0  # prompts whose completions earned different rewards
    failures: int = 0
    refills: int = 0  # rounds of sampling after the first
    stale: int | None = None  # completions of weights before the last update; None: sampling is not ahead
    sampling_seconds: float = 0.0  # as the sampler measured it
    sampler: dict[str, float] = field(default_factory=dict)  # what it said of itself, in the last round
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def spoken(self) -> str:
        """How many completions were right, and how many cut."""
        known = [one for one in self.correct if one == one]
        right = f"{sum(known):.0f} of {len(known)} completions were correct, " if known else ""
        return f"{right}{sum(self.truncated)} of {len(self.truncated)} were cut at max_new_tokens"

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time that the block takes to a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def add(self, sampled: Rollouts, rollout: Rollout, result: RewardResult | None, task_column: str | None) -> None:
        self.lengths += [len(c.ids) for c in sampled.completions]
        self.context += sum(c.context for c in sampled.completions)
        self.truncated += [c.truncated for c in sampled.completions]
        self.prompts += len(sampled.prompts)
        self.sampling_seconds += sampled.seconds
        self.sampler |= sampled.metrics
        if result is None:
            return
        self.total += result.total.tolist()
        if task_column is not None:
            self.tasks += [str(sampled.prompts[g].raw[task_column]) for g in sampled.group]
        if rollout.correct is not None:
            self.correct += rollout.correct.tolist()
        for name, values in result.by_name.items():
            self.by_name.setdefault(name, []).extend(values.tolist())
        for name, value in result.counts.items():
            self.counts[name] = self.counts.get(name, 0.0) + value
        self.failures += len(result.failures)
        self.informative += int(GroupStatistics(result.total.double(), rollout.group.cpu()).varied.sum())


def rollout_metrics(
    stats: RolloutStats, rollout: Rollout, keep: Tensor, exchange: Callable[[Any], list[Any]]
) -> dict[str, float]:
    """Every number of a finished rollout, the same on all ranks, which all call this; `keep`: bool `[G]`."""
    scored = "old_logps" in rollout.quantities
    own: dict[str, Any] = {"stats": stats, "sums": {}, "mismatch": {}, "kept": int(keep.sum())}
    own["credit"] = {name: (value, 1.0) for name, value in rollout.metrics.items()}
    if scored:
        own["sums"] = rollout_sums(rollout, keep[rollout.group])
    if scored and "raw_logps" in rollout.quantities:
        logps, old_logps = rollout.quantities["raw_logps"], rollout.quantity("old_logps")
        own["mismatch"] = sampler_mismatch(logps, old_logps, rollout.segments)
    ranks = exchange(own)
    metrics = sampled_metrics([r["stats"] for r in ranks])
    metrics["rollout/prompts_kept"] = float(sum(r["kept"] for r in ranks))
    metrics |= summed([r["sums"] for r in ranks]) | joined_mismatch([r["mismatch"] for r in ranks])
    metrics |= summed([r["credit"] for r in ranks])
    return metrics | {f"seconds/{name}": max(r["stats"].seconds[name] for r in ranks) for name in stats.seconds}


def sampled_metrics(parts: Sequence[RolloutStats]) -> dict[str, float]:
    lengths = torch.tensor([n for part in parts for n in part.lengths], dtype=torch.float64)
    tokens = float(lengths.sum()) - sum(part.context for part in parts)
    metrics = {
        "rollout/prompts": float(sum(part.prompts for part in parts)),
        "rollout/completions": float(len(lengths)),
        "rollout/refills": float(parts[0].refills),
        "rollout/tokens": tokens,
        "rollout/length": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated": _share([t for part in parts for t in part.truncated]),
        # Ranks sample at the same time.
        "rollout/tokens_per_second": tokens / max(max(part.sampling_seconds for part in parts), 1e-9),
    }
    metrics |= summed([{name: (value, 1.0) for name, value in part.sampler.items()} for part in parts])
    if parts[0].stale is not None:
        metrics["rollout/staleness"] = sum(part.stale or 0 for part in parts) / len(lengths)
    if not any(part.total for part in parts):
        return metrics
    metrics |= _moments("reward", [r for part in parts for r in part.total])
    for name in parts[0].by_name:
        metrics |= _moments(f"reward/{name}", [r for part in parts for r in part.by_name.get(name, [])])
    if known := [c for part in parts for c in part.correct if c == c]:
        metrics["reward/correct"] = _share(known)
    metrics |= _by_task(parts)
    metrics["reward/invalid"] = _share([r != r for part in parts for r in part.total])
    metrics["reward/failures"] = float(sum(part.failures for part in parts))
    for name in parts[0].counts:
        metrics[f"reward/{name}"] = sum(part.counts.get(name, 0.0) for part in parts)
    metrics["rollout/informative"] = sum(part.informative for part in parts) / metrics["rollout/prompts"]
    return metrics


def _by_task(parts: Sequence[RolloutStats]) -> dict[str, float]:
    """Completions of each task, and the means of what they earned, where it is known."""
    found: dict[str, float] = {}
    tasks = [task for part in parts for task in part.tasks]
    columns = {name: [v for part in parts for v in getattr(part, name)] for name in ("total", "correct")}
    for task in sorted(set(tasks)):
        found[f"task/{task}/completions"] = float(tasks.count(task))
        for name, values in columns.items():
            if known := [v for t, v in zip(tasks, values) if t == task and v == v]:
                found[f"task/{task}/{'reward' if name == 'total' else name}"] = _share(known)
    return found


def _share(flags: Sequence[float]) -> float:
    return sum(flags) / max(len(flags), 1)


def _moments(name: str, values: list[float]) -> dict[str, float]:
    """Mean and population deviation of the numbers that are there; NaN of nothing is not logged."""
    known = torch.tensor([v for v in values if v == v], dtype=torch.float64)
    found = {"mean": float(known.mean()), "std": float(known.std(correction=0))} if known.numel() else {}
    return {f"{name}/{which}": number for which, number in found.items()}


def rollout_sums(rollout: Rollout, keep: Tensor) -> dict[str, tuple[float, float]]:
    """Of one rank's completions to train on (`keep`, bool `[C]`): (sum, weight) by name, to be added up over ranks.

    `rollout/utilisation`: share of completions with an advantage other than 0; entropy and k3: nats per token.
    """
    sums: dict[str, tuple[float, float]] = {}
    if rollout.advantages is not None:
        signal = (rollout.segments.max(rollout.advantages.abs()) > 0) & keep
        sums["rollout/utilisation"] = (float(signal.sum()), float(keep.sum()))
    tokens, nats = rollout.broadcast(keep), {}
    if "entropy" in rollout.quantities:
        nats["rollout/entropy"] = wide(rollout.quantities["entropy"][tokens])
    if "ref_logps" in rollout.quantities:
        logps, ref_logps = wide(rollout.quantity("old_logps")), wide(rollout.quantities["ref_logps"])
        nats["rollout/kl_ref"] = kl_estimate(logps, ref_logps, "k3")[tokens]
    return sums | {name: (float(values.sum()), float(values.numel())) for name, values in nats.items()}


def summed(parts: Sequence[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Weighted means of what `rollout_sums` gave on all ranks."""
    found = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        sums, weights = zip(*(part[name] for part in parts if name in part), strict=True)
        if sum(weights):
            found[name] = sum(sums) / sum(weights)
    return found


def joined_mismatch(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mismatch over ranks: extremes of extremes, means of means."""
    extremes = {"max_abs": max, "max_ratio": max, "max_sequence_ratio": max, "min_ratio": min}
    names = dict.fromkeys(name for part in parts for name in part)
    values = {name: [part[name] for part in parts if name in part] for name in names}
    return {name: extremes.get(name.removeprefix("mismatch/"), _share)(found) for name, found in values.items()}


# ---- `rollouts.jsonl`: a few completions of some rollouts, with the numbers of every token, for the report ----

COLUMNS = ("entropy", "sampling_logps", "old_logps", "ref_logps", "thr")
UPDATED = ("ratio", "clipped")
DIGITS = 5


class RolloutRecord:
    """Collects `count` completions of every `every`-th rollout and writes them when it is used up, one line each.

    A line has rollout, step (optimiser steps before it), weights (of a server: the version that it had), row,
    completion (index in its group), prompt_ids, ids; with a tokenizer prompt, text and tokens (text of each id);
    truncated, reward (the sum), rewards (by name); per token the `COLUMNS` that are known; and of objectives that have
    them ratio (of the policy to the one that sampled, at the completion's last update before the optimiser step) and
    clipped (-1, 0, 1).
    """

    def __init__(self, path: Path, tokenizer: Any, *, count: int, every: int) -> None:
        self.path, self.tokenizer, self.count, self.every = path, tokenizer, count, every
        self.pending: list[dict[str, Any]] = []

    def begin(self, rollout: Rollout, keep: Tensor, optimiser_step: int, version: float | None = None) -> None:
        """Take completions of one prompt; of a large group the best and the worst.

        It is the last prompt whose completions earned credit, else the last one: the first is updated while the policy
        is still the one that sampled it, when all ratios are 1.
        """
        self.pending = []
        if not self.count or rollout.index % self.every or not bool(keep.any()):
            return
        earned = torch.zeros_like(keep)
        if rollout.advantages is not None:
            earned[rollout.group[rollout.segments.ids[rollout.advantages != 0]]] = True
        learned = keep & earned
        prompt = int((learned if bool(learned.any()) else keep).nonzero()[-1])
        places = (rollout.group == prompt).nonzero()[:, 0].tolist()
        first, total = places[0], rollout.total.nan_to_num(nan=0.0)
        if len(places) > self.count:
            order = sorted(places, key=lambda c: (-float(total[c]), c))
            half = (self.count + 1) // 2
            places = sorted(order[:half] + (order[half - self.count :] if self.count > half else []))
        for completion in places:
            entry = {"rollout": rollout.index, "step": optimiser_step, **self._of(rollout, prompt, completion)}
            entry |= {} if version is None else {"weights": int(version)}
            self.pending.append({**entry, "completion": completion - first})

    def _of(self, rollout: Rollout, prompt: int, completion: int) -> dict[str, Any]:
        prompt_ids, ids = rollout.batch.prompt(prompt).tolist(), rollout.batch.completion(completion).tolist()
        # What a branch shares with the completion that it leaves was not drawn for it: it is part of what came before.
        context = len(ids) - int(rollout.segments.lengths[completion])
        prompt_ids, ids = prompt_ids + ids[:context], ids[context:]
        entry: dict[str, Any] = {"row": rollout.prompt_ids[prompt], "prompt_ids": prompt_ids, "ids": ids}
        if self.tokenizer is not None:
            entry["prompt"] = self.tokenizer.decode(prompt_ids)
            entry["text"] = self.tokenizer.decode(ids)
            entry["tokens"] = token_texts(self.tokenizer, ids)
        entry["truncated"] = bool(rollout.truncated[completion])
        entry["reward"] = _number(rollout.total[completion])
        entry["rewards"] = {name: _number(values[completion]) for name, values in rollout.by_name.items()}
        start, end = rollout.segments.offsets[completion : completion + 2].tolist()
        columns = {name: rollout.quantities.get(name) for name in COLUMNS}
        columns |= {name: getattr(rollout, name) for name in ("advantages", "weights", "token_rewards")}
        return entry | {name: _rounded(values[start:end]) for name, values in columns.items() if values is not None}

    def update(self, records: Sequence[MicroRecord]) -> None:
        """Take ratio and clipped tokens from the micro-batches of an optimiser step."""
        if not self.pending:
            return
        rows = {entry["row"] for entry in self.pending}
        for record in records:
            tokens = {name: record.output.tokens[name] for name in UPDATED if name in record.output.tokens}
            if not tokens:
                continue
            batch = record.batch
            for completion, group in enumerate(batch.group.tolist()):
                if batch.rows[group] not in rows:
                    continue
                start, end = batch.segments.offsets[completion : completion + 2].tolist()
                # By ids: masked completions are missing, and the prompt may stand in the rollout a second time.
                ids = batch.labels[start:end].tolist()
                for entry in self.pending:
                    if (entry["row"], entry["ids"]) == (batch.rows[group], ids):
                        entry |= {name: _rounded(values[start:end]) for name, values in tokens.items()}

    def write(self) -> None:
        """Append what is pending. Raises `RunError` if it cannot be written."""
        # ASCII: a completion may have any character in it, and some of them (U+2028) end a line for some readers.
        lines = "".join(json.dumps(entry) + "\n" for entry in self.pending)
        self.pending = []
        if lines:
            append_text(self.path, lines)

    def restart(self, rollouts: int, pending: Sequence[dict[str, Any]] = ()) -> None:
        """Keep what rollouts before number `rollouts` wrote, except that of the one that is `pending`."""
        self.pending = [dict(entry) for entry in pending]
        if not self.path.exists():
            return
        under_way = {entry["rollout"] for entry in self.pending}
        kept = [e for e in read_log(self.path) if e["rollout"] < rollouts and e["rollout"] not in under_way]
        write_text(self.path, "".join(json.dumps(e) + "\n" for e in kept))


def _rounded(values: Tensor) -> list[float]:
    return [round(v, DIGITS) for v in values.detach().to(torch.float64).cpu().tolist()]


def _number(value: Tensor) -> float | None:
    number = float(value)
    return round(number, DIGITS) if number == number else None
