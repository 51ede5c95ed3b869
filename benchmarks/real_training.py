"""Trainings of SmolLM2-135M-Instruct: offline methods on HH's pairs, online ones on sums that it solves now and then.

python -m benchmarks.real_training offline --output docs/results
python -m benchmarks.real_training online --output docs/results

What is finished is used again: after a stop the same command goes on, within a training at its last checkpoint. Hours
on two cores: give two processes some --method each, then call it once more for the page.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from html import escape
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from filelock import FileLock
from tests.real.models import place
from transformers import AutoTokenizer
from typer import Option

import tokengrain
from benchmarks.picture import LINE, MARGIN, WHAT, svg_of, words
from tokengrain import models
from tokengrain.batch import TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.data.formats import canonical
from tokengrain.data.rows import load_rows
from tokengrain.errors import read_json, read_log, write_json, write_text
from tokengrain.evaluation.statistics import mean_interval, mean_of_runs, sample_metrics, wilson
from tokengrain.generate import generate
from tokengrain.rank import rank
from tokengrain.report.html import colour_scale, pieces
from tokengrain.report.rows import Side
from tokengrain.rewards.answers import gold_number, numbers_in
from tokengrain.runs import read_run
from tokengrain.scoring.reference import scorer_logps
from tokengrain.scoring.score import distribution_of, in_parts, score
from tokengrain.specs import ModelSpec

OFFLINE = ("dpo", "simpo", "tdpo2", "tgdpo", "treg", "rrpo", "sepo", "aligndistil")
ONLINE = ("grpo", "grpo_refill", "dcpo", "thr", "aepo", "rto")
RATES = (5e-5, 2e-4)  # of adapters; which one, is chosen per method on rows that are not reported
HELD, CHOICE, TRAIN, JUDGE = (0, 200), (200, 320), (320, 1100), (1100, 1800)  # rows of HH
LONGEST = 600  # characters of a dialogue, so that a study fits a night of two cores
PAIRS = 4  # of a step
LORA = {"r": 16, "alpha": 32}
CHAT = TokenizeConfig(chat=True)
MEASURED = ("accuracy", "margin", "kl", "wins", "words")
START = place("smollm2")
app = typer.Typer()
Several = Annotated[list[str] | None, Option("--method", help="some of the methods; repeatable (default: all)")]


def trained(recipe: str, output: Path, data: Any, held_out: Any, **settings: Any) -> Path:
    """The model of a run; a finished one is used again."""
    given = {"training__bf16": False, "lora": LORA, **settings}
    tokengrain.train(recipe, model=str(START), data=data, eval_data=held_out, output=output, quiet=True, **given)
    return read_run(output).model_path


@dataclass
class Offline:
    """The study of offline methods: its rows, its judge, and how a trained model is measured, the same for all."""

    data: Path
    runs: Path
    steps: int
    prompts: int  # held-out ones that are answered

    def rows(self, name: str, span: tuple[int, int], most: int | None = None) -> Path:
        """Rows of HH as a file of their own, without dialogues too long for the budget, and invalid ones."""
        target = self.runs / f"{name}-rows.jsonl"
        if not target.exists():
            lines = [row for i, row in load_rows(str(self.data)) if span[0] <= i < span[1]]
            short = [row for row in lines if max(len(row["chosen"]), len(row["rejected"])) <= LONGEST]
            valid = prepare_pairs(short, self.tokenizer, replace(CHAT, on_invalid="skip"))
            kept = [short[int(sample.row)] for sample in valid][:most]
            write_text(target, "".join(json.dumps(row) + "\n" for row in kept))
        return target

    def alone(self, what: str) -> FileLock:
        """Held while something is made that two processes may both want."""
        return FileLock(self.runs / f".{what}.lock")

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(START)

    @cached_property
    def held(self) -> Path:
        return self.rows("held", HELD)

    @cached_property
    def judge(self) -> Path:
        """A reward model that other pairs have trained than those the methods see or are measured on."""
        with self.alone("judge"):
            return self.train("qrm", "judge", self.rows("judged", JUDGE), seed=100)

    def train(self, recipe: str, name: str, rows: Path, **settings: Any) -> Path:
        size = {"training__per_device_train_batch_size": PAIRS, "training__max_steps": self.steps}
        size |= {"data__chat": True, "training__save_steps": 15}
        few = self.rows("few", CHOICE, 4)  # the run's own evaluation says that it works, no more
        return trained(recipe, self.runs / name, str(rows), str(few), **size, **settings)

    def policy(self, method: str, rate: float, seed: int) -> Path:
        name, how = f"{method}-{rate:g}-{seed}", {"training__learning_rate": rate, "seed": seed}
        return self.train(method, name, self.rows("pairs", TRAIN), **how, **self.asked(method, seed))

    def asked(self, method: str, seed: int) -> dict[str, Any]:
        """Settings that take what a recipe's first stages would make again in every run.

        DPO's model of the same seed is TGDPO's guide, SePO's oracle and AlignDistil's target. SePO takes TGDPO's
        credit: a factor does not change the order.
        """
        if method == "treg":
            with self.alone("treg"):
                return self.annotated("treg", "credit-treg")
        if method not in ("tgdpo", "sepo", "aligndistil"):
            return {}
        with self.alone(f"guides-{seed}"):
            rate = self.rate("dpo")
            dpo = str(self.policy("dpo", rate, seed))
            if method != "aligndistil":
                how = {"stages__guide": None, "stages__credit__credit__model": dpo}
                own = {"tgdpo": "guide", "sepo": "oracle"}[method]
                return {f"stages__{own}": None, **self.annotated("tgdpo", f"credit-{seed}", **how)}
            how = {"training__learning_rate": rate, "seed": seed, "data__swap_pairs": True}
            reverse = str(self.train("dpo", f"reverse-{seed}", self.rows("pairs", TRAIN), **how))
            teachers = {"stages__train__teacher__target": dpo, "stages__train__teacher__contrast": reverse}
            return {"stages__normal": None, "stages__reverse": None, **teachers}

    def annotated(self, recipe: str, name: str, **settings: Any) -> dict[str, Any]:
        """The pairs with a recipe's credit, as its last stage takes them."""
        rows, few, folder = self.rows("pairs", TRAIN), self.rows("few", CHOICE, 4), self.runs / name
        how = {"data__chat": True, "stages__train": None, "training__bf16": False, "lora": LORA, **settings}
        tokengrain.train(recipe, model=str(START), data=str(rows), eval_data=str(few), output=folder, quiet=True, **how)
        parts = {part: str(folder / "credit" / f"{part}.parquet") for part in ("train", "eval")}
        return {"stages__credit": None, "stages__train__data": parts}

    def beside(self, model: Path, name: str) -> Path:
        """Where something measured of a run's model is kept: not in the run's own folder."""
        return self.runs / "measured" / f"{str(model.relative_to(self.runs)).replace('/', '-')}-{name}"

    def rate(self, method: str) -> float:
        """The better one on rows that are not reported, by the first seed."""
        choice = self.rows("choice", CHOICE)

        def worth(rate: float) -> tuple[float, float]:
            margins = self.margins(self.policy(method, rate, 0), choice)
            return average([half(m, 0.0) for m in margins]), average(margins)

        return max(RATES, key=worth)

    def margins(self, model: Path, rows: Path) -> list[float]:
        """How much more log-probability the chosen completion of each pair gained over the start model than the other.

        Of every method, also of those that have no reference, or no pairs.
        """
        samples = list(prepare_pairs(str(rows), self.tokenizer, CHAT))
        with self.alone("start"):
            start = self.totals(START, samples, self.runs / f"start-{rows.stem}.json")
        gained = [
            a - b
            for a, b in zip(self.totals(model, samples, self.beside(model, f"{rows.stem}.json")), start, strict=True)
        ]
        return [chosen - rejected for chosen, rejected in zip(gained[::2], gained[1::2], strict=True)]

    def totals(self, model: Path, samples: list[Any], target: Path) -> list[float]:
        """Log-probability of every completion, nats; of a finished call read again."""
        if not target.exists():
            scorer, batch = loaded(model), TokenBatch.from_samples(samples)
            with torch.no_grad():
                logps = in_parts(batch, 4096, lambda part: {"logps": scorer_logps(scorer, part)})["logps"]
            write_json(target, batch.segments.sum(logps).tolist())
        return list(read_json(target))

    def answers(self, model: Path, target: Path, seed: int) -> list[dict[str, Any]]:
        """Sampled answers to the held-out dialogues, as rows with all of their turns."""
        if not target.exists():
            asked = [{"prompt": canonical(row, True)["prompt"]} for _, row in load_rows(str(self.held))]
            generate(str(model), asked[: self.prompts], target, max_new_tokens=64, temperature=1.0, seed=seed)
        return [row for _, row in load_rows(str(target))]

    def measured(self, model: Path, seed: int) -> dict[str, list[float]]:
        """What the page has of a trained model, pair by pair and answer by answer."""
        target = self.beside(model, f"{self.prompts}.json")
        if not target.exists():
            with self.alone("start"):
                start = self.answers(START, self.runs / f"start-{self.prompts}-{seed}.jsonl", seed)
            own = self.answers(model, self.beside(model, f"answers-{self.prompts}.jsonl"), seed)
            both = [{**a, "completions": [a["completion"], b["completion"]]} for a, b in zip(own, start, strict=True)]
            ranked = self.beside(model, "ranked.jsonl")
            rank(both, str(self.judge), output=ranked, tokenize=CHAT, progress=False, overwrite=True)
            scores = [row["scores"] for _, row in load_rows(str(ranked))]
            margins = self.margins(model, self.held)
            found = {"accuracy": [half(m, 0.0) for m in margins], "margin": margins, "kl": self.divergence(model, own)}
            found |= {"wins": [half(a, b) for a, b in scores], "words": [len(row["completion"].split()) for row in own]}
            write_json(target, found)
        return dict(read_json(target))

    def divergence(self, model: Path, said: list[dict[str, Any]]) -> list[float]:
        """KL(policy || start) along the policy's own answers, nats per token, over the whole vocabulary."""
        policy, start = loaded(model), loaded(START)
        batch = TokenBatch.from_samples(list(prepare_sft(said, self.tokenizer, CHAT)))

        def kl(part: TokenBatch) -> dict[str, Any]:
            return {"kl": score(start, part, ("kl",), reference=distribution_of(policy, part)).kl}

        with torch.no_grad():
            return list(batch.segments.mean(in_parts(batch, 4096, kl)["kl"]).tolist())

    def judge_accuracy(self) -> Any:
        """Of held-out pairs, with its interval."""
        target = self.runs / "judge.ranked.jsonl"
        return rank(str(self.held), str(self.judge), output=target, tokenize=CHAT, overwrite=True).accuracy


