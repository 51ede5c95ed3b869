"""Row -> `Sample`: parse, render, tokenise, find the prompt boundary, add EOS, read columns, mark spans, cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokengrain.batch import Completion, Sample
from tokengrain.data.config import NO_SPAN, RowError, TokenizeConfig, check
from tokengrain.data.formats import (
    Example,
    canonical,
    has_several_rejected,
    may_have_pictures,
    pair_example,
    single_example,
    stored_row,
)
from tokengrain.data.marking import COLUMN, Found, Marked, SpanMarker, no_spans, parsed_list, token_column
from tokengrain.data.pictures import paths_in
from tokengrain.data.rows import Rows
from tokengrain.data.tokens import Clock, Encoder, Rendered, Renderer, Tokens, prompt_boundary, text_tokenizer
from tokengrain.data.vision import PictureReader, View, folder_of

SEVERAL = "spans go with one rejected completion, got several"


@dataclass
class Encoded:
    """A sample and what was cut to make it."""

    sample: Sample
    prefix: str  # of its first completion's columns
    prompt_cut: bool
    completions_cut: int
    spanless: bool = False  # spans were looked for, and none of the sample's tokens is in one
    dropped: tuple[str, ...] = ()  # what the chat template left out
    ended: int = 0  # how many texts ended in a special token already when EOS was added


@dataclass(frozen=True)
class _Work:
    """A row on its way."""

    number: int
    row: Any  # without tags
    found: Found  # the spans of the tags
    example: Example
    rendered: list[Rendered]
    view: View | None


class ExampleEncoder:
    """Turns rows into samples, many at a time; `parse` makes an `Example` of a row.

    `processor` is a tokenizer, or the processor of a model that sees. `model_positions` is the longest sequence the
    model takes, in tokens (None: not checked); `clock` the time for a template that writes the date; `place(number)`
    says where a row is from, which the paths of its pictures are relative to.
    """

    def __init__(
        self,
        processor: Any,
        config: TokenizeConfig,
        parse: Callable[[Any], Example],
        model_positions: int | None = None,
        clock: Clock | None = None,
        place: Callable[[int], tuple[str, str]] | None = None,
    ) -> None:
        self.config, self.parse, self.model_positions = config, parse, model_positions
        self.encoder = Encoder(processor, config)
        self.renderer = Renderer(processor, config, clock)
        self.pictures, self.place = PictureReader(processor, config), place
        self.marker = SpanMarker(config.span_config) if config.span_config is not None else None

    def __call__(self, rows: Sequence[tuple[int, Any]]) -> list[Encoded | RowError]:
        """One result per `(number, row)`: a sample, or why there is none."""
        work: list[_Work | RowError] = []
        for number, row in rows:
            try:
                row = row if isinstance(row, Example) else canonical(row, self.config.chat)
                if self.marker is not None:
                    check(not has_several_rejected(row), "spans", SEVERAL, field="rejected", expected="one")
                row, found = self.marker.read(row) if self.marker is not None else (row, {})
                example = self.parse(row)
                work.append(_Work(number, row, found, example, *self._seen(number, example)))
            except RowError as error:
                work.append(error)
        tokens = iter(self.encoder.of([r for w in work if isinstance(w, _Work) for r in w.rendered]))
        return [w if isinstance(w, RowError) else self._encoded(w, [next(tokens) for _ in w.rendered]) for w in work]

    def _seen(self, number: int, example: Example) -> tuple[list[Rendered], View | None]:
        """The row's texts, the tokens of its pictures in their places, and these."""
        rendered = self.renderer(example)
        view = self.pictures(example, rendered[0].text[: rendered[0].prompt_end], self.place and self.place(number)[0])
        for side, one in enumerate(rendered):
            self.pictures.check_completion(one.text[one.prompt_end :], one.ids, example.fields[side])
        if view is not None:
            rendered = [one.with_prompt(view.expanded(one.text[: one.prompt_end])) for one in rendered]
        return rendered, view

    def _encoded(self, work: _Work, tokens: list[Tokens]) -> Encoded | RowError:
        try:
            return self._encode(work, tokens)
        except RowError as error:
            return error

    def _encode(self, work: _Work, tokens: list[Tokens]) -> Encoded:
        example, rendered = work.example, work.rendered
        cut = prompt_boundary(tokens, [r.prompt_end for r in rendered])
        head = self.encoder.head(rendered[0], tokens[0])
        prompt = [*head, *tokens[0].ids[:cut]]
        if not prompt:
            prompt, cut = self._least_prompt(example, tokens)
        kept_prompt = self.encoder.cut(prompt)
        self.pictures.check_whole(prompt, kept_prompt, work.view)
        completions, sides, n_cut = [], [], 0
        for side, (r, t) in enumerate(zip(rendered, tokens)):
            completion, where, shortened = self._completion(example, side, r, t, cut, len(kept_prompt))
            completions.append(completion)
            sides.append(Marked(example.completions[side], r, t, where))
            n_cut += shortened
        self._check_completions(example, completions, n_cut)
        self._check_positions(example, kept_prompt, completions)
        spanless = self._mark_spans(work, completions, sides)
        vision = None if work.view is None else work.view.vision(kept_prompt)
        sample = Sample(kept_prompt, completions, work.number, example.raw, vision)
        dropped = tuple(dict.fromkeys(name for r in rendered for name in r.dropped))
        # The text of a rendered template, to which EOS was added behind its end-of-turn token.
        plain = [r for r, t in zip(rendered, tokens) if not r.special and self.encoder.tail(r, t)]
        ended = sum(r.text.rstrip().endswith(self.renderer.end_marks) for r in plain)
        cut_prompt = len(kept_prompt) < len(prompt)
        return Encoded(sample, example.prefix[0], cut_prompt, n_cut, spanless, dropped, ended)

    def _mark_spans(self, work: _Work, completions: list[Completion], sides: list[Marked]) -> bool:
        if self.marker is None or len(completions) == 1:
            return False
        for completion, column in zip(completions, self.marker(work.row, work.found, sides)):
            completion.columns[COLUMN] = column[: completion.n_counted]
        spanless = not any(any(c.columns[COLUMN]) for c in completions)
        if spanless and self.marker.config.on_none != "keep":
            what, expected = "no token of either completion is in a span", "`spans: {on_none: keep}` (or skip)"
            details = {"field": work.example.fields[0], "value": work.example.completions[0]}
            raise RowError(NO_SPAN, what, **details, expected=f"a span at least, or {expected}")
        return spanless

    def _least_prompt(self, example: Example, tokens: list[Tokens]) -> tuple[list[int], int]:
        """A prompt where there is no token for one: BOS, or the first token of plain `text`."""
        if self.encoder.bos_id is not None:
            return [self.encoder.bos_id], 0
        if not example.prompt and len(tokens[0].ids) > 1:
            return tokens[0].ids[:1], 1
        what = "prompt has no token of its own, and the tokenizer has no BOS to stand for it"
        expected = "a longer prompt, or a tokenizer with BOS"
        raise RowError("empty prompt", what, field="prompt", value=example.prompt, expected=expected)

    def _completion(
        self, example: Example, side: int, rendered: Rendered, tokens: Tokens, cut: int, prompt_length: int
    ) -> tuple[Completion, list[int], bool]:
        """The completion, which of its uncut tokens count (by index into `tokens.ids`), whether it was cut."""
        ids = tokens.ids[cut:] + self.encoder.tail(rendered, tokens)
        counted = self._counted(rendered, tokens, cut, len(ids))
        room = len(ids) if self.config.max_length is None else self.config.max_length - prompt_length
        what = f"completion does not fit beside a prompt of {prompt_length} tokens"
        least, got = self.config.min_completion_length, f"{len(ids)} tokens, room for {max(room, 0)}"
        expected = f"room for {least} at least (max_length {self.config.max_length}; max_prompt_length cuts prompts)"
        fits, field = room >= min(len(ids), least), example.fields[side]
        check(fits, "completion does not fit", what, field=field, value=got, expected=expected)
        kept, mask = ids[:room], counted[:room]
        where = [cut + i for i, counts in enumerate(counted) if counts]
        columns = {}
        given: dict[str, Any] = {"rendered": rendered, "tokens": tokens, "counted": where, "kept": sum(mask)}
        for name, value in example.token_columns[side].items():
            spanless = name == "token_rewards" and self._spanless(example, side)
            found = [0.0] * sum(mask) if spanless else token_column(name, value, example.prefix[side] + name, **given)
            columns[name] = found
        return Completion(kept, None if all(mask) else mask, columns), where, len(kept) < len(ids)

    def _spanless(self, example: Example, side: int) -> bool:
        """Whether the token rewards of this side are the empty list, beside spans or nothing on the other side."""
        name, columns = "token_rewards", zip(example.token_columns, example.prefix)
        given = [parsed_list(name, values[name], prefix + name) for values, prefix in columns if name in values]
        return len(given) == len(example.token_columns) and no_spans(given[side], [v for g in given for v in g])

    def _counted(self, rendered: Rendered, tokens: Tokens, cut: int, length: int) -> list[bool]:
        """Which of the completion's tokens count: the turns', those moved here from the prompt, EOS."""
        if rendered.turns is None or (len(rendered.turns) == 1 and not rendered.untrained):
            return [True] * length
        counted = [False] * length
        trained = [i for i in range(len(rendered.turns)) if i not in rendered.untrained]
        for start, end in (rendered.turns[i] for i in trained):
            first, last = tokens.within(start) - cut, tokens.touching(end) - cut
            counted[first:last] = [True] * (last - first)
        moved = tokens.within(rendered.prompt_end) - cut if 0 in trained else 0
        counted[:moved] = [True] * moved
        behind = len(tokens.ids) - cut
        counted[behind:] = [len(rendered.turns) - 1 in trained] * (length - behind)
        return counted

    def _check_completions(self, example: Example, completions: list[Completion], n_cut: int) -> None:
        names = [set(c.columns) for c in completions]
        for side, present in enumerate(names):
            lacking = sorted(set.union(*names) - present)
            what, expected = "is missing while the other completion has its own", "values for both completions or none"
            field = example.prefix[side] + "".join(lacking[:1])
            check(not lacking, "missing column", what, field=field, expected=expected)
        for completion, field, value in zip(completions, example.fields, example.completions):
            what, details = "no token of the completion is left to count", {"field": field, "value": value}
            check(completion.n_counted, "completion does not fit", what, **details, expected="at least one token")
        for completion, field, value in zip(completions[1:], example.fields[1:], example.completions[1:]):
            if completion.ids != completions[0].ids:
                continue
            what = "is the same as 'chosen' " + ("once both are cut" if n_cut else "in the tokenizer's eyes")
            expected = "two completions that differ" + (f" within max_length {self.config.max_length}" * bool(n_cut))
            raise RowError("chosen equals rejected", what, field=field, value=value, expected=expected)

    def _check_positions(self, example: Example, prompt: list[int], completions: list[Completion]) -> None:
        apart, most = self.encoder.apart, self.model_positions
        what = f"prompt {'or completion is' if apart else 'and completion are'} longer than the model's positions"
        expected = f"at most {most} (max_length and max_prompt_length cut rows)"
        for completion, field in zip(completions, example.fields):
            first, second = len(prompt), len(completion.ids)
            length = max(first, second) if apart else first + second
            got = f"{first} and {second} tokens" if apart else f"{first} + {second} = {length} tokens"
            fits = most is None or length <= most
            check(fits, "longer than the model", what, field=field, value=got, expected=expected)


