"""Rows -> `PromptItem`s: the prompts of online methods, as text or as messages through the chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tokengrain.data.config import RowError, TokenizeConfig
from tokengrain.data.fields import check_mapping, check_prompt, content
from tokengrain.data.formats import Example
from tokengrain.data.render import Renderer
from tokengrain.data.report import Report
from tokengrain.data.rows import Rows
from tokengrain.data.tokenize import Encoder
from tokengrain.errors import ModelError, RecipeError
from tokengrain.rollout.base import PromptItem


def encode_prompts(
    rows: Rows | Iterable[Mapping[str, Any]],
    tokenizer: Any,
    config: TokenizeConfig | None = None,
    *,
    column: str = "prompt",
    template: str | None = None,
    chat: bool = False,
    file: object = None,
    report: Report | None = None,
) -> list[PromptItem]:
    """Prompts as token ids. The other columns stay in `raw`, for rewards.

    Args:
        rows: mappings; `column` holds text, or a list of messages that the chat template renders with its
            generation prompt.
        tokenizer: a transformers tokenizer.
        config: `max_prompt_length`, `truncation_side`, `on_invalid`, and the chat template's settings are used.
        column: the prompt's column.
        template: text with `{column}` placeholders that makes the prompt from the row's columns; `column` is
            then only its name in messages.
        chat: take a prompt of text as the user's message of a chat.
        file: where the rows come from, for messages; `Rows` know it themselves.
        report: counts what became of the rows.

    Raises:
        DataError: a row without a usable prompt (`on_invalid: skip` leaves it out); names file and row.
        ModelError: messages without a chat template.
    """
    config = config or TokenizeConfig()
    renderer, encoder = Renderer(tokenizer, config), Encoder(tokenizer, config)
    items, report = [], Report() if report is None else report
    for number, (place, row) in enumerate(rows if isinstance(rows, Rows) else enumerate(rows)):
        try:
            check_mapping(row)
            ids = _encoded(row, renderer, encoder, column, template, chat)
        except RowError as error:
            located = error.located(*(rows.place(place) if isinstance(rows, Rows) else (file, number)))
            if config.on_invalid == "skip":
                report.skip(error.reason, str(located))
                continue
            raise located from None
        kept = _cut(ids, config, encoder.bos_id)
        report.kept += 1
        report.prompts_cut += len(kept) < len(ids)
        items.append(PromptItem(kept, row=row.get("id", number), raw=dict(row)))
    return items


def _encoded(
    row: Mapping[str, Any], renderer: Renderer, encoder: Encoder, column: str, template: str | None, chat: bool
) -> list[int]:
    if template is None:
        prompt = content(row, column)
    else:
        try:
            prompt = template.format_map(row)
        except (KeyError, IndexError, ValueError) as error:
            raise RowError(
                "missing column",
                f"the prompt's template does not fit the row ({type(error).__name__}: {error})",
                value=template,
                expected=f"placeholders among {list(row)}",
            ) from None
    check_prompt(prompt, column)
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        ids = [*encoder.prefix, *encoder([prompt])[0].ids]
        bos = encoder.prefix[:1]
        return ids[1:] if bos and ids[1:2] == bos else ids
    return encoder([renderer.prompt(Example(prompt, (), (), (), (), row.get("tools") or None))])[0].ids


def _cut(ids: list[int], config: TokenizeConfig, bos_id: int | None) -> list[int]:
    limit = config.max_prompt_length
    if limit is None or len(ids) <= limit:
        return ids
    if config.truncation_side == "right":
        return ids[:limit]
    bos = 1 if ids[0] == bos_id else 0
    return ids[:bos] + ids[len(ids) - limit + bos :]


def stop_ids_of(tokenizer: Any, model: Any = None) -> tuple[int, ...]:
    """The end-of-sequence tokens of a model's generation config and of a tokenizer.

    Raises:
        ModelError: there is none, so nothing would end a completion.
    """
    found: list[int] = []
    configs = (getattr(model, "generation_config", None), getattr(model, "config", None))
    for given in (*(getattr(c, "eos_token_id", None) for c in configs), getattr(tokenizer, "eos_token_id", None)):
        found += [given] if isinstance(given, int) else list(given or [])
    if not found:
        raise ModelError("neither model nor tokenizer has an end-of-sequence token; expected one, or `stop_ids`")
    return tuple(dict.fromkeys(found))


def needs_tokenizer(tokenizer: Any, stop: tuple[str, ...]) -> None:
    """Raises `RecipeError` if there are stop strings and no tokenizer to find them with."""
    if stop and tokenizer is None:
        raise RecipeError(f"sampling: stop is {list(stop)}, and the sampler has no tokenizer to find strings with")