def loaded(model: Path) -> Any:
    return models.load_model(ModelSpec(path=str(model)), str(model), merge_adapter=True).eval()


def half(a: float, b: float) -> float:
    """1 if a is larger, 1/2 if they are equal."""
    return 0.5 if a == b else float(a > b)


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@app.command()
def offline(
    data: Path = Path("../shared/data/hh-harmless-pairs.jsonl.gz"),
    output: Annotated[Path | None, Option(help="folder for real_offline.md and .json")] = None,
    runs: Path = Path("runs/real/offline"),
    method: Several = None,
    seeds: int = 3,
    steps: int = 60,
    prompts: Annotated[int, Option(help="held-out prompts that are answered")] = 100,
) -> None:
    """Held-out accuracy, margin, KL and length of each method, and wins against the start model."""
    torch.set_num_threads(1)
    runs.mkdir(parents=True, exist_ok=True)
    study, found = Offline(data, runs, steps, prompts), dict[str, dict[str, Any]]()
    for name in method or OFFLINE:
        rate = study.rate(name)
        each = [study.measured(study.policy(name, rate, seed), seed) for seed in range(seeds)]
        found[name] = {"rate": rate, "seeds": each}
        print(name, rate, [{key: round(average(one[key]), 3) for key in MEASURED} for one in each], flush=True)
    if output is not None:
        judge, about = study.judge_accuracy(), (steps, seeds, prompts)
        means = {name: {"rate": one["rate"], **by_seed(one)} for name, one in found.items()}
        write_json(output / "real_offline.json", {"judge": list(judge), "methods": means})
        write_text(output / "real_offline.md", offline_page(found, judge, *about))


