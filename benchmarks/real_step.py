"""A step of SmolLM2-135M-Instruct beside TRL's at its best settings: CPU seconds and peak memory.

    python -m benchmarks.real_step --output docs/results
    python -m benchmarks.real_step --output docs/results --part grpo

Pairs are HH's, as chats; a rollout has random tokens. TRL has its fused head and no gradient checkpointing, and the
optimiser that both trainers take by default. What is measured stays in the file of results: a call measures what is not
there, or the parts it names. CPU seconds of one thread: other processes hardly stretch them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tests.real.models import place

from benchmarks import online_step
from benchmarks.online_updates import OnlineSetting
from benchmarks.preference_step import compare, compare_memory
from benchmarks.setting import Setting
from benchmarks.timing import CLOCKS, machine
from tokengrain.errors import read_json, write_json

WEIGHTS, VOCABULARY = str(place("smollm2")), 49_152
PAIRS = Setting(weights=WEIGHTS, data="../shared/data/hh-harmless-pairs.jsonl.gz")
FEWER = PAIRS.with_(pairs=4)  # three sides in 16 GB
RANDOM = Setting(weights=WEIGHTS, vocabulary=VOCABULARY, pairs=4)
ROLLOUT = Setting(weights=WEIGHTS, vocabulary=VOCABULARY, prompt=(150, 150))


def _pairs(setting: Setting, peer: str) -> Callable[[int], dict[str, Any]]:
    return lambda repeats: compare(setting, [peer], repeats, "cpu_seconds")


def _memory(setting: Setting) -> Callable[[int], dict[str, Any]]:
    return lambda _: compare_memory(setting, "trl", whole=True)


def _rollout(completion: tuple[int, int], parts: int, minibatches: int = 2) -> Callable[[int], dict[str, Any]]:
    setting = OnlineSetting(ROLLOUT.with_(completion=completion), prompts=2, minibatches=minibatches)
    return lambda repeats: online_step.compare(setting, ["trl"], repeats, clock=CLOCKS["cpu_seconds"], parts=parts)


PARTS = {
    "dpo": _pairs(PAIRS, "trl"),
    "dpo, LoRA": _pairs(FEWER.with_(lora=16), "trl"),
    "dpo, random": _pairs(RANDOM, "trl"),
    "tdpo2": _pairs(FEWER.with_(method="tdpo2"), "plain"),  # TRL has none
    "grpo": _rollout((100, 100), 2),
    "grpo, lengths": _rollout((20, 180), 2),
    "grpo, one update": _rollout((100, 100), 2, 1),
    "memory": _memory(FEWER),
    "memory, LoRA": _memory(FEWER.with_(lora=16)),
}


def main(
    output: Annotated[Path, typer.Option(help="folder of real_step_cpu.json")] = Path("docs/results"),
    part: Annotated[list[str] | None, typer.Option(help=f"of {'; '.join(PARTS)}; repeatable")] = None,
    repeats: Annotated[int, typer.Option(help="rounds after the first")] = 2,
) -> None:
    """Measure, and keep what was measured."""
    torch.set_num_threads(1)
    target = output / "real_step_cpu.json"
    output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = read_json(target) if target.exists() else {}
    for name in part or [name for name in PARTS if name not in found]:
        command = f'python -m benchmarks.real_step --part "{name}" --repeats {repeats}'
        found[name] = {**PARTS[name](repeats), "machine": machine() | {"command": command}}
        write_json(target, found)
        print(real_table({name: found[name]}), flush=True)


def real_table(found: dict[str, Any]) -> str:
    """The measured parts as a Markdown table."""
    lines = ["| step | against | CPU seconds, ours | theirs | ours is × as fast |", "|---|---|---|---|---|"]
    for result in found.values():
        ours, *others = result.get("steps") or result.get("sides") or [None]
        for other in others:
            ratio = result["faster_than"][other["name"]]
            spread = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"
            cells = result["setting"], other["name"], f"{ours['median_s']:.1f}", f"{other['median_s']:.1f}", spread
            lines.append(f"| {' | '.join(cells)} |")
    memory = [result for result in found.values() if "trl_mib" in result]
    if memory:
        lines += ["", "| step | peak memory, ours | TRL's | share |", "|---|---|---|---|"]
        lines += [
            f"| {r['setting']} | {r['ours_mib'] / 1024:.1f} GiB | {r['trl_mib'] / 1024:.1f} GiB | {r['share']:.2f} |"
            for r in memory
        ]
    made = [result["machine"] for result in found.values()]
    commands = "; ".join(f"`{m['command']}`, {m['date']}" for m in made)
    return "\n".join([*lines, "", f"{commands}; {made[-1]['cpu']}, one thread, torch {made[-1]['torch']}."])


if __name__ == "__main__":
    typer.run(main)
