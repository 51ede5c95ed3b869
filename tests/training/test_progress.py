"""What is shown while something is counted: lines without a terminal, a bar that leaves nothing behind with one."""

from __future__ import annotations

import io

from rich.console import Console

from tests.credit.small import llama, tokenizer
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import PromptItem, SamplingConfig
from tokengrain.screen import counting, progress_bar


def test_lines_without_a_terminal() -> None:
    out = io.StringIO()
    with progress_bar("samples", console=Console(file=out, width=80)) as update:
        counting(update)(2, 4)
    assert out.getvalue() == "samples: 2 of 4\n"


def test_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with progress_bar("samples", console=Console(file=out, width=80, force_terminal=True)) as update:
        counting(update)(3, 4)
    assert "samples" in out.getvalue()
    assert "3/4" in out.getvalue()


def test_nothing_where_nothing_is_to_be_shown() -> None:
    out = io.StringIO()
    with progress_bar("samples", quiet=True, console=Console(file=out)) as update:
        counting(update)(3, 4)
    assert not out.getvalue()


def test_a_sampler_says_how_many_completions_are_drawn() -> None:
    told: list[tuple[int, int]] = []
    sampler = HFGenerate(llama().float(), tokenizer(), max_batch_tokens=30)
    sampler.progress = lambda done, total: told.append((done, total))
    sampler.sample([PromptItem([3, 4, 5], row=i) for i in range(3)], n=2, sampling=SamplingConfig(max_new_tokens=4))
    assert len(told) > 1
    assert told == sorted(told)
    assert told[-1] == (6, 6)