def offline_page(found: dict[str, dict[str, Any]], judge: Any, steps: int, seeds: int, prompts: int) -> str:
    measured = next(iter(found.values()))["seeds"][0]
    answers, pairs = len(measured["wins"]), len(measured["accuracy"])
    some = "" if len(found) == len(OFFLINE) else "".join(f" --method {name}" for name in found)
    text = [
        "# Offline methods on a published model",
        "",
        f"`python -m benchmarks.real_training offline --seeds {seeds} --steps {steps} --prompts {prompts}{some}`, "
        f"{date.today().isoformat()}, one CPU core a run. SmolLM2-135M-Instruct with LoRA of rank {LORA['r']}; "
        f"{steps} steps of {PAIRS} pairs of HH, harmless (rows {TRAIN[0]} to {TRAIN[1] - 1}, dialogues of at most "
        f"{LONGEST} characters, in the chat template). The rate is the better of {RATES[0]:g} and {RATES[1]:g} on rows "
        f"{CHOICE[0]} to {CHOICE[1] - 1}, by accuracy and the first seed; the table is about {pairs} such pairs of "
        f"rows {HELD[0]} to {HELD[1] - 1}. Means over seeds with a 95 % t interval. TGDPO's guide, SePO's oracle and "
        "AlignDistil's teacher are the DPO model of the same seed.",
        "",
        "Accuracy is the share of held-out pairs whose chosen completion gained more log-probability on the start "
        "model than the rejected one, and margin by how much more, nats. KL is that of the policy to the start model "
        f"along answers that the policy sampled to {answers} held-out prompts (at most 64 tokens), nats per token. "
        "Wins are the share of these answers that a judge prefers to the start model's: a reward model (Q-RM) that was "
        f"trained on rows {JUDGE[0]} to {JUDGE[1] - 1} alone, and is right about {judge.value:.3f} ({judge.low:.3f} to "
        f"{judge.high:.3f}) of the held-out pairs. *Minus dpo* is the difference in wins, prompt by prompt, with a "
        "95 % interval over prompts.",
        "",
        "| method | rate | accuracy | margin | KL | wins | minus dpo | words |",
        "|---|---|---|---|---|---|---|---|",
    ]
    apart = []
    for name, one in found.items():
        cells = {key: mean_of(values, 1 if key == "words" else 3) for key, values in by_seed(one).items()}
        minus = difference(one["seeds"], found["dpo"]["seeds"]) if "dpo" in found and name != "dpo" else None
        cells["minus"] = "{:+.3f} ({:+.3f} to {:+.3f})".format(*minus) if minus else "–"
        apart += [name] if minus and (minus.low > 0 or minus.high < 0) else []
        row = (cells[key] for key in ("accuracy", "margin", "kl", "wins", "minus", "words"))
        text.append(f"| {name} | {one['rate']:g} | " + " | ".join(row) + " |")
    kl, words = along(found, "kl"), along(found, "words")
    told = f"Wins differ from those of DPO for: {', '.join(apart) or 'no method'}. Of such comparisons, one in twenty "
    told += f"differs by chance; the table has {len(found) - 1}. As the rate was chosen by accuracy, methods end at "
    told += "different KL, and a judge can be misled, for example by short answers: over all runs, the correlation of "
    told += f"wins with log KL is {kl:.2f}, and with the number of words {words:.2f}."
    return "\n".join([*text, "", told, ""])


