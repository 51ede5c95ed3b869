"""Encoder-decoders: the encoder reads every prompt once, the decoder each completion beside its prompt's states.

`encoder_rows` and `last_hidden_states` score completions; `DecoderSteps` writes them.

    encoder   prompt                               one row per prompt
    decoder   start | d_1 | d_2 | ... | d_{n-1}    one row per completion, which predicts d_1, ..., d_n

Rows are padded on the right; the decoder is causal and needs no mask for that. Completions cannot share a row: no
decoder takes position ids, and T5's bias goes by distance in the row. Tokens after the last counted one are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokengrain.batch import TokenBatch
from tokengrain.errors import ModelError, require
from tokengrain.scoring.layouts import RowCosts, Source, buckets, version_of


def start_id(lm: nn.Module) -> int:
    """The token that every decoder row begins with. Raises ModelError if neither config knows it."""
    model: Any = lm
    configs = (model.config, getattr(model.config, "decoder", None), getattr(model, "generation_config", None))
    found = next((i for c in configs if (i := getattr(c, "decoder_start_token_id", None)) is not None), None)
    message = f"{type(lm).__name__} has no decoder_start_token_id, the token that every completion starts behind; "
    message += "expected decoder_start_id (of a recipe's model:), or decoder_start_token_id in the model's config"
    if found is None:
        raise ModelError(message)
    return int(found)


def vocabularies(lm: nn.Module) -> tuple[int, int]:
    """How many tokens a prompt may use, and a completion."""
    model: Any = lm
    prompt, completion = (part.get_input_embeddings() for part in (model.get_encoder(), model.get_decoder()))
    return int(prompt.weight.shape[0]), int(completion.weight.shape[0])


@dataclass(frozen=True)
class DecoderRows:
    """One rectangle of completions: B rows of width L, n counted tokens predicted in it."""

    prompt: Tensor | None  # long [B], each row's prompt, as a row of the encoder's rectangle; None: one each, in order
    input_ids: Tensor  # long [B, L]
    source: Tensor  # long [n], flat position in [B * L] that predicts a counted token
    target: Tensor  # long [n], index of that counted token in the batch's flat vectors


@dataclass(frozen=True)
class EncoderRows:
    """One rectangle of prompts, with the rectangles of their completions."""

    input_ids: Tensor  # long [G, P]
    mask: Tensor  # long [G, P], 0 for padding
    completions: tuple[DecoderRows, ...]

    def seen(self, rows: DecoderRows, states: Tensor) -> Tensor:
        """`[G, ...]` of the prompts to `[B, ...]` of the completions."""
        return states if rows.prompt is None else states.index_select(0, rows.prompt)


class RepeatedStates(Tensor):
    """An encoder's states `[B, P, H]`, one row per completion, that know those of the prompts `[G, P, H]`.

    Every layer of the decoder projects them to keys and values. Where that is a plain linear map, it is applied to the
    prompts' and its result repeated. Whatever else a model does with them gives an ordinary tensor.
    """

    states: Tensor
    prompt: Tensor
    written: int | None

    @staticmethod
    def of(states: Tensor, prompt: Tensor | None) -> Tensor:
        """The states of each completion's prompt, by index; of None the same."""
        if prompt is None:
            return states
        repeated = states.index_select(0, prompt)
        if torch.compiler.is_compiling():
            return repeated
        found = repeated.as_subclass(RepeatedStates)
        found.states, found.prompt, found.written = states, prompt, version_of(found)
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first, *rest = args or (None,)
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear and isinstance(first, RepeatedStates) and version_of(first) == first.written:
                return func(first.states, *rest, **(kwargs or {})).index_select(0, first.prompt)
            return func(*args, **(kwargs or {}))


class _Row(NamedTuple):
    number: int  # of a prompt or a completion of the batch
    length: int


def encoder_rows(
    batch: TokenBatch,
    start: int,
    costs: RowCosts,
    device: torch.device,
    *,
    max_row_tokens: int | None = None,
    one_forward: bool = False,
) -> list[EncoderRows]:
    """Lay a batch out in rectangles; `max_row_tokens` and `one_forward` as for decoder-only models."""
    source = Source(batch)
    prompts = [_Row(g, source.prompt_length(g)) for g in range(batch.n_prompts) if source.completions[g]]

    def cut(rows: Sequence[_Row]) -> list[list[_Row]]:
        if one_forward:
            return [list(rows)] if rows else []
        ordered = sorted(rows, key=lambda row: -row.length)
        # Prompts of one length stay in the order of the batch, and their completions with them.
        return [sorted(part) for part in buckets(ordered, costs, True, max_row_tokens)]

    found = []
    for part in cut(prompts):
        ids, mask = _padded([source.prompt_ids[slice(*source.prompt_bounds[g : g + 2])] for g, _ in part], device)
        place = {g: row for row, (g, _) in enumerate(part)}
        owners = {c: place[g] for g, _ in part for c in source.completions[g]}
        rectangles = cut([_Row(c, 1 + source.kept[c]) for c in owners])
        made = (_decoder_rows(source, start, {c: owners[c] for c, _ in rows}, len(part), device) for rows in rectangles)
        found.append(EncoderRows(ids, mask.long(), tuple(made)))
    return found


