"""Credit that is known exactly in the world `stories`: the advantage of every token, and controls for it."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from tokengrain.batch import Segments, TokenBatch
from tokengrain.errors import RecipeError
from tokengrain.files import fingerprint
from tokengrain.worlds.stories import exact
from tokengrain.worlds.stories.grammar import Grammar, Walk

CreditKind = Literal["advantage", "flipped", "random", "reward", "worth"]


def walk_batch(grammar: Grammar, batch: TokenBatch) -> tuple[Walk, Tensor, Tensor]:
    """Walk along every completion of a batch.

    Returns:
        The walk over completions padded to `[C, L]`; their ids `[C, L]`; and bool `[C, L]`, the counted
        tokens, whose order is that of the flat vectors.

    Raises:
        DataError: if a prompt is not one of this world's.
    """
    prompts = [grammar.parse_prompt(batch.prompt(i).tolist()) for i in range(batch.n_prompts)]
    segments = Segments(batch.completion_offsets.cpu())
    ids, _ = segments.to_padded(batch.completion_ids.cpu(), fill=grammar.pad)
    counted, _ = segments.to_padded(batch.counted.cpu(), fill=False)
    return grammar.walk([prompts[g] for g in batch.group.tolist()], ids), ids, counted


class WorldCredit:
    """A credit source that reads the grammar. Called with a batch, gives one number per counted token, `[N]`.

    Args:
        kind: `advantage`, the exact soft advantage A(s, a) at temperature `beta`; `flipped`, −A; `random`, as
            large as A but drawn without looking (normal, standard deviation `RANDOM_SCALE`, the same for the
            same tokens); `reward`, the token's own reward; `worth`, what the word looks worth without
            context.
        scale: factor on the credit.
    """

    RANDOM_SCALE = 0.53

    def __init__(
        self,
        grammar: Grammar,
        kind: CreditKind = "advantage",
        *,
        beta: float = 1.0,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        if kind not in get_args(CreditKind):
            raise RecipeError(f"unknown credit {kind!r} of world stories; expected one of {get_args(CreditKind)}")
        self.grammar, self.kind, self.beta, self.scale, self.seed = grammar, kind, beta, scale, seed
        self.name = f"stories-{kind}"
        self._advantage = exact.advantages(grammar, exact.soft_values(grammar, beta))

    def fingerprint(self) -> str:
        """Identifies the source: the grammar, the kind and its settings."""
        return fingerprint([self.grammar.fingerprint, self.kind, self.beta, self.scale, self.seed])

    @torch.no_grad()
    def __call__(self, batch: TokenBatch) -> Tensor:
        walk, ids, counted = walk_batch(self.grammar, batch)
        if self.kind == "reward":
            credit = walk.rewards
        elif self.kind == "worth":
            credit = self.grammar.worth[ids]
        elif self.kind == "random":
            credit = torch.stack([self._noise(row) for row in ids.masked_fill(~counted, self.grammar.pad)])
        else:
            sign = -1 if self.kind == "flipped" else 1
            credit = sign * self._advantage[walk.tables[:, None], walk.states, ids]
        return (self.scale * credit[counted]).float().to(batch.device)

    def _noise(self, ids: Tensor) -> Tensor:
        """Noise that depends on the completion's tokens only, so that batching does not change it."""
        words = ids[: int((ids != self.grammar.pad).sum())].tolist()
        generator = torch.Generator().manual_seed(int(fingerprint([self.seed, words]), 16) >> 1)
        noise = torch.zeros(len(ids), dtype=torch.float64)
        noise[: len(words)] = torch.randn(len(words), generator=generator, dtype=torch.float64) * self.RANDOM_SCALE
        return noise


def decision_states(grammar: Grammar, advantage: Tensor, spread: float = 1e-3) -> Tensor:
    """States `[T, S]` where something is decided: A deviates under the base by more than `spread`."""
    p = grammar.dense(grammar.edge_logp.exp(), 0.0)
    mean = (p * advantage).sum(-1, keepdim=True)
    return (p * (advantage - mean).square()).sum(-1).sqrt() > spread