def by_seed(one: dict[str, Any]) -> dict[str, list[float]]:
    """What was measured of a method, a mean per seed."""
    return {key: [average(seed[key]) for seed in one["seeds"]] for key in MEASURED}


def along(found: dict[str, dict[str, Any]], other: str) -> float:
    """The correlation, over all runs, of wins with the number of words or the logarithm of KL."""
    every = [by_seed(one) for one in found.values()]
    wins, values = (torch.tensor([value for one in every for value in one[key]]) for key in ("wins", other))
    return float(torch.corrcoef(torch.stack([wins, values.log() if other == "kl" else values]))[0, 1])


def difference(own: list[dict[str, Any]], other: list[dict[str, Any]]) -> Any:
    """Of wins: the mean over seeds at every prompt, minus the other's."""
    means = [torch.tensor([seed["wins"] for seed in side]).mean(0) for side in (own, other)]
    return mean_interval(means[0] - means[1])


def mean_of(values: Sequence[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f} (one seed)" if values else "–"
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*mean_of_runs(values), d=digits)


PROMPTS = 3  # of an update, with 8 completions each
HALF = {"model__dtype": "bfloat16", "training__bf16": True}  # adapters stay in float32
FIRST_STAGES = ("guide", "reward")  # RTO's
REFILLED = [{"name": "filter_groups", "refill": True}, {"name": "group"}]  # THR's credit without `thr`
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"grpo_refill": ("thr", {"stages__train__credit": REFILLED})}
ROLES = ("user", "assistant")


