"""The online benchmark's results as tables and as a page of the docs."""

from __future__ import annotations

from typing import Any

from benchmarks.online_rollouts import PHASES

TARGETS = (
    "1.5 times as fast as our separate layout with prompts twice as long as completions, 2 times with prompts four "
    "times as long, no slower with short ones; 3 times as fast as TRL."
)
NOTHING_ELSE = 0.05
"""Largest share of a step for anything but rollout, reward, scoring and update."""


def side_rows(result: dict[str, Any]) -> list[list[str]]:
    """One row of cells per side: name, seconds (median, least, most), tokens/s, ratio, loss difference."""
    rows = []
    for side in result["sides"]:
        faster = result["faster_than"].get(side["name"])
        rows.append(
            [
                side["name"],
                *(f"{side[key]:.3f}" for key in ("median_s", "min_s", "max_s")),
                f"{side['tokens_per_s']:,.0f}",
                _ratio(faster) if faster else "–",
                f"{result['loss_difference'][side['name']]:.1e}" if faster else "–",
            ]
        )
    return rows


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})"


def phase_rows(result: dict[str, Any]) -> list[list[str]]:
    """Phases, what is left, and the wall clock: name, seconds, share."""
    wall = result["wall_s"]
    seconds = {**result["seconds"], "everything else": wall - sum(result["seconds"].values()), "whole step": wall}
    return [[name, f"{s:.3f}", f"{s / wall:.1%}"] for name, s in seconds.items()]


def overhead(result: dict[str, Any]) -> float:
    """Share of a step that is neither rollout, reward, scoring nor update."""
    named = sum(result["seconds"][name] for name in PHASES if name != "credit")
    return 1 - float(named) / float(result["wall_s"])


def markdown(report: dict[str, Any]) -> str:
    """The standard set as a page of the docs."""
    m = report["machine"]
    where = m["gpu"] or f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads"
    head = "| setting | side | median s | min | max | completion tokens/s | ours is × as fast | loss difference |"
    lines = [
        "# Speed of one online step",
        "",
        f"`{m['command']}` on {m['date']}: {where}; torch {m['torch']}, transformers {m['transformers']}. "
        "Sides alternate in one process; ratios are taken pair by pair (median, smallest–largest).",
        "",
        "## Update phase",
        "",
        "Log-probabilities of the rollout under the policy and under the reference, then the optimiser steps "
        f"(GRPO with a k3 KL term), on the same rollout. Target: {TARGETS}",
        "",
        "TRL has the number of passes per minibatch that is fastest for it here, and no gradient checkpointing. "
        "*Products in bfloat16* is mixed precision (`bf16=True`) on every side, which is what `GRPOConfig` has "
        "unless told otherwise.",
        "",
        head,
        "|" + "---|" * 8,
    ]
    for result in report["update"]:
        lines += [f"| {result['setting']} | " + " | ".join(cells) + " |" for cells in side_rows(result)]
    lines += [
        "",
        "## Rollouts",
        "",
        "The same prompts and lengths; ours also gives the log-probability of every token.",
        "",
        "| setting | side | median s | tokens/s | ours is × as fast |",
        "|---|---|---|---|---|",
    ]
    for result in report["rollout"]:
        for index, side in enumerate(result["sides"]):
            lines.append(
                f"| {result['setting']} | {side['name']} | {side['median_s']:.3f} | {side['tokens_per_s']:,.0f} | "
                + (_ratio(result["faster_than"]) if index else "–")
                + " |"
            )
    lines += ["", "## A whole step", ""]
    for result in report["split"]:
        lines += [
            f"{result['setting']}; credit: {', '.join(result['credit'])}. Neither rollout, reward, scoring nor "
            f"update: {overhead(result):.1%} (target: at most {NOTHING_ELSE:.0%}).",
            "",
            "| phase | s per rollout | share |",
            "|---|---|---|",
            *("| " + " | ".join(cells) + " |" for cells in phase_rows(result)),
            "",
        ]
    thr = report["thr"]
    share = thr["share"]
    lines += [
        "## Cost of THR",
        "",
        f"{thr['setting']}: {share['median']:.1%} of the step ({share['min']:.1%}–{share['max']:.1%}; target: at most "
        f"15 %): credit {thr['credit_s']:.3f} s, scoring {thr['scoring_with_s']:.3f} s instead of "
        f"{thr['scoring_without_s']:.3f} s, beside a step of {thr['step_without_s']:.3f} s without it. "
        f"{thr['mixed_groups']:.0%} of the groups have right and wrong completions, so that it has something to do.",
    ]
    return "\n".join(lines) + "\n"
