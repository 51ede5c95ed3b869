"""Time a DPO step of a T5 with several negatives a query against the same step written plainly, and its memory; and
search among docids against transformers' constrained beam search.

    python -m benchmarks.seq2seq_step
    python -m benchmarks.seq2seq_step --queries 8 --query 32-64 --docid 8-16

The plain step encodes the query once per docid and takes the softmax of all logits. Steps alternate in one process and
ratios are taken pair by pair, of seconds and of the process's CPU seconds, which other processes do not stretch. The
losses of the second step show that the work is the same.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Config, T5ForConditionalGeneration

from benchmarks.preference_step import _bounds
from benchmarks.steps import BETA, Step, optimiser_of
from benchmarks.timing import ResidentSampler, Timing, alternating, machine, ratio
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import write_json
from tokengrain.method import make_objective
from tokengrain.retrieval.search import Trie, search
from tokengrain.scoring.prepare import prepare
from tokengrain.scoring.reference import FrozenReference, disable_dropout
from tokengrain.training.step import PreferenceLoss


@dataclass(frozen=True)
class Setting:
    """What is measured; lengths in tokens, ranges inclusive."""

    queries: int = 4
    negatives: int = 8
    query: tuple[int, int] = (64, 128)
    docid: tuple[int, int] = (16, 24)
    vocabulary: int = 32_128
    hidden: int = 256
    layers: int = 6
    device: str = "cpu"
    seed: int = 0


def build_model(setting: Setting) -> T5ForConditionalGeneration:
    torch.manual_seed(setting.seed)
    config = T5Config(
        vocab_size=setting.vocabulary,
        d_model=setting.hidden,
        d_kv=64,
        d_ff=4 * setting.hidden,
        num_layers=setting.layers,
        num_heads=setting.hidden // 64,
        decoder_start_token_id=0,
        initializer_factor=0.5,
    )
    model: Any = T5ForConditionalGeneration(config).to(setting.device)
    return disable_dropout(model)  # the same model


def build_samples(setting: Setting) -> list[Sample]:
    draw = random.Random(setting.seed)

    def ids(bounds: tuple[int, int]) -> list[int]:
        return [draw.randrange(2, setting.vocabulary) for _ in range(draw.randint(*bounds))]

    return [
        Sample(ids(setting.query), [Completion([*ids(setting.docid), 1]) for _ in range(1 + setting.negatives)])
        for _ in range(setting.queries)
    ]


class Both(Step):
    """What ours and the plain step share."""

    name = ""

    def __init__(self, setting: Setting) -> None:
        self.policy, self.reference = build_model(setting), build_model(replace(setting, seed=setting.seed + 1))
        self.optimiser = optimiser_of(self.policy)
        self.samples = build_samples(setting)
        self.prepare(setting)

    @abstractmethod
    def prepare(self, setting: Setting) -> None:
        """Make what is not timed."""


class Ours(Both):
    name = "tokengrain"

    def prepare(self, setting: Setting) -> None:
        prepare(self.policy)
        self.judge = PreferenceLoss(make_objective("dpo", beta=BETA), FrozenReference(self.reference), None)
        self.batch = TokenBatch.from_samples(self.samples, "encoder").to(setting.device)

    def loss(self) -> Tensor:
        return self.judge(self.policy, self.batch).output.losses.mean()


class Plain(Both):
    name = "plain transformers"

    def prepare(self, setting: Setting) -> None:
        self.reference.eval().requires_grad_(False)
        rows = [(s.prompt_ids, c.ids) for s in self.samples for c in s.completions]
        queries, docids = ([row[side] for row in rows] for side in (0, 1))
        self.group, self.device = 1 + setting.negatives, setting.device
        self.ids, self.mask = self.padded(queries, 0)
        self.labels, self.counted = self.padded(docids, 0)

    def padded(self, rows: list[list[int]], fill: int) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=self.device)
        return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)

    def logps(self, model: Any) -> Tensor:
        """Log-probability of every docid, `[queries, 1 + negatives]`."""
        before = F.pad(self.labels[:, :-1], (1, 0))
        logits = model(input_ids=self.ids, attention_mask=self.mask, decoder_input_ids=before, use_cache=False).logits
        found = logits.log_softmax(-1).gather(-1, self.labels[..., None]).squeeze(-1)
        return (found * self.counted).sum(1).view(-1, self.group)

    def loss(self) -> Tensor:
        with torch.no_grad():
            known = self.logps(self.reference)
        ratios = self.logps(self.policy) - known
        return -F.logsigmoid(BETA * (ratios[:, :1] - ratios[:, 1:])).mean()


STEPS = {"ours": Ours, "plain": Plain}


def search_seconds(setting: Setting, repeats: int, beams: int = 20, documents: int = 1400) -> dict[str, Any]:
    """CPU seconds to find docids for the queries, all at once and by `generate` with `prefix_allowed_tokens_fn`.

    Docids are a hierarchy of 14 x 14 x 8 codes with an end token. Both find the same ones.
    """
    draw, model = random.Random(setting.seed), build_model(setting).eval()
    docids = {(*(2 + 14 * level + draw.randrange(14) for level in range(2)), 30 + draw.randrange(8), 1)
              for _ in range(documents)}  # fmt: skip
    trie, queries = Trie(sorted(docids)), [sample.prompt_ids for sample in build_samples(setting)]
    allowed = trie.allowed_fn(pad_id=0)
    options: dict[str, Any] = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": 0.0}
    options |= {"max_new_tokens": 4, "do_sample": False, "early_stopping": False, "prefix_allowed_tokens_fn": allowed}

    def ours() -> list[list[tuple[int, ...]]]:
        return [[one.docid for one in found] for found in search(model, queries, trie, beams=beams)]

    def generate() -> list[list[tuple[int, ...]]]:
        ids = pad_sequence([torch.tensor(query) for query in queries], batch_first=True)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(query)] for query in queries])).long()
        found = model.generate(ids, attention_mask=mask, **options)[:, 1:].view(len(queries), beams, -1).tolist()
        return [[tuple(docid) for docid in each] for each in found]

    runs = {"tokengrain": ours, "generate": generate}
    same = ours() == generate()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            found[name].append(time.process_time() - begin)
    pair = [Timing(name, found[name], float("nan")) for name in reversed(runs)]
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    return {"beams": beams, "docids": len(trie), "same_docids": same, "cpu_seconds": medians, "faster": ratio(*pair)}


def peak_memory(setting: Setting, name: str) -> float:
    """Peak MiB of a step above models and optimiser, in a fresh process."""
    code = "import benchmarks.seq2seq_step as b\n"
    code += f"print('PEAK', b.measured(b.Setting(**{vars(setting)!r}), {name!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        # Freed memory goes back to the system at once, so the peak is what the step really holds.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    return float(run.stdout.split("PEAK")[-1])


def measured(setting: Setting, name: str) -> float:
    step = STEPS[name](setting)
    # The first step makes gradients and optimiser state, which belong to both alike.
    step.optimiser.zero_grad = lambda: torch.optim.Optimizer.zero_grad(step.optimiser, set_to_none=False)
    step.step()
    with ResidentSampler() as sampler:
        step.step()
    return (sampler.peak - sampler.before) / 2**20


def main(
    queries: int = 4,
    negatives: int = 8,
    query: Annotated[str, typer.Option(help="tokens, such as 64-128")] = "64-128",
    docid: str = "16-24",
    vocabulary: int = 32_128,
    repeats: int = 5,
    output: Annotated[Path | None, typer.Option(help="a JSON file for the numbers")] = None,
) -> None:
    """Print both steps' seconds, their ratio, and the peak memory of each."""
    setting = replace(Setting(), queries=queries, negatives=negatives, vocabulary=vocabulary)
    setting = replace(setting, query=_bounds(query), docid=_bounds(docid))
    timings = alternating([step(setting) for step in STEPS.values()], repeats)
    ours, plain = timings["seconds"]
    memory = {name: peak_memory(setting, name) for name in STEPS}
    found = {
        **machine("benchmarks.seq2seq_step"),
        "setting": vars(setting),
        "parameters": sum(p.numel() for p in build_model(setting).parameters()),
        **{clock: {t.name: t.summary(1)["median_s"] for t in pair} for clock, pair in timings.items()},
        "faster": {clock: ratio(plain, ours) for clock, (ours, plain) in timings.items()},
        "loss_difference": abs(plain.second_loss - ours.second_loss),
        "peak_mib": memory,
        "memory_share": memory["ours"] / memory["plain"],
        "search": search_seconds(setting, repeats),
    }
    print(json.dumps(found, indent=1))
    if output is not None:
        write_json(output, found)


if __name__ == "__main__":
    typer.run(main)