def sums(count: int, seed: int) -> list[dict[str, Any]]:
    """Graded arithmetic behind two examples, without which this model writes of other things at temperature 1."""
    rng, rows = random.Random(seed), []
    said = [("4 + 7", "4 + 7 = 11"), ("3 * 6 + 5", "3 * 6 + 5 = 18 + 5 = 23")]
    shown = [{"role": "system", "content": "You calculate."}]
    shown += [{"role": role, "content": text} for one in said for role, text in zip(ROLES, one, strict=True)]
    for i in range(count):
        level = i % 6 + 1
        a, b, c = (rng.randint(2, 9) for _ in range(3))
        p, q = (rng.randint(11, 40) for _ in range(2))
        text, answer = {
            1: (f"{a} + {b}", a + b),
            2: (f"{a} * {b}", a * b),
            3: (f"{p} + {b}", p + b),
            4: (f"{p} + {q}", p + q),
            5: (f"{a} * {b} + {c}", a * b + c),
            6: (f"{a} + {b} + {c}", a + b + c),
        }[level]
        rows.append({"prompt": [*shown, {"role": "user", "content": text}], "answer": answer, "task": f"level {level}"})
    return rows


def problems_of(file: Path, count: int) -> list[dict[str, Any]]:
    """The first problems of GSM8K, with their numbers."""
    rows = (row for i, row in load_rows(str(file)) if i < count)
    asked = ((row["answer"], [{"role": "user", "content": row["question"]}]) for row in rows)
    return [{"prompt": prompt, "answer": int(gold_number(answer) or 0), "task": "GSM8K"} for answer, prompt in asked]


def right(rows: list[dict[str, Any]], target: Path) -> tuple[list[list[Any]], list[list[bool]]]:
    """The number that every completion of a file ends with, and whether it is the answer."""
    answers = [[(numbers_in(t) or [None])[-1] for t in row["completions"]] for _, row in load_rows(str(target))]
    return answers, [[a == row["answer"] for a in said] for said, row in zip(answers, rows, strict=True)]


def solved(model: str, rows: list[dict[str, Any]], target: Path, tokens: int, seed: int) -> dict[str, Any]:
    """pass@1, pass@8 and maj@8 over prompts, with 95 % intervals, and pass@1 by level."""
    answer(model, rows, target, tokens, seed)
    answers, correct = right(rows, target)
    measures = sample_metrics(torch.tensor(correct), answers, 8)
    kept = {name: share_of(measures[name]) for name in ("pass@1", "pass@8", "maj@8")}
    levels = sorted({row["task"] for row in rows})
    of = {lv: [i for i, row in enumerate(rows) if row["task"] == lv] for lv in levels}
    shares = {lv: float(measures["pass@1"][at].mean()) for lv, at in of.items()}
    words = average([len(text.split()) for _, row in load_rows(str(target)) for text in row["completions"]])
    return {**kept, "levels": shares, "words": words, "each": measures["pass@1"].tolist()}


