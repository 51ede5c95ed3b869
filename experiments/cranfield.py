"""`python -m experiments.cranfield DATA`: DDRO's recipe on Cranfield, from new weights, beside BM25 and LSA.

DATA holds docs.json (1,400 abstracts), queries.json (225) and qrels.json. Of the queries 150 train and 75 are held out,
another third for each seed. A T5 of about 0.8 million parameters with a vocabulary of words learns docids (clusters of
clusters of LSA vectors), then from pairs with BM25's negatives. As long an SFT on the pairs' relevant docids stands
beside DDRO. Every seed is one run of `cranfield.yaml` in OUTPUT/seed-N; finished runs are read again.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from tokengrain.errors import read_json, write_text
from tokengrain.evaluation.statistics import mean_of_runs
from tokengrain.retrieval.words import words
from tokengrain.run.load import load_recipe
from tokengrain.run.runner import run_recipe

HELD_OUT = 75
RELEVANT = 4  # the largest code of a document that is of some use
SIZES: dict[str, Any] = {
    "d_model": 96,
    "d_kv": 24,
    "d_ff": 192,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
}
ROWS = {
    "BM25": ("evaluate", "bm25"),
    "LSA, 64 dimensions": ("evaluate", "lsa"),
    "SFT": ("evaluate", "before"),
    "DDRO": ("evaluate", "after"),
    "SFT continued on the relevant docids": ("compare", "after"),
}
MEASURES = ("MRR@10", "Hit@10", "R@10", "mass")


def make_inputs(data: Path, folder: Path, seed: int) -> None:
    """Documents, queries and an untrained model, as files."""
    docs, queries, judged = (read_json(data / f"{name}.json") for name in ("docs", "queries", "qrels"))
    relevant: dict[int, list[str]] = {}
    for entry in judged:
        if entry["position"] <= RELEVANT:
            relevant.setdefault(int(entry["query_num"]), []).append(str(entry["id"]))
    rows = [{"query": q["query"], "positive": relevant[q["query number"]]} for q in queries]
    random.Random(seed).shuffle(rows)
    documents = [{"key": str(d["id"]), "title": d["title"], "text": d["body"]} for d in docs]
    for name, listed in {"documents": documents, "train": rows[HELD_OUT:], "eval": rows[:HELD_OUT]}.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in listed))
    make_model([f"{d['title']} {d['text']}" for d in documents], folder / "model", seed)


def make_model(texts: Sequence[str], folder: Path, seed: int) -> None:
    """A T5 with new weights and a tokenizer of the words that occur twice."""
    counts = Counter(word for text in texts for word in words(text))
    known = ["<pad>", "</s>", "<unk>", *(word for word, count in counts.most_common() if count > 1)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    torch.manual_seed(seed)
    ends: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=len(known), **SIZES, **ends)).save_pretrained(folder)


def run_seed(data: Path, output: Path, seed: int) -> dict[str, Any]:
    """The stages' metrics of one seed."""
    inputs = output / f"inputs-{seed}"
    if not (inputs / "model" / "config.json").exists():
        make_inputs(data, inputs, seed)
    rows = {"data.eval": "eval.jsonl", "stages.index.documents": "documents.jsonl"}
    given = [f"seed={seed}", *(f"{key}={inputs / name}" for key, name in rows.items())]
    places = str(inputs / "model"), str(inputs / "train.jsonl")
    recipe = load_recipe(Path(__file__).with_suffix(".yaml"), *places, given, output / f"seed-{seed}")
    return run_recipe(recipe).metrics["stages"]


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Means over seeds with 95 % t intervals, and the seeds' own numbers."""
    lines = [f"| | {' | '.join(MEASURES)} | MRR@10 by seed |", "|---" * (len(MEASURES) + 2) + "|"]
    for title, (stage, part) in ROWS.items():
        found = [run[stage][part] for run in runs]
        cells = []
        for measure in MEASURES:
            values = [f[measure] for f in found if measure in f]
            estimate = mean_of_runs(values) if len(values) > 1 else None
            cells.append(f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})" if estimate else "–")
        by_seed = " ".join(f"{f['MRR@10']:.3f}" for f in found)
        lines.append(f"| {title} | {' | '.join(cells)} | {by_seed} |")
    return "\n".join(lines)


def main(data: str, output: str = "runs/cranfield", *seeds: str) -> None:
    runs = [run_seed(Path(data), Path(output), int(seed)) for seed in seeds or ("0", "1", "2")]
    print(table(runs))


if __name__ == "__main__":
    main(*sys.argv[1:])
