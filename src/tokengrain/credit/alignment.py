"""Token scores across tokenizers: from the tokens of one to those of another, by the characters they share.

The rule. A token's score is the mean of the scores of the other tokenizer's tokens that share characters with it,
weighted by the number of characters shared. So what a token receives, times its characters, adds up to the same over
a text on both sides. A token without characters (EOS, other special tokens) takes the score of the other
tokenizer's last token, which is its EOS where the text is complete. Where all of a token's characters are dropped by
the other tokenizer (white space), it takes the score of the token before them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# How many tokens before a token are decoded with it: enough for a character of four bytes and a leading space.
CONTEXT = 5
UNFINISHED = "\ufffd"

Span = tuple[int, int]


def aligned_scores(scores: Tensor, spans: Sequence[Span], target: Sequence[Span]) -> Tensor:
    """Scores `[R]` of tokens at `spans`, carried over to tokens at `target`; see the top of the file.

    Args:
        scores: `[R]`, R > 0; the last one is that of EOS or, in a text cut short, of the last token.
        spans, target: the characters `[start, end)` of each token, in the same text; empty for a token without
            characters. Tokens that only together make a character have the same span.

    Returns:
        `[T]`, of the type and on the device of `scores`.
    """
    if scores.shape != (len(spans),) or not len(spans):
        raise ValueError(f"expected one score per span and at least one, got {tuple(scores.shape)} and {len(spans)}")
    solid = [i for i, (start, end) in enumerate(spans) if end > start]
    ends = [spans[i][1] for i in solid]
    rows, columns, shared = [], [], []
    for row, (start, end) in enumerate(target):
        near = bisect_right(ends, start)  # the first token that reaches beyond our start
        found = []
        for i in solid[near:] if end > start else ():
            if spans[i][0] >= end:
                break
            found.append((i, min(end, spans[i][1]) - max(start, spans[i][0])))
        if not found:
            before = solid[max(near - 1, 0)] if solid and end > start else len(spans) - 1
            found = [(before, 1)]
        rows += [row] * len(found)
        columns += [i for i, _ in found]
        shared += [n for _, n in found]
    index = torch.tensor(rows, dtype=torch.long, device=scores.device)
    weights = torch.tensor(shared, dtype=scores.dtype, device=scores.device)
    taken = weights * scores[torch.tensor(columns, dtype=torch.long, device=scores.device)]
    zeros = scores.new_zeros(len(target))
    return zeros.index_add(0, index, taken) / zeros.index_add(0, index, weights)


def decoded_spans(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text that `ids` add behind `before`, and the characters of it that each token stands for.

    Works for any tokenizer that decodes, and for ids that no text would be tokenised to. Special tokens have no
    characters. Tokens that only together make a character (bytes of it) all have that character's span.
    """
    special = set(tokenizer.all_special_ids)
    text = ""
    spans: list[Span] = []
    context, pending = list(before[-CONTEXT:]), list[int]()
    known, shown = _decoded(tokenizer, context), ""
    for place, token in enumerate(ids):
        pending.append(token)
        if token not in special:
            shown = _decoded(tokenizer, context + pending)[len(known) :]
        follows = place + 1 < len(ids) and ids[place + 1] not in special
        if follows and len(pending) < CONTEXT and (not shown or shown.endswith(UNFINISHED)) and token not in special:
            continue  # the rest of the character is yet to come
        spans += [(len(text), len(text) + len(shown))] * len(pending)
        text += shown
        context = (context + pending)[-CONTEXT:]
        pending, known, shown = [], _decoded(tokenizer, context), ""
    return text, spans


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
