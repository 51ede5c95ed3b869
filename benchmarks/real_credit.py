"""Credit on real text: which source finds the corrupted tokens of HH's answers under SmolLM2-135M-Instruct?

python -m benchmarks.real_credit --output docs/results

Answers are chosen ones of the pairs before `SPLIT`; guides and the reward model learn from the pairs behind it. What is
finished stands in the folder of the runs, and the same command does what is missing (hours on one core).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tests.real.models import place
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.real_training import trained
from tokengrain.batch import TokenBatch
from tokengrain.corruption import Corrupted, corrupt
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.data.rows import load_rows
from tokengrain.errors import read_json, read_log, write_json, write_text
from tokengrain.evaluation.credit import added_auc, auc, parts_of
from tokengrain.evaluation.statistics import bootstrap
from tokengrain.method import make_credit
from tokengrain.models import load_trained_reward_model
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.head import Distribution
from tokengrain.scoring.reference import ReferenceScores
from tokengrain.scoring.score import distribution_of
from tokengrain.training.config import PreferenceConfig
from tokengrain.training.trainer import PreferenceTrainer

FIRST, SPLIT = 200, 1000  # rows before the first were looked at while sources were thought of
SEEDS, HOWS = (0, 1), ("swap", "random")
MOST = 320  # answers
GUIDE_STEPS, REWARD_STEPS = (4, 12, 25, 50, 100), 25  # of 8 pairs
MEANS = ("auc", "minus_surprise", "gain")
FLUENT = {
    "better": "{prompt}\n\nWrite fluent, correct English.",
    "worse": "{prompt}\n\nWrite broken English with wrong words in the wrong order.",
}


class Kept:
    """A model that is asked once per batch, however many sources read it; called like a `Reference`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.known: dict[int, tuple[TokenBatch, ReferenceScores]] = {}  # the batch too: it keeps its id

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> ReferenceScores:
        if id(batch) not in self.known:
            own: Distribution = distribution_of(self.model, batch)
            logps = head_quantities(own.hidden, own.head, batch.labels, ("logps",))["logps"]
            self.known[id(batch)] = (batch, ReferenceScores(logps.detach(), own))
        return self.known[id(batch)][1]


