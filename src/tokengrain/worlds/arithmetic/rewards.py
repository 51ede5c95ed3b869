"""Rewards of the world `arithmetic`, as `RewardSuite` takes them."""

from __future__ import annotations

from collections.abc import Sequence

from tokengrain.worlds.arithmetic.audit import Ending, is_correct, read, symbols
from tokengrain.worlds.arithmetic.problems import EOS, parse_prompt


def completion_symbols(
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    truncated: Sequence[bool] | None = None,
) -> list[list[str]]:
    """Completions as symbols: from their ids, or from their texts (which end unless `truncated`)."""
    if completion_ids is not None:
        return [symbols(ids) for ids in completion_ids]
    cut = truncated if truncated is not None else [False] * len(completions)
    return [[*text.removesuffix(EOS), *([] if short else [EOS])] for text, short in zip(completions, cut, strict=True)]


def correct(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    truncated: Sequence[bool] | None = None,
    *,
    ending: Ending = "answer",
) -> list[float]:
    """1 for completions that end with `>`, the right two digits and `<end>`, else 0.

    Args:
        prompts: texts of the prompts; the right answer follows from them.
        completions: texts without special tokens.
        completion_ids: token ids; without them a completion is taken to end unless it is `truncated`.
        ending: `marker` where something follows the chain: then the last total before `>` must be right.
    """
    tokens = completion_symbols(completions, completion_ids, truncated)
    return [float(is_correct(parse_prompt(p), chain, ending)) for p, chain in zip(prompts, tokens, strict=True)]


def well_formed(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]] | None = None,
    truncated: Sequence[bool] | None = None,
    *,
    ending: Ending = "answer",
) -> list[float]:
    """1 for completions with as many steps as the prompt, each with a total, and an answer, right or wrong; else 0."""
    tokens = completion_symbols(completions, completion_ids, truncated)
    steps = [len(parse_prompt(prompt).steps) for prompt in prompts]
    return [float(read(chain, n, ending)[1] is None) for chain, n in zip(tokens, steps, strict=True)]