def share_of(values: torch.Tensor) -> tuple[float, float, float]:
    """A mean of shares with its normal 95 % interval, cut off at 0 and 1; Wilson's where all are 0, or all 1."""
    total, n = float(values.sum()), len(values)
    mean, low, high = wilson(total, n) if total in (0, n) else mean_interval(values)
    return mean, max(low, 0.0), min(high, 1.0)


def answer(model: str, rows: list[dict[str, Any]], target: Path, tokens: int, seed: int) -> None:
    """Eight completions of every prompt, sampled at temperature 1; of a finished call nothing is done."""
    if not target.exists():
        how: dict[str, Any] = {"samples": 8, "temperature": 1.0, "dtype": "bfloat16"}
        generate(model, rows, target, max_new_tokens=tokens, seed=seed, **how)


def own_pairs(rows: list[dict[str, Any]], target: Path, tokens: int) -> list[dict[str, Any]]:
    """What RTO's guide and reward model learn from: a right and a wrong answer of the start model to each problem."""
    answer(str(START), rows, target, tokens, 5)
    _, correct = right(rows, target)
    pairs = []
    for (_, row), marks in zip(load_rows(str(target)), correct, strict=True):
        if len(set(marks)) == 2:
            sides = (row["completions"][marks.index(mark)] for mark in (True, False))
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in sides)
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


