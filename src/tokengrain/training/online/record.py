"""`rollouts.jsonl`: a few completions of some rollouts, with the numbers of every token, for the report.

One line per completion:
    rollout, step (optimiser steps before it), row, completion (index in its group), prompt_ids, ids, and where there is
    a tokenizer prompt, text and tokens (text of each id); truncated, reward (the sum), rewards (by name), and per token
    advantages, and where they are known entropy, sampling_logps, old_logps, ref_logps, weights, token_rewards, thr;
    ratio (of the policy to the one that sampled, at the completion's last update before the optimiser step) and
    clipped (-1, 0, 1) of objectives that have them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokengrain.files import read_log, write_text
from tokengrain.report.samples import token_texts
from tokengrain.training.callbacks import append_text
from tokengrain.training.online.step import RolloutStep
from tokengrain.training.steps import MicroRecord

COLUMNS = ("entropy", "sampling_logps", "old_logps", "ref_logps", "thr")
UPDATED = ("ratio", "clipped")
DIGITS = 5


class RolloutRecord:
    """Collects the completions of the rollout under way and writes them when it is used up.

    Args:
        path: of the file.
        tokenizer: for texts; None: ids only.
        count: completions per record; every: rollouts from one record to the next.
    """

    def __init__(self, path: Path, tokenizer: Any, *, count: int, every: int) -> None:
        self.path, self.tokenizer, self.count, self.every = path, tokenizer, count, every
        self.pending: list[dict[str, Any]] = []

    def begin(self, step: RolloutStep, keep: Tensor, optimiser_step: int) -> None:
        """Take completions of one prompt; of a large group the best and the worst.

        The last prompt of the rollout, because the first one's is updated while the policy is still the one that
        sampled it (all its ratios are 1); before it goes the last one whose completions earned credit.
        """
        self.pending = []
        if not self.count or step.index % self.every or not bool(keep.any()):
            return
        earned = torch.zeros_like(keep)
        if step.advantages is not None:
            earned[step.group[step.segments.ids[step.advantages != 0]]] = True
        learned = keep & earned
        prompt = int((learned if bool(learned.any()) else keep).nonzero()[-1])
        places = (step.group == prompt).nonzero()[:, 0].tolist()
        first, total = places[0], step.total.nan_to_num(nan=0.0)
        if len(places) > self.count:
            order = sorted(places, key=lambda c: (-float(total[c]), c))
            half = (self.count + 1) // 2
            places = sorted(order[:half] + (order[half - self.count :] if self.count > half else []))
        for completion in places:
            entry = {"rollout": step.index, "step": optimiser_step, **self._of(step, prompt, completion)}
            self.pending.append({**entry, "completion": completion - first})

    def _of(self, step: RolloutStep, prompt: int, completion: int) -> dict[str, Any]:
        prompt_ids, ids = step.batch.prompt(prompt).tolist(), step.batch.completion(completion).tolist()
        # What a branch shares with the completion that it leaves was not drawn for it: it is part of what came before.
        context = len(ids) - int(step.segments.lengths[completion])
        prompt_ids, ids = prompt_ids + ids[:context], ids[context:]
        entry: dict[str, Any] = {"row": step.prompt_ids[prompt], "prompt_ids": prompt_ids, "ids": ids}
        if self.tokenizer is not None:
            entry["prompt"] = self.tokenizer.decode(prompt_ids)
            entry["text"] = self.tokenizer.decode(ids)
            entry["tokens"] = token_texts(self.tokenizer, ids)
        entry["truncated"] = bool(step.truncated[completion])
        entry["reward"] = _number(step.total[completion])
        entry["rewards"] = {name: _number(values[completion]) for name, values in step.by_name.items()}
        start, end = step.segments.offsets[completion : completion + 2].tolist()
        columns = {name: step.quantities.get(name) for name in COLUMNS}
        columns |= {name: getattr(step, name) for name in ("advantages", "weights", "token_rewards")}
        return entry | {name: _rounded(values[start:end]) for name, values in columns.items() if values is not None}

    def update(self, records: Sequence[MicroRecord]) -> None:
        """Take ratio and clipped tokens from the micro-batches of an optimiser step."""
        if not self.pending:
            return
        wanted = {(entry["row"], entry["completion"]): entry for entry in self.pending}
        for record in (r for r in records if r.real):
            tokens = {name: record.output.tokens[name] for name in UPDATED if name in record.output.tokens}
            if not tokens:
                continue
            first: dict[int, int] = {}
            for completion, group in enumerate(record.group.tolist()):
                first.setdefault(group, completion)
                entry = wanted.get((record.rows[group], completion - first[group]))
                if entry is None:
                    continue
                start, end = record.segments.offsets[completion : completion + 2].tolist()
                # The prompt may stand in the rollout a second time, with other completions.
                if record.labels[start:end].tolist() == entry["ids"]:
                    entry |= {name: _rounded(values[start:end]) for name, values in tokens.items()}

    def write(self) -> None:
        """Append what is pending. Raises `RunError` if it cannot be written."""
        if not self.pending:
            return
        # ASCII: a completion may have any character in it, and some of them (U+2028) end a line for some readers.
        lines = "".join(json.dumps(entry) + "\n" for entry in self.pending)
        self.pending = []
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