def _decoder_rows(
    source: Source, start: int, completions: Mapping[int, int], n_prompts: int, device: torch.device
) -> DecoderRows:
    """The rectangle of these completions, each with its prompt's row."""
    begins = [source.bounds[c] for c in completions]
    texts = [source.completion_ids[a : a + source.kept[c]] for a, c in zip(begins, completions)]
    ids, _ = _padded([torch.cat([text.new_tensor([start]), text]) for text in texts], device)
    counted = [source.counted[source.bounds[c] : source.bounds[c + 1]].nonzero()[:, 0] for c in completions]
    at = torch.cat([offsets + row * ids.shape[1] for row, offsets in enumerate(counted)])
    flat = torch.cat([torch.arange(*source.flat_bounds[c : c + 2]) for c in completions])
    owners = list(completions.values())
    prompt = None if owners == list(range(n_prompts)) else torch.tensor(owners, device=device)
    return DecoderRows(prompt, ids, at.to(device), flat.to(device))


def _padded(texts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Texts `[B, L]` padded with each one's first token, and the mask of their own tokens."""
    lengths = torch.tensor([len(text) for text in texts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    firsts = torch.stack([text[0] for text in texts])[:, None]
    ids = firsts.expand(mask.shape).clone().masked_scatter_(mask, torch.cat(list(texts)))
    return ids.to(device), mask.to(device)


def last_hidden_states(lm: nn.Module, rows: Sequence[EncoderRows]) -> Iterator[tuple[Tensor, Tensor]]:
    """Per rectangle of completions: last hidden states `[n, H]` that predict counted tokens, and their flat indices."""
    model: Any = lm
    encoder, decoder = model.get_encoder(), model.get_decoder()
    for prompts in rows:
        states = encoder(input_ids=prompts.input_ids, attention_mask=prompts.mask).last_hidden_state
        for part in prompts.completions:
            last = decoder(
                input_ids=part.input_ids,
                encoder_hidden_states=RepeatedStates.of(states, part.prompt),
                encoder_attention_mask=prompts.seen(part, prompts.mask),
                use_cache=False,
            ).last_hidden_state
            yield last.reshape(-1, last.shape[-1]).index_select(0, part.source), part.target


def own_inputs(rows: Sequence[EncoderRows]) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """The same rectangles as arguments of the model's own forward, each prompt once per completion."""
    for prompts in rows:
        for part in prompts.completions:
            ids, mask = (prompts.seen(part, value) for value in (prompts.input_ids, prompts.mask))
            inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": part.input_ids}
            yield inputs, part.source, part.target


# ---- One token after another ----


def cache_of(output: Any) -> dict[str, Any]:
    """The cache in a model's output, by the name that the model takes it back under. Raises ModelError without one.

    transformers has called it `past_key_values`, then `cache`.
    """
    found = {name: value for name, value in output.items() if hasattr(value, "get_seq_length")}
    require(len(found) == 1, ModelError, "the model's output has no cache of keys and values")
    return found


class DecoderSteps:
    """Decoding by an encoder-decoder: the encoder runs once per prompt, the decoder once per token of a row.

    `steps(parents [n], tokens [n]) -> [n, V]` log-probabilities: row i continues row `parents[i]` of the last call with
    `tokens[i]`; in the first call, rows are prompts and tokens the start token.

    Args:
        prompts: token ids.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        rows = [torch.tensor(list(prompt)) for prompt in prompts]
        ids, mask = _padded(rows, model.device)
        self.mask = mask.long()
        self.encoded = model.get_encoder()(input_ids=ids, attention_mask=self.mask)
        self.model = model
        self.cache: dict[str, Any] = {}

    def __call__(self, parents: Tensor, tokens: Tensor) -> Tensor:
        if not torch.equal(parents, torch.arange(len(self.mask), device=parents.device)):
            self.mask, states = self.mask[parents], self.encoded.last_hidden_state[parents]
            self.encoded = type(self.encoded)(last_hidden_state=states)  # Switch takes no tuple
            for cache in self.cache.values():
                cache.reorder_cache(parents)
        output = self.model(
            encoder_outputs=self.encoded,
            attention_mask=self.mask,
            decoder_input_ids=tokens[:, None],
            use_cache=True,
            **self.cache,
        )
        self.cache = cache_of(output)
        logits = output.logits[:, -1]
        return torch.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, -1)