@dataclass
class Online:
    """The study of online methods: its problems, and how a method is trained on them and measured."""

    runs: Path
    updates: int
    tokens: int  # the longest completion of a sum
    longer: int  # and of a problem of GSM8K
    held: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    gsm8k: list[dict[str, Any]]

    def train(self, name: str, seed: int) -> Path:
        stage = {"prompts_per_rollout": PROMPTS, "num_generations": 8, "minibatches": 1, "max_new_tokens": self.tokens}
        settings: dict[str, Any] = {f"stages__train__training__{key}": value for key, value in stage.items()}
        settings |= {"training__max_steps": self.updates, "training__learning_rate": 1e-4, "seed": seed}
        settings["stages__train__rewards"] = [{"name": "numeric", "style": "last"}]
        rows, held = self.rows, self.held[:16]
        if name == "rto":
            write_text(self.runs / "problems.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            settings["stages__train__data__train"] = str(self.runs / "problems.jsonl")
            with FileLock(self.runs / ".own.lock"):
                rows = own_pairs(rows[:120], self.runs / "own.jsonl", self.tokens)
            few = max(1, min(8, len(rows) // 4))
            rows, held = rows[few:], rows[:few]
            short = {"max_steps": min(self.updates, 25), "per_device_train_batch_size": 8}
            settings |= {f"stages__{first}__training__{key}": v for first in FIRST_STAGES for key, v in short.items()}
        recipe, varied = VARIANTS.get(name, (name, {}))
        folder = self.runs / f"{name}-{seed}"
        trained(recipe, folder, rows, held, **settings, **varied, **HALF)
        return folder

    def measured(self, name: str, seed: int) -> dict[str, Any]:
        """Solved problems after training, and what was sampled while it went on."""
        folder = self.train(name, seed)
        file = folder / "train" / "log.jsonl"
        log = [entry for entry in read_log(file) if SPEED in entry]
        made = {key: average([entry[key] for entry in log]) for key in (SPEED, DRAWN)}
        trained_on = date.fromtimestamp(file.stat().st_mtime).isoformat()  # perhaps by an earlier call
        about = {"seed": seed, "trained": trained_on, "date": date.today().isoformat()}
        return {**self.solved(str(folder), f"{name}-{seed}", seed), **made, **about}

    def solved(self, model: str, name: str, seed: int) -> dict[str, Any]:
        found = solved(model, self.held, self.runs / f"{name}.jsonl", self.tokens, seed)
        if self.gsm8k and seed == 0:
            found["GSM8K"] = solved(model, self.gsm8k, self.runs / f"{name}-gsm8k.jsonl", self.longer, seed)
        return found


SPEED, DRAWN = "rollout/tokens_per_second", "rollout/prompts"


@app.command()
def online(
    output: Annotated[Path | None, Option(help="folder for real_online.md and .json")] = None,
    runs: Path = Path("runs/real/online"),
    method: Several = None,
    seeds: int = 2,
    updates: int = 100,
    prompts: Annotated[int, Option(help="held-out sums")] = 64,
    tokens: Annotated[int, Option(help="longest completion of a sum")] = 20,
    gsm8k: Path = Path("../shared/data/gsm8k-test.jsonl.gz"),
    problems: Annotated[int, Option(help="of GSM8K")] = 16,
    longer: Annotated[int, Option(help="longest completion of GSM8K")] = 96,
) -> None:
    """pass@1, pass@8 and maj@8 before and after training on the levels that the start model solves in 10 to 60 %.

    What real_online.json has, measured with the same settings, is not measured again.
    """
    torch.set_num_threads(1)
    runs.mkdir(parents=True, exist_ok=True)
    about = {"updates": updates, "prompts": prompts, "tokens": tokens, "problems": problems, "longer": longer}
    target = None if output is None else output / "real_online.json"
    kept = read_json(target) if target is not None and target.exists() else {"settings": about, "methods": {}}
    if kept["settings"] != about:
        raise typer.BadParameter(f"{target} was measured with {kept['settings']}; give --output another folder")
    found: dict[str, list[dict[str, Any]]] = kept["methods"]
    with FileLock(runs / ".probe.lock"):
        probe = kept.get("probe") or solved(str(START), sums(72, 1), runs / "probe.jsonl", tokens, 0)["levels"]
    fit = [level for level, share in probe.items() if 0.1 <= share <= 0.6] or list(probe)
    held = [row for row in sums(6 * prompts, 2) if row["task"] in fit][:prompts]
    rows = [row for row in sums(6 * PROMPTS * updates, 3) if row["task"] in fit][: PROMPTS * updates]
    study = Online(runs, updates, tokens, longer, held, rows, problems_of(gsm8k, problems) if problems else [])
    if "start" not in found:
        with FileLock(runs / ".probe.lock"):
            found["start"] = [study.solved(str(START), "start", 0)]
    for name, seed in product(method or ONLINE, range(seeds)):
        if all(entry["seed"] != seed for entry in found.setdefault(name, [])):
            made = study.measured(name, seed)
            found[name] = sorted([*found[name], made], key=lambda entry: int(entry["seed"]))
            print(name, seed, {key: round(made[key][0], 3) for key in ("pass@1", "pass@8", "maj@8")}, flush=True)
    if output is not None:
        found = {name: found[name] for name in ("start", *ONLINE) if name in found}
        write_text(output / "real_online.md", online_page(found, probe, study))
        write_json(output / "real_online.json", {"settings": about, "probe": probe, "methods": found})
        for name in ("thr", "aepo"):
            record = runs / f"{name}-0/train/rollouts.jsonl"  # none where no group had right and wrong completions
            if record.exists():
                write_text(output.parent / f"images/real-{name}.svg", maps(record))


def online_page(found: dict[str, list[dict[str, Any]]], probe: dict[str, float], study: Online) -> str:
    shares = ", ".join(f"{level} {share:.0%}" for level, share in probe.items())
    every = [entry for entries in found.values() for entry in entries]
    dates, trained_on = ([*sorted({e[key] for e in every if key in e})] for key in ("date", "trained"))
    text = [
        "# Online methods on a published model",
        "",
        f"`python -m benchmarks.real_training online --updates {study.updates} --prompts {len(study.held)} "
        f"--tokens {study.tokens} --problems {len(study.gsm8k)} --longer {study.longer}`, {' and '.join(dates)} "
        f"(trained {' and '.join(trained_on)}), one thread a run. SmolLM2-135M-Instruct in bfloat16 with LoRA of rank "
        f"{LORA['r']} on sums; an update is {PROMPTS} prompts of 8 completions. The levels are a + b (1), "
        "a × b (2), p + b (3), p + q (4), a × b + c (5) and a + b + c (6), with a, b, c below 10 and p, q from 11 to "
        f"40. The start model solves {shares}. Trained and reported are those between 10 % and 60 %; nothing is "
        "trained on GSM8K, and only the first seed's models are asked it. Intervals are 95 %, over problems; "
        "*minus start* is pass@1 on the same problems minus that of the start model. Words are those of a "
        "completion. Tokens per second are those of sampling in training, by the clock: other runs on the same "
        "machine slow it down. Prompts are those sampled per update: THR draws others for those whose completions are "
        "all right or all wrong, and so does *grpo_refill*, its recipe without token weights. RTO's guide and reward "
        "model take 25 steps of 8 pairs each, a right and a wrong answer of the start model to the same sum.",
        "",
        "| method | seed | pass@1 | minus start | pass@8 | maj@8 | words | GSM8K pass@1 | GSM8K pass@8 | prompts "
        "| tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    start = torch.tensor(found["start"][0]["each"])
    for name, entries in found.items():
        for entry in entries:
            minus = mean_interval(torch.tensor(entry["each"]) - start) if name != "start" else None
            shown = [entry["pass@1"], minus, entry["pass@8"], entry["maj@8"]]
            asked = [entry["GSM8K"][key] for key in ("pass@1", "pass@8")] if "GSM8K" in entry else [None, None]
            cells = ["{:.3f} ({:.3f} to {:.3f})".format(*one) if one else "–" for one in (*shown, *asked)]
            cells.insert(4, f"{entry['words']:.1f}")
            cells += [f"{entry[key]:.{digits}f}" if key in entry else "–" for key, digits in ((DRAWN, 1), (SPEED, 0))]
            text.append(f"| {name} | {entry.get('seed', '–')} | " + " | ".join(cells) + " |")
    return "\n".join([*text, "", *online_differences(found)])


def online_differences(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of the page: pass@1 of two methods on the same problems, a mean over the seeds that both have."""
    each = {name: {entry.get("seed", 0): torch.tensor(entry["each"]) for entry in found[name]} for name in found}
    pairs = [(name, "grpo") for name in found if name not in ("start", "grpo")] + [("thr", "grpo_refill")]
    lines = [
        "## Differences",
        "",
        "pass@1 on the same problems, a mean over seeds. Intervals are over problems alone: that another training of "
        "the same method ends elsewhere, the seeds above show.",
        "",
        "| method | minus | seeds | difference |",
        "|---|---|---|---|",
    ]
    for name, other in pairs:
        seeds = sorted(each.get(name, {}).keys() & each.get(other, {}).keys())
        if seeds:
            minus = torch.stack([each[name][seed] - each[other][seed] for seed in seeds]).mean(0)
            cells = "{:.3f} ({:.3f} to {:.3f})".format(*mean_interval(minus))
            lines.append(f"| {name} | {other} | {len(seeds)} | {cells} |")
    return [*lines, ""]


MAPS = {"entropy": "entropy, nats", "thr": "THR", "advantages": "advantage"}


def maps(rollouts: Path) -> str:
    """A right and a wrong completion of a rollout, token by token, under what was known of them."""
    by_rollout: dict[int, list[dict[str, Any]]] = {}
    for entry in read_log(rollouts):
        by_rollout.setdefault(entry["rollout"], []).append(entry)
    differing = [group for group in by_rollout.values() if len({entry["reward"] for entry in group}) > 1]
    group = sorted((differing or list(by_rollout.values()))[-1], key=lambda entry: -entry["reward"])
    parts, y = list[str](), MARGIN
    for entry in (group[0], group[-1]):
        y += LINE
        asked = entry["prompt"].split("user\n")[-1].split("<|im_end|>")[0]
        what = f"{escape(asked)}: reward {entry['reward']:g}, before update {entry['step'] + 1}"
        parts.append(f'<text class="head" x="{MARGIN}" y="{y}">{what}</text>')
        for column, title in MAPS.items():
            if column in entry:
                y += WHAT
                parts.append(f'<text class="what" x="{MARGIN}" y="{y}">{title}</text>')
                values = entry[column]
                drawn, lines = words(pieces(Side(entry["tokens"], values), colour_scale(values)), y + WHAT)
                parts.append(drawn)
                y += lines * LINE
    return svg_of(parts, y + MARGIN, "entropy and THR of sampled tokens")


if __name__ == "__main__":
    app()
