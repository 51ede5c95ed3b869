"""Time one optimiser step of a preference method against plain transformers and against TRL.

    python -m benchmarks.preference_step run --method dpo --peer plain --peer trl
    python -m benchmarks.preference_step run --prompt 16 --completion 256
    python -m benchmarks.preference_step memory --method tdpo2 --vocabulary 128256 --completion 512 --pairs 4
    python -m benchmarks.preference_step standard --output docs/results

Steps alternate in one process; the ratio is taken pair by pair. Same model, pairs, precision and optimiser on
every side; the losses of the second step are compared to show that the work is the same.
"""

from __future__ import annotations

import math
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.setting import Setting, build_samples
from benchmarks.steps import OursStep
from benchmarks.timing import CLOCKS, Timing, machine, peak_memory, ratio, synchronise, time_alternating
from tokengrain.errors import write_json, write_text

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)
console = Console()
MEMORY = Setting(pairs=4, prompt=(128, 128), completion=(512, 512), vocabulary=128_256, hidden=256, layers=2, heads=4)


def _bounds(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def compare(setting: Setting, peers: list[str], repeats: int, clock: str = "seconds") -> dict[str, Any]:
    """Ours against each peer, on the same pairs."""
    samples = build_samples(setting)
    # Tokens of the padded-free separate rows: what a user would count, the same for every side.
    tokens = sum(2 * len(s.prompt_ids) + sum(len(c.ids) for c in s.completions) for s in samples)
    timings = time_alternating(setting, ["ours", *peers], repeats, clock=CLOCKS[clock])
    ours = timings[0]
    return {
        "setting": setting.label(),
        "tokens": tokens,
        "steps": [t.summary(tokens) for t in timings],
        "faster_than": {t.name: ratio(t, ours) for t in timings[1:]},
        "loss_difference": {t.name: abs(t.second_loss - ours.second_loss) for t in timings[1:]},
    }


def compare_memory(setting: Setting, peer: str = "plain", *, whole: bool = False) -> dict[str, Any]:
    ours, other = (peak_memory(setting, side, whole=whole) for side in ("ours", peer))
    return {"setting": setting.label(), "ours_mib": ours, f"{peer}_mib": other, "share": ours / other}


def own_ratio(slow: Setting, fast: Setting, repeats: int) -> dict[str, Any]:
    """Time of our step in one setting over that in another, alternating."""
    steps = [OursStep(slow), OursStep(fast)]
    timings = [Timing(setting.label(), [], 0.0) for setting in (slow, fast)]
    for round_ in range(repeats + 1):
        for step, timing in zip(steps, timings, strict=True):
            synchronise(slow.device)
            start = time.perf_counter()
            step.step()
            synchronise(slow.device)
            if round_:
                timing.seconds.append(time.perf_counter() - start)
    return {
        "slow": slow.label(),
        "fast": fast.label(),
        "slow_s": timings[0].summary(1)["median_s"],
        "fast_s": timings[1].summary(1)["median_s"],
        "ratio": ratio(*timings),
    }


def scaling(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """Seconds and memory per step at four sizes, same sequence lengths, more pairs."""
    rows = []
    for pairs in (2, 4, 8, 16):
        size = setting.with_(pairs=pairs)
        result = compare(size, [], repeats)
        memory = peak_memory(size, "ours")
        seconds = result["steps"][0]["median_s"]
        tokens = result["tokens"]
        rows.append(
            {
                "pairs": pairs,
                "tokens": tokens,
                "median_s": seconds,
                "us_per_token": 1e6 * seconds / tokens,
                "peak_mib": memory,
                "kib_per_token": 1024 * memory / tokens,
            }
        )
    return rows


def show(result: dict[str, Any]) -> None:
    table = Table(title=result["setting"], title_justify="left")
    for column in ("", "median s", "min", "max", "tokens/s", "ours is × as fast (min–max)", "|loss − ours|"):
        table.add_column(column, justify="left" if not column else "right")
    for step in result["steps"]:
        faster = result["faster_than"].get(step["name"])
        table.add_row(
            step["name"],
            *(f"{step[key]:.3f}" for key in ("median_s", "min_s", "max_s")),
            f"{step['tokens_per_s']:,.0f}",
            f"{faster['median']:.2f} ({faster['min']:.2f}–{faster['max']:.2f})" if faster else "",
            f"{result['loss_difference'][step['name']]:.1e}" if faster else "",
        )
    console.print(table)


def markdown(report: dict[str, Any]) -> str:
    """The standard set as a page of the docs."""
    m = report["machine"]
    where = m["gpu"] or f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads"
    lines = [
        "# Speed and memory of one preference step",
        "",
        f"`{m['command']}` on {m['date']}: {where}; torch {m['torch']}, transformers {m['transformers']}. "
        "Steps alternate in one process; ratios are taken pair by pair (median, smallest–largest).",
        "",
        "| setting | step | median s | min–max | tokens/s | ours is × as fast | loss difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in report["speed"]:
        for step in result["steps"]:
            faster = result["faster_than"].get(step["name"])
            lines.append(
                f"| {result['setting']} | {step['name']} | {step['median_s']:.3f} "
                f"| {step['min_s']:.3f}–{step['max_s']:.3f} | {step['tokens_per_s']:,.0f} | "
                + (f"{faster['median']:.2f} ({faster['min']:.2f}–{faster['max']:.2f})" if faster else "–")
                + " | "
                + (f"{result['loss_difference'][step['name']]:.1e} |" if faster else "– |")
            )
    lines += [
        "",
        "## What a method costs beside another, both ours",
        "",
        "| step | median s | beside | median s | ratio (min–max) |",
        "|---|---|---|---|---|",
    ]
    for row in report["ratios"]:
        r = row["ratio"]
        lines.append(
            f"| {row['slow']} | {row['slow_s']:.3f} | {row['fast']} | {row['fast_s']:.3f} "
            f"| {r['median']:.2f} ({r['min']:.2f}–{r['max']:.2f}) |"
        )
    lines += [
        "",
        "## Peak memory of a step above weights, gradients and optimiser state",
        "",
        "| setting | tokengrain, MiB | plain transformers, MiB | share |",
        "|---|---|---|---|",
    ]
    for row in report["memory"]:
        lines.append(f"| {row['setting']} | {row['ours_mib']:,.0f} | {row['plain_mib']:,.0f} | {row['share']:.2f} |")
    lines += [
        "",
        "## Growth with the number of tokens (same sequence lengths, more pairs)",
        "",
        "| pairs | tokens | median s | µs per token | peak MiB | KiB per token |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["scaling"]:
        lines.append(
            f"| {row['pairs']} | {row['tokens']:,} | {row['median_s']:.3f} | {row['us_per_token']:.0f} "
            f"| {row['peak_mib']:,.0f} | {row['kib_per_token']:.0f} |"
        )
    return "\n".join(lines) + "\n"


Pairs = Annotated[int, typer.Option(help="preference pairs per step")]
Lengths = Annotated[str, typer.Option(help="tokens, a number or a range such as 128-384")]


@app.command()
def run(
    method: Annotated[str, typer.Option(help="dpo, tdpo2, aligndistil")] = "dpo",
    peer: Annotated[list[str], typer.Option(help="plain, trl; repeat for both")] = ["plain"],  # noqa: B006
    pairs: Pairs = 8,
    prompt: Lengths = "128-384",
    completion: Lengths = "32-128",
    vocabulary: int = 32_000,
    hidden: int = 384,
    layers: int = 6,
    heads: int = 6,
    intermediate: int = 1024,
    device: str = "cpu",
    precision: str = "float32",
    weights: Annotated[str, typer.Option(help="folder of a model; give its --vocabulary, or --data")] = "",
    data: Annotated[str, typer.Option(help="file of pairs of text instead of random tokens")] = "",
    lora: Annotated[int, typer.Option(help="rank of adapters that are trained instead of all weights")] = 0,
    cpu_seconds: Annotated[bool, typer.Option(help="of this process: others do not stretch them")] = False,
    repeats: int = 7,
) -> None:
    """Time one setting."""
    setting = Setting(
        method,
        pairs,
        _bounds(prompt),
        _bounds(completion),
        vocabulary,
        hidden,
        layers,
        heads,
        intermediate,
        device,
        precision,
        weights=weights,
        data=data,
        lora=lora,
    )
    show(compare(setting, peer, repeats, "cpu_seconds" if cpu_seconds else "seconds"))


@app.command()
def memory(
    method: str = "dpo",
    pairs: Pairs = 4,
    prompt: Lengths = "128",
    completion: Lengths = "512",
    vocabulary: int = 128_256,
    hidden: int = 256,
    layers: int = 2,
    device: str = "cpu",
) -> None:
    """Peak memory of one step, ours and plain, each in a fresh process."""
    setting = MEMORY.with_(
        method=method,
        pairs=pairs,
        prompt=_bounds(prompt),
        completion=_bounds(completion),
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        device=device,
    )
    console.print_json(data=compare_memory(setting))


@app.command()
def standard(
    output: Annotated[Path, typer.Option(help="folder for preference_step_<device>.{json,md}")] = Path("docs/results"),
    device: str = "cpu",
    repeats: int = 7,
) -> None:
    """The set that the documentation quotes (about ten minutes on two cores)."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    base = Setting(device=device)
    if device == "cuda":
        base = base.with_(
            precision="bfloat16",
            pairs=16,
            hidden=2048,
            layers=16,
            heads=16,
            intermediate=8192,
            vocabulary=128_256,
        )
    report: dict[str, Any] = {"machine": machine(), "speed": []}
    peers = ["plain", "trl"] if find_spec("trl") else ["plain"]
    settings = [
        (base, peers),
        (base.with_(prompt=(16, 16), completion=(256, 256)), ["plain"]),
        (base.with_(method="tdpo2"), ["plain"]),
    ]
    if device == "cuda":
        settings.append((base.with_(attention="flex_attention"), ["plain"]))
    for setting, against in settings:
        report["speed"].append(compare(setting, against, repeats))
        show(report["speed"][-1])
        write_json(output / f"preference_step_{device}.json", report)
    spans = base.with_(method="rrpo", share=0.2)
    selected = base.with_(
        method="sepo", vocabulary=128_256, hidden=512, heads=8, layers=2, prompt=(256, 256), completion=(128, 128)
    )
    report["ratios"] = [
        own_ratio(base.with_(method="tdpo2"), base, repeats),
        own_ratio(spans, base, repeats),
        own_ratio(base.with_(method="aligndistil"), base, repeats),
        own_ratio(selected, selected.with_(share=0.3), repeats),
    ]
    write_json(output / f"preference_step_{device}.json", report)
    memory = ("dpo", "tdpo2", "aligndistil")
    report["memory"] = [compare_memory(MEMORY.with_(method=m, device=device)) for m in memory]
    report["scaling"] = scaling(base.with_(prompt=(256, 256), completion=(80, 80)), max(3, repeats // 2))
    write_json(output / f"preference_step_{device}.json", report)
    write_text(output / f"preference_step_{device}.md", markdown(report))
    console.print(f"written to {output}/preference_step_{device}.md")
    slowest = min((math.inf, *(r["median"] for s in report["speed"] for r in s["faster_than"].values())))
    console.print(f"smallest speed-up in the set: {slowest:.2f}×")


if __name__ == "__main__":
    app()
