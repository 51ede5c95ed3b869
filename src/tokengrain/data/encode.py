"""`Example` -> `Sample`: render, tokenise, find the seam, add EOS, read token columns, mark spans, cut to length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokengrain.batch import Completion, Sample
from tokengrain.data.config import NO_SPAN, RowError, TokenizeConfig
from tokengrain.data.formats import Example
from tokengrain.data.marking import COLUMN, Found, Marked, SpanMarker, token_column
from tokengrain.data.tokens import Encoder, Rendered, Renderer, Tokens, seam


@dataclass
class Encoded:
    """A sample and what was cut to make it; `prefix` is that of its first completion's columns.

    `spanless`: spans were looked for, and none of the sample's tokens is in one.
    """

    sample: Sample
    prefix: str
    prompt_cut: bool
    completions_cut: int
    spanless: bool = False


@dataclass(frozen=True)
class _Work:
    """A row on its way: where its result belongs, the row without tags, the spans of the tags."""

    index: int
    number: int
    row: Any
    found: Found
    example: Example
    rendered: list[Rendered]


class ExampleEncoder:
    """Turns rows into samples, many at a time.

    Args:
        tokenizer: a transformers tokenizer.
        config: settings.
        parse: row -> `Example` (`pair_example` or `single_example`).
        model_positions: longest sequence the model takes, in tokens; None: not checked.

    Raises:
        ModelError: EOS or the file of a chat template is wanted and not there.
        RecipeError: a function for spans that cannot be loaded.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: TokenizeConfig,
        parse: Callable[[Any], Example],
        model_positions: int | None = None,
    ) -> None:
        self.config, self.parse, self.model_positions = config, parse, model_positions
        self.encoder = Encoder(tokenizer, config)
        self.renderer = Renderer(tokenizer, config)
        self.marker = SpanMarker(config.span_config) if config.span_config is not None else None

    def __call__(self, rows: Sequence[tuple[int, Any]]) -> list[Encoded | RowError]:
        """One result per `(number, row)`: a sample, or why there is none.

        Raises:
            ModelError: the rows hold messages and there is no chat template.
        """
        results: list[Encoded | RowError | None] = [None] * len(rows)
        work: list[_Work] = []
        for index, (number, row) in enumerate(rows):
            try:
                row, found = self.marker.read(row) if self.marker is not None else (row, {})
                example = self.parse(row)
                work.append(_Work(index, number, row, found, example, self.renderer(example)))
            except RowError as error:
                results[index] = error
        tokens = iter(self.encoder([r.text for w in work for r in w.rendered]))
        for w in work:
            parts = [next(tokens) for _ in w.rendered]
            try:
                results[w.index] = self._encode(w, parts)
            except RowError as error:
                results[w.index] = error
        return [r for r in results if r is not None]

    def _encode(self, work: _Work, tokens: list[Tokens]) -> Encoded:
        example, rendered = work.example, work.rendered
        cut = seam(tokens, [r.prompt_end for r in rendered])
        head = self.encoder.head(rendered[0], tokens[0])
        prompt = [*head, *tokens[0].ids[:cut]]
        if not prompt:
            prompt, cut = self._least_prompt(example, tokens)
        kept_prompt = self._cut_prompt(prompt)
        completions, sides, n_cut = [], [], 0
        for side, (r, t) in enumerate(zip(rendered, tokens)):
            completion, where, shortened = self._completion(example, side, r, t, cut, len(kept_prompt))
            completions.append(completion)
            sides.append(Marked(example.completions[side], r, t, where))
            n_cut += shortened
        self._check_completions(example, completions, n_cut)
        self._check_positions(example, kept_prompt, completions)
        spanless = self._mark_spans(work, completions, sides)
        sample = Sample(kept_prompt, completions, row=work.number, raw=example.raw)
        return Encoded(sample, example.prefix[0], len(kept_prompt) < len(prompt), n_cut, spanless)

    def _mark_spans(self, work: _Work, completions: list[Completion], sides: list[Marked]) -> bool:
        """Give a pair its column of spans; whether it has none."""
        if self.marker is None or len(completions) == 1:
            return False
        columns = self.marker(work.row, work.found, sides)
        for completion, column in zip(completions, columns):
            completion.columns[COLUMN] = column[: completion.n_counted]
        spanless = not any(any(c.columns[COLUMN]) for c in completions)
        if spanless and self.marker.config.on_none != "keep":
            raise RowError(
                NO_SPAN,
                "no token of either completion is in a span",
                field=work.example.fields[0],
                value=work.example.completions[0],
                expected="a span at least, or `spans: {on_none: keep}` (or skip)",
            )
        return spanless

    def _least_prompt(self, example: Example, tokens: list[Tokens]) -> tuple[list[int], int]:
        """A prompt where there is no token for one: BOS, or the first token of plain `text`."""
        if self.encoder.bos_id is not None:
            return [self.encoder.bos_id], 0
        if not example.prompt and len(tokens[0].ids) > 1:
            return tokens[0].ids[:1], 1
        raise RowError(
            "empty prompt",
            "prompt has no token of its own, and the tokenizer has no BOS to stand for it",
            field="prompt",
            value=example.prompt,
            expected="a longer prompt, or a tokenizer with BOS",
        )

    def _cut_prompt(self, prompt: list[int]) -> list[int]:
        limit = self.config.max_prompt_length
        if limit is None or len(prompt) <= limit:
            return prompt
        if self.config.truncation_side == "right":
            return prompt[:limit]
        bos = 1 if prompt[0] == self.encoder.bos_id else 0
        return prompt[:bos] + prompt[len(prompt) - limit + bos :]

    def _completion(
        self, example: Example, side: int, rendered: Rendered, tokens: Tokens, cut: int, prompt_length: int
    ) -> tuple[Completion, list[int], bool]:
        """The completion, which of its uncut tokens count (by index into `tokens.ids`), whether it was cut."""
        ids = tokens.ids[cut:] + self.encoder.tail(rendered, tokens)
        counted = self._counted(rendered, tokens, cut, len(ids))
        room = len(ids) if self.config.max_length is None else self.config.max_length - prompt_length
        if room < min(len(ids), self.config.min_completion_length):
            raise RowError(
                "completion does not fit",
                f"completion does not fit beside a prompt of {prompt_length} tokens",
                field=example.fields[side],
                value=f"{len(ids)} tokens, room for {max(room, 0)}",
                expected=f"room for {self.config.min_completion_length} at least (max_length "
                f"{self.config.max_length}; max_prompt_length cuts prompts)",
            )
        kept = ids[:room]
        mask = counted[:room]
        where = [cut + i for i, counts in enumerate(counted) if counts]
        columns = {
            name: token_column(
                name,
                value,
                example.prefix[side] + name,
                rendered=rendered,
                tokens=tokens,
                counted=where,
                kept=sum(mask),
            )
            for name, value in example.token_columns[side].items()
        }
        return Completion(kept, None if all(mask) else mask, columns), where, len(kept) < len(ids)

    def _counted(self, rendered: Rendered, tokens: Tokens, cut: int, length: int) -> list[bool]:
        """Which of the completion's tokens count: the turns', those moved here from the prompt, EOS."""
        if rendered.turns is None or len(rendered.turns) == 1:
            return [True] * length
        counted = [False] * length
        for start, end in rendered.turns:
            first, last = tokens.within(start) - cut, tokens.touching(end) - cut
            counted[first:last] = [True] * (last - first)
        moved = tokens.within(rendered.prompt_end) - cut
        counted[:moved] = [True] * moved
        behind = len(tokens.ids) - cut
        counted[behind:] = [True] * (length - behind)
        return counted

    def _check_completions(self, example: Example, completions: list[Completion], n_cut: int) -> None:
        names = [set(c.columns) for c in completions]
        for side, present in enumerate(names):
            for name in sorted(set.union(*names) - present):
                raise RowError(
                    "missing column",
                    "is missing while the other completion has its own",
                    field=example.prefix[side] + name,
                    expected="values for both completions or for none",
                )
        for side, completion in enumerate(completions):
            if not completion.n_counted:
                raise RowError(
                    "completion does not fit",
                    "no token of the completion is left to count",
                    field=example.fields[side],
                    value=example.completions[side],
                    expected="at least one token",
                )
        if len(completions) > 1 and completions[0].ids == completions[1].ids:
            raise RowError(
                "chosen equals rejected",
                "is the same as 'chosen' " + ("once both are cut" if n_cut else "in the tokenizer's eyes"),
                field=example.fields[1],
                value=example.completions[1],
                expected="two completions that differ"
                + (f" within max_length {self.config.max_length}" if n_cut else ""),
            )

    def _check_positions(self, example: Example, prompt: list[int], completions: list[Completion]) -> None:
        if self.model_positions is None:
            return
        for side, completion in enumerate(completions):
            length = len(prompt) + len(completion.ids)
            if length > self.model_positions:
                raise RowError(
                    "longer than the model",
                    "prompt and completion are longer than the model's positions",
                    field=example.fields[side],
                    value=f"{len(prompt)} + {len(completion.ids)} = {length} tokens",
                    expected=f"at most {self.model_positions} (max_length and max_prompt_length cut rows)",
                )
