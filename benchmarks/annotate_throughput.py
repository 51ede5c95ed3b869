"""How much of the bare scoring throughput `annotate` keeps, with a guide and its reference, on one model.

    python -m benchmarks.annotate_throughput

Both sides score the same pairs in the same token budgets with the same two models.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.setting import Setting, build_model, build_samples, word_tokenizer
from tokengrain.annotation import annotate
from tokengrain.batch import TokenBatch
from tokengrain.data.dataset import PairDataset
from tokengrain.method import make_credit
from tokengrain.scoring.reference import FrozenReference
from tokengrain.scoring.score import score


def bare(samples: list, guide: torch.nn.Module, reference: torch.nn.Module, budget: int) -> None:
    """Score all pairs with both models, in batches of similar lengths."""
    ordered = sorted(samples, key=lambda s: -s.n_tokens)
    with torch.no_grad():
        for part in TokenBatch.from_samples(ordered).split(budget):
            score(guide, part)
            score(reference, part)


def main(
    pairs: int = 256,
    repeats: int = 3,
    hidden: int = 384,
    layers: int = 6,
    budget: Annotated[int, typer.Option(help="tokens of one forward pass")] = 8192,
) -> None:
    """Print seconds of both and the share of the bare throughput that annotate keeps."""
    setting = Setting(pairs=pairs, hidden=hidden, layers=layers)
    samples = build_samples(setting)
    guide, base = build_model(setting), build_model(setting.with_(seed=1))
    dataset = PairDataset(samples)
    source, reference = make_credit("guide", model=guide, reference=base, beta=0.1), FrozenReference(base)
    shares, times = [], []
    for round_ in range(repeats + 1):
        start = time.perf_counter()
        bare(samples, guide, base, budget)
        middle = time.perf_counter()
        folder = Path(tempfile.mkdtemp())
        annotate(
            dataset,
            word_tokenizer(setting.vocabulary),
            None,
            {"token_rewards": source},
            reference,
            folder / "pairs.parquet",
            {},
            max_tokens=budget,
            progress=False,
        )
        end = time.perf_counter()
        shutil.rmtree(folder)
        if round_:
            times.append((middle - start, end - middle))
            shares.append((middle - start) / (end - middle))
    tokens = sum(s.n_tokens for s in samples)
    bare_s, annotate_s = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{setting.label()}; {tokens:,} tokens; {torch.get_num_threads()} threads")
    print(f"bare scoring {bare_s:.2f} s ({tokens / bare_s:,.0f} tokens/s), annotate {annotate_s:.2f} s")
    print(f"annotate keeps {statistics.median(shares):.2f} of the throughput ({min(shares):.2f}–{max(shares):.2f})")


if __name__ == "__main__":
    typer.run(main)