@dataclass
class Study:
    """The model, the answers and the training pairs; guides are trained when first asked for."""

    data: Path
    runs: Path
    kept: dict[tuple[str, int], tuple[Corrupted, list[TokenBatch], Kept]] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(place("smollm2"))

    @cached_property
    def model(self) -> Any:
        return self.start().eval().requires_grad_(False)

    def start(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(place("smollm2"), dtype=torch.float32)

    @cached_property
    def answers(self) -> TokenBatch:
        """Of middle length: a few tokens can be corrupted, and a pass is short."""
        rows = prepare_sft(load_rows(str(self.data)), self.tokenizer, TokenizeConfig(on_invalid="skip"))
        behind = (s for s in rows if FIRST <= int(s.row) < SPLIT and len(s.prompt_ids) <= 150)
        fit = [s for s in behind if 15 <= len(s.completions[0].ids) <= 80]
        return TokenBatch.from_samples(fit[:MOST])

    @cached_property
    def pairs(self) -> list[Any]:
        rows = prepare_pairs(load_rows(str(self.data)), self.tokenizer, TokenizeConfig(on_invalid="skip"))
        behind = [s for s in rows if int(s.row) >= SPLIT and s.n_tokens <= 360]
        return [s for s in behind if min(len(c.ids) for c in s.completions) >= 4]

    def corrupted(self, how: str, seed: int) -> tuple[Corrupted, list[TokenBatch], Kept]:
        if (how, seed) not in self.kept:
            self.kept.clear()
            made = corrupt(self.answers, self.tokenizer, how=how, tokens=2, seed=seed)
            self.kept[how, seed] = (made, parts_of(made.corrupted, 16), Kept(self.model))
        return self.kept[how, seed]

    def guide(self, seed: int, steps: int) -> Path:
        """A LoRA adapter after so many steps of DPO (β 0.1, rate 1e-4, 8 pairs a step)."""
        folder = self.runs / f"guide-{seed}"
        if not (folder / str(steps) / "adapter_config.json").exists():
            self.train(seed, folder)
        return folder / str(steps)

    def reward_model(self, seed: int) -> Path:
        """Q-RM's, of the same pairs, rate and adapter as the guides."""
        rows = self.runs / "pairs.jsonl"
        if not rows.exists():
            used = {int(sample.row) for sample in self.pairs}
            lines = (json.dumps(row) + "\n" for i, row in load_rows(str(self.data)) if i in used)
            write_text(rows, "".join(lines))
        size = {"training__per_device_train_batch_size": 8, "training__max_steps": REWARD_STEPS}
        how = {**size, "training__learning_rate": 1e-4, "seed": seed}
        return trained("qrm", self.runs / f"reward-{seed}", str(rows), None, **how)

    def train(self, seed: int, folder: Path) -> None:
        torch.manual_seed(seed)
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(self.start(), lora)
        config = PreferenceConfig(
            str(folder / "run"), learning_rate=1e-4, lr_scheduler_type="constant", warmup_steps=0, seed=seed,
            max_steps=max(GUIDE_STEPS), per_device_train_batch_size=8, max_grad_norm=1.0, use_cpu=True, bf16=False,
            save_strategy="no", logging_steps=5, disable_tqdm=True, report_to="none",
        )  # fmt: skip
        given: dict[str, Any] = {"train_dataset": self.pairs, "processing_class": self.tokenizer}
        PreferenceTrainer(model, config, objective="dpo", callbacks=[Save(folder, self.tokenizer)], **given).train()


class Save(TrainerCallback):
    """Keeps the adapter after each of `GUIDE_STEPS`."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        if state.global_step in GUIDE_STEPS:
            model.save_pretrained(self.folder / str(state.global_step))


Source = Callable[[TokenBatch], Tensor]
Build = Callable[[Study, Kept, int], Source]


def _kept(name: str) -> Build:
    return lambda study, kept, seed: make_credit(name, model=kept)


def _contrastive(templates: Any) -> Build:
    return lambda study, kept, seed: make_credit(
        "contrastive", model=study.model, tokenizer=study.tokenizer, templates=templates
    )


def _guide(steps: int) -> Build:
    def build(study: Study, kept: Kept, seed: int) -> Source:
        guide = AutoPeftModelForCausalLM.from_pretrained(study.guide(seed, steps), dtype=torch.float32)
        return make_credit("guide", model=guide.eval().requires_grad_(False), reference=kept)

    return build


def _reward(study: Study, kept: Kept, seed: int) -> Source:
    return make_credit("reward_model", model=load_trained_reward_model(study.reward_model(seed)))


SOURCES: dict[str, Build] = {
    "surprise": _kept("surprise"),
    "lookahead": _kept("lookahead"),
    "entropy": _kept("entropy"),
    "random": lambda study, kept, seed: make_credit("random", seed=seed),
    "contrastive, prefix": _contrastive("prefix"),
    "contrastive, fluent": _contrastive(FLUENT),
    "contrastive, general": _contrastive("general"),
    "contrastive, safety": _contrastive("safety"),
    **{f"guide, {steps} steps": _guide(steps) for steps in GUIDE_STEPS},
    "reward_model": _reward,
    "gradient_attribution": lambda study, kept, seed: make_credit("gradient_attribution", model=study.model),
}


def ask(study: Study, name: str, how: str, seed: int) -> dict[str, Any]:
    """AUC of finding the corrupted tokens per answer; beside `surprise`, and what is added to it."""
    made, parts, kept = study.corrupted(how, seed)
    begin = time.process_time()
    source = SOURCES[name](study, kept, seed)
    credit = torch.cat([source(part).detach().cpu() for part in parts])
    segments, marked = made.corrupted.segments, made.marked
    known = torch.cat([kept(part, {"logps"}).logps for part in parts])
    split = [segments.split(x) for x in (credit, known, marked)]
    return {
        "source": name,
        "how": how,
        "seed": seed,
        "auc": [auc(-c, hit) for c, _, hit in zip(*split, strict=True)],
        "surprise": [auc(-k, hit) for _, k, hit in zip(*split, strict=True)],
        "gain": added_auc(credit, known, marked, segments).tolist(),
        "cpu_seconds": round(time.process_time() - begin, 1),
        "date": date.today().isoformat(),
    }


def summary(line: dict[str, Any]) -> dict[str, Any]:
    """A line of the log with means and 95 % bootstrap intervals over answers instead of the answers' values."""
    minus = [a - b for a, b in zip(line["auc"], line["surprise"], strict=True)]
    values = {"auc": line["auc"], "minus_surprise": minus, "gain": line["gain"]}
    means = {
        name: bootstrap(lambda means: means[..., 0], torch.tensor(v)[:, None], resamples=2000)._asdict()
        for name, v in values.items()
    }
    return {key: line[key] for key in ("source", "how", "seed", "date")} | {"answers": len(minus)} | means


def page(found: list[dict[str, Any]]) -> str:
    used = list(dict.fromkeys(entry["source"] for entry in found))
    dates = sorted({entry["date"] for entry in found})
    some = "" if len(used) == len(SOURCES) else "".join(f' --source "{name}"' for name in used)
    text = [
        "# Credit on real text",
        "",
        f"`python -m benchmarks.real_credit{some}`, {' and '.join(dates)}, one CPU core. SmolLM2-135M-Instruct; "
        f"chosen answers of HH, harmless (rows {FIRST} to {SPLIT - 1}: prompts of at most 150 tokens, answers of 15 to "
        "80), two places of each corrupted. AUC is the chance that a corrupted token has less credit than another one "
        "of its answer, a mean over answers with a 95 % bootstrap interval. *Minus surprise* is the difference on the "
        "same answers; *gain* is what a source adds to surprise ([bench credit](../bench-credit.md)). A seed is that "
        "of the corruption, and of the training of guides (DPO with β 0.1) and of the reward model (Q-RM, "
        f"{REWARD_STEPS} steps): LoRA of rank 16, rate 1e-4, 8 pairs a step of rows from {SPLIT} on.",
        "",
    ]
    for how in [how for how in HOWS if any(entry["how"] == how for entry in found)]:
        head = "| source | seed | answers | AUC | minus surprise | gain |"
        text += [f"## `{how}`", "", head, "|---|---|---|---|---|---|"]
        for entry in (e for e in found if e["how"] == how):
            cells = [f"{e['value']:.3f} ({e['low']:.3f} to {e['high']:.3f})" for e in map(entry.get, MEANS)]
            text.append(f"| {entry['source']} | {entry['seed']} | {entry['answers']} | " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def write_pages(lines: list[dict[str, Any]], output: Path) -> None:
    """Of these lines, and of those that the file has besides."""
    target, order = output / "real.json", list(SOURCES)
    kept = [*(read_json(target) if target.exists() else ()), *map(summary, lines)]
    latest = {(line["source"], line["how"], line["seed"]): line for line in kept}
    found = sorted(latest.values(), key=lambda line: (order.index(line["source"]), line["seed"]))
    write_text(output / "real.md", page(found))
    write_json(target, found)


def main(
    data: Annotated[Path, typer.Option(help="the pairs")] = Path("../shared/data/hh-harmless-pairs.jsonl.gz"),
    output: Annotated[Path | None, typer.Option(help="folder for real.md and .json")] = None,
    runs: Path = Path("runs/real"),
    source: Annotated[list[str] | None, typer.Option(help="some of the sources; repeatable (default: all)")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="some of the seeds; repeatable (default: all)")] = None,
) -> None:
    """Ask every source about the same corrupted answers, and write the page."""
    torch.set_num_threads(1)
    runs.mkdir(parents=True, exist_ok=True)
    study, log = Study(data, runs), runs / "credit.jsonl"
    done = {(line["source"], line["how"], line["seed"]) for line in read_log(log)}
    for number in SEEDS if seed is None else seed:
        for how in HOWS:
            for name in source or SOURCES:
                if (name, how, number) not in done:
                    line = ask(study, name, how, number)
                    with log.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    print(summary(line), f"{line['cpu_seconds']} s", flush=True)
    if output is not None:
        write_pages(read_log(log), output)


if __name__ == "__main__":
    typer.run(main)