def pictures_of(processor: Any, config: TokenizeConfig | None) -> Callable[[Sample, object], Sample] | None:
    """Gives samples whose token ids were stored the pictures of their rows; None for what reads text alone."""
    if processor is None or text_tokenizer(processor) is processor:
        return None
    config = config or TokenizeConfig()
    renderer, pictures = Renderer(processor, config), PictureReader(processor, config)

    def seen(sample: Sample, file: object) -> Sample:
        try:
            row = canonical(sample.raw, config.chat)
            example = pair_example(row) if len(sample.completions) > 1 else single_example(row)
            view = pictures(example, renderer.prompt(example), file)
            pictures.check_whole(sample.prompt_ids, sample.prompt_ids, view)
        except RowError as error:
            raise error.located(file, sample.row) from None
        return sample if view is None else replace(sample, vision=view.vision(sample.prompt_ids))

    return seen


def picture_files(rows: Rows, config: TokenizeConfig) -> list[Path]:
    """The files of pictures that rows name and that are there; none of a stream, which is read once."""
    found: set[str] = set()
    for number, row in () if rows.streaming else rows:
        if isinstance(row, Mapping) and may_have_pictures(row):
            with suppress(RowError):  # said when the row is read
                found |= set(paths_in(stored_row(row, folder_of(rows.place(number)[0], config))))
    return sorted(path for path in map(Path, found) if path.is_file())
