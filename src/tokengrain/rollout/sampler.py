"""What samplers take and give (`PromptItem`, `SamplingConfig`, `Rollouts`), prompts from rows, samplers by name."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.data.config import RowError, TokenizeConfig
from tokengrain.data.dataset import Report
from tokengrain.data.formats import (
    Example,
    TokenIds,
    canonical,
    check_mapping,
    check_prompt,
    content,
    for_template,
    pictured,
    stored_row,
)
from tokengrain.data.rows import Rows
from tokengrain.data.tokens import Clock, Encoder, Renderer
from tokengrain.data.vision import PictureReader, Room
from tokengrain.errors import ModelError, RecipeError, RolloutError, require, shown
from tokengrain.settings import load_named, validate_settings
from tokengrain.vision import Vision

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class PromptItem:
    """One prompt to sample from.

    Attributes:
        ids: token ids, at least one, BOS included.
        row: its row's id.
        raw: the row it was made from.
        vision: its images and videos.
        messages: of a prompt with images its messages, for servers that write the tokens themselves.
    """

    ids: list[int]
    row: int | str = 0
    raw: Mapping[str, Any] = field(default_factory=dict)
    vision: Vision | None = None
    messages: Sequence[Mapping[str, Any]] | None = field(default=None, repr=False)

    @property
    def placeholders(self) -> set[int]:
        """Its tokens that stand for images and videos."""
        return set() if self.vision is None else self.vision.placeholders(self.ids)

    def sample(self, completions: Sequence[Completion]) -> Sample:
        """The prompt, with all that belongs to it, and completions of it."""
        return Sample(self.ids, list(completions), self.row, self.raw, self.vision)

    def then(self, ids: Sequence[int], row: int | str) -> PromptItem:
        """The prompt with more tokens of text behind it, in a row of its own."""
        vision = self.vision and self.vision.then(len(ids))
        return replace(self, ids=[*self.ids, *ids], row=row, vision=vision, messages=None)


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn.

    The temperature is applied first, then top-k, top-p and min-p, each to what the one before has left.

    Args:
        temperature: 0 takes the most probable token.
        top_p: smallest set of tokens with this probability; 1: all.
        top_k: number of most probable tokens; 0: all.
        min_p: tokens at least this times as probable as the most probable one; 0: all.
        max_new_tokens: a completion without a stop by then is truncated.
        stop: a text, or several; a completion ends with the token that completes one, which is part of it.
        stop_ids: token ids that end a completion, and are part of it. None: the tokenizer's and the model's.
        seed: the same seed, prompts and weights give the same completions (a server: if it keeps to seeds).

    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_new_tokens: int = 256
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", [self.stop])
        checks = (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a finite number >= 0"),
            ("top_p", 0 < self.top_p <= 1, "0 < top_p <= 1"),
            ("top_k", _whole(self.top_k, 0), "a whole number >= 0 (0: all tokens)"),
            ("min_p", 0 <= self.min_p < 1, "0 <= min_p < 1"),
            ("max_new_tokens", _whole(self.max_new_tokens, 1), "a whole number, at least 1"),
            ("stop", _each(self.stop, _some_text), "a text that is not empty, or a list of them"),
            ("stop_ids", _each(self.stop_ids or (), lambda i: _whole(i, 0)), "token ids, or none for the model's own"),
        )
        for name, good, expected in checks:
            require(good, RecipeError, f"sampling: {name} is {shown(getattr(self, name))}; expected {expected}")
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", tuple(int(i) for i in self.stop_ids))

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.temperature == 0

    @property
    def is_model(self) -> bool:
        """Whether completions are drawn from the model's own distribution, unchanged."""
        return self.temperature == 1 and not self.truncates

    def at(self, step: int) -> SamplingConfig:
        """The same with a seed of its own for training step `step`."""
        return replace(self, seed=derived_seed(self.seed, "step", step))


def _whole(value: object, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _some_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _each(values: object, good: Callable[[Any], object]) -> bool:
    return isinstance(values, Sequence) and all(map(good, values))


def derived_seed(*parts: Any) -> int:
    """A non-negative 62-bit seed that depends on every part, the same in every process."""
    text = "/".join(repr(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def occurrences(prompts: Sequence[PromptItem]) -> list[int]:
    """How often each prompt's row came before it: a row that is there twice must not give the same twice."""
    seen: dict[int | str, Iterator[int]] = defaultdict(itertools.count)
    return [next(seen[prompt.row]) for prompt in prompts]


@dataclass(frozen=True)
class SampledCompletion:
    """One completion. All lists have one entry per token.

    Attributes:
        ids: the end-of-sequence token included when it was drawn.
        sampling_logps: nats, under the distribution each token was drawn from (temperature, top-k, top-p, min-p).
        raw_logps: nats, under the model's own distribution. Both are None where the sampler does not know them.
        finish_reason: "stop" (a stop token or string) or "length" (truncated).
        context: how many tokens at its start are those of a completion that it branches off from; they do not count.
    """

    ids: list[int]
    sampling_logps: list[float] | None
    raw_logps: list[float] | None
    finish_reason: FinishReason
    context: int = 0

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    def first_nan(self) -> int | None:
        """The first token that has a log-probability of NaN."""
        known = [logps for logps in (self.sampling_logps, self.raw_logps) if logps is not None]
        return min((list(map(math.isnan, one)).index(True) for one in known if math.isnan(sum(one))), default=None)


@dataclass(frozen=True)
class Rollouts:
    """P prompts in the order given, the completions of each (C in all), how they were drawn, and the time it took.

    `metrics`: what the sampler has to say of itself, logged as it stands. Raises `RolloutError` for a log-probability
    that is NaN.
    """

    prompts: tuple[PromptItem, ...]
    groups: tuple[tuple[SampledCompletion, ...], ...]
    sampling: SamplingConfig
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for prompt, group in zip(self.prompts, self.groups, strict=True):
            for k, completion in enumerate(group):
                bad = completion.first_nan()
                what = f"row {prompt.row}: token {bad} of completion {k} has the log-probability NaN: the model's "
                what += (
                    "logits were NaN or infinite there; its weights are not finite, or its activations are too large"
                )
                require(bad is None, RolloutError, f"{what} for their dtype")

    @cached_property
    def completions(self) -> list[SampledCompletion]:
        """All C, those of a prompt next to each other."""
        return [c for group in self.groups for c in group]

    @cached_property
    def group(self) -> list[int]:
        """The prompt of each completion, C indices into `prompts`."""
        return [index for index, group in enumerate(self.groups) for _ in group]

    @cached_property
    def truncated(self) -> Tensor:
        """Completions that hit `max_new_tokens` without a stop, bool `[C]`."""
        return torch.tensor([c.truncated for c in self.completions], dtype=torch.bool)

    def texts(self, tokenizer: Any) -> list[str]:
        """The C completions as text, without special tokens."""
        return decode(tokenizer, [c.ids for c in self.completions])

    def to_batch(self) -> TokenBatch:
        """One prompt per group. Columns over the tokens drawn for the completion itself `[N]`: `sampling_logps` and
        `raw_logps` where every completion has them, and `truncated`, 1 on every token of a truncated completion.
        """
        logps = ("sampling_logps", "raw_logps")
        names = [name for name in logps if all(getattr(c, name) is not None for c in self.completions)]
        samples = []
        for prompt, group in zip(self.prompts, self.groups, strict=True):
            completions = []
            for c in group:
                own = len(c.ids) - c.context
                columns = {name: getattr(c, name)[c.context :] for name in names}
                columns["truncated"] = [float(c.truncated)] * own
                completions.append(Completion(c.ids, [False] * c.context + [True] * own, columns))
            samples.append(prompt.sample(completions))
        return TokenBatch.from_samples(samples)

    def __iter__(self) -> Iterator[tuple[PromptItem, tuple[SampledCompletion, ...]]]:
        return iter(zip(self.prompts, self.groups, strict=True))


@runtime_checkable
class Sampler(Protocol):
    """Draws completions."""

    name: str

    def sample(self, prompts: Sequence[PromptItem], *, n: int, sampling: SamplingConfig) -> Rollouts:
        """`n` completions of each prompt. Raises `RolloutError`."""
        ...

    def refresh(self, model_or_path: Any) -> None:
        """Sample from these weights from now on: a model, or the folder of a checkpoint or adapter."""
        ...


def decode(tokenizer: Any, ids: Sequence[Sequence[int]]) -> list[str]:
    """Token ids as texts, without special tokens and with spaces left as they are."""
    texts = tokenizer.batch_decode([list(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return list(texts)


def checked_prompts(prompts: Sequence[PromptItem], n: int) -> tuple[PromptItem, ...]:
    """The prompts as a tuple. Raises `RolloutError` where there is nothing to sample from."""
    require(prompts, RolloutError, "there are no prompts to sample from")
    require(n >= 1, RolloutError, f"n is {n}; expected at least 1 completion per prompt")
    empty = next((p.row for p in prompts if not p.ids), None)
    require(empty is None, RolloutError, f"row {empty}: the prompt has no tokens; expected at least one (BOS, say)")
    return tuple(prompts)


# ---- Rows -> prompts, as text or as messages through the chat template ----


def encode_prompts(
    rows: Rows | Iterable[Mapping[str, Any]],
    processor: Any,
    config: TokenizeConfig | None = None,
    *,
    column: str = "prompt",
    template: str | None = None,
    chat: bool = False,
    file: object = None,
    report: Report | None = None,
    clock: Clock | None = None,
) -> list[PromptItem]:
    """Prompts as token ids, of `column`'s text or messages. The other columns stay in `raw`, for rewards.

    Args:
        processor: a tokenizer, or the processor of a model that sees.
        template: text with `{column}` placeholders that makes the prompt; `column` is then its name in messages.
        chat: take a prompt of text as the user's message of a chat.
        file: where the rows come from, for messages; `Rows` know it themselves.
        report: counts what became of the rows. clock: the time for a template that writes the date; None: now.

    Raises:
        DataError: a row without a usable prompt (`on_invalid: skip` leaves it out); names file and row.
        ModelError: messages without a chat template.
    """
    config = config or TokenizeConfig()
    renderer, encoder = Renderer(processor, config, clock), Encoder(processor, config)
    pictures, room = PictureReader(processor, config), Room()
    items, report = [], Report() if report is None else report
    for number, (place, row) in enumerate(rows if isinstance(rows, Rows) else enumerate(rows)):
        where = rows.place(place) if isinstance(rows, Rows) else (file, number)
        try:
            example = _prompt_of(row, column, template, chat)
            text = "" if isinstance(example.prompt, TokenIds) else renderer.prompt(example)
            view = pictures(example, text, where[0])
            ids = _ids(example, text if view is None else view.expanded(text), encoder)
            kept = encoder.cut(ids)
            pictures.check_whole(ids, kept, view, column)
        except RowError as error:
            located = error.located(*where)
            if config.on_invalid == "skip":
                report.skip(error.reason, str(located))
                continue
            raise located from None
        report.kept += 1
        report.prompts_cut += len(kept) < len(ids)
        item = PromptItem(kept, row=row.get("id", number), raw=dict(row))
        if view is not None:
            whole = len(kept) == len(ids) and not example.tools and not example.template_kwargs
            messages = stored_row({"prompt": example.messages}, view.folder)["prompt"] if whole else None
            item = replace(item, vision=room.hold(view.vision(kept)), messages=messages or None)
        items.append(item)
    pictures.check_used()
    return items


def _prompt_of(row: Mapping[str, Any], column: str, template: str | None, chat: bool) -> Example:
    """A row's prompt, its pictures in their places."""
    check_mapping(row)
    given: Any = row
    if template is not None:
        try:
            given = {**row, "prompt": template.format_map(row)}
        except (KeyError, IndexError, ValueError) as error:
            what = f"the prompt's template does not fit the row ({type(error).__name__}: {error})"
            expected = f"placeholders among {list(row)}"
            raise RowError("missing column", what, value=template, expected=expected) from None
    elif column != "prompt":
        given = {**row, "prompt": content(row, column)}
    row = canonical(given, chat)
    prompt = content(row, "prompt")
    check_prompt(prompt, column)
    prompt, found = pictured(row, prompt)
    return Example(prompt, **for_template(row), pictures=found)


def _ids(example: Example, text: str, encoder: Encoder) -> list[int]:
    if isinstance(example.prompt, TokenIds):
        return list(example.prompt)
    if not isinstance(example.prompt, str):
        return encoder([text])[0].ids
    ids, first = encoder([text])[0].ids, encoder.prefix
    return [*([] if ids[: len(first)] == first else first), *ids, *encoder.suffix]


def stop_ids_of(tokenizer: Any, model: Any = None) -> tuple[int, ...]:
    """The end-of-sequence tokens of model and tokenizer. Raises `ModelError` if nothing would end a completion."""
    found: list[int] = []
    configs = (getattr(model, "generation_config", None), getattr(model, "config", None))
    for given in (*(getattr(c, "eos_token_id", None) for c in configs), getattr(tokenizer, "eos_token_id", None)):
        found += [given] if isinstance(given, int) else list(given or [])
    what = "neither model nor tokenizer has an end-of-sequence token; expected one, or `stop_ids`"
    require(found, ModelError, what)
    return tuple(dict.fromkeys(found))


def needs_tokenizer(tokenizer: Any, stop: Sequence[str]) -> None:
    """Raises `RecipeError` if there are stop strings and no tokenizer to find them with."""
    what = f"sampling: stop is {list(stop)}, and the sampler has no tokenizer to find strings with"
    require(not stop or tokenizer is not None, RecipeError, what)


# ---- Samplers by name: what a recipe's `sampler:` says, checked and made ----

SAMPLERS: dict[str, str] = {
    "hf": "tokengrain.rollout.local:HFGenerate",
    "continuous": "tokengrain.rollout.local:HFContinuous",
    "server": "tokengrain.rollout.server:OpenAIServer",
    "branching": "tokengrain.rollout.branching:Branching",
}
DEFAULT = "hf"

# Positional arguments of a constructor that the trainer supplies; all its other arguments are settings.
OBJECTS = ("model", "tokenizer", "sampler")


def sampler_class(name: str) -> Callable[..., Any]:
    """The class of a sampler: a name in `SAMPLERS`, or an import string, "module:Class" or "path.py:Class"."""
    return load_named(name, SAMPLERS, "sampler")


def check_sampler(given: Any) -> dict[str, Any]:
    """A sampler's name, settings with defaults, and `sampler` below it, before a model is loaded or a server is up.

    `given` is a name, or a mapping with `name` and settings; of a sampler on top of another (`branching`), `sampler` is
    the other one. Raises `RecipeError` for what is unknown (with the nearest right name) or does not fit.
    """
    name, own = _named(given)
    build = sampler_class(name)
    takes, also = _positional(build)
    below = check_sampler(own.pop("sampler", DEFAULT)) if "sampler" in takes else None
    if below is not None:
        what = f"sampler {name!r} on top of {below['name']!r}; expected one that draws by itself: hf, say"
        require("sampler" not in below, RecipeError, what)
    settings = validate_settings(f"sampler {name!r}", build, own, also=also)
    if (check := getattr(build, "check", None)) is not None:
        check(**settings)
    return {"name": name, **settings, **({"sampler": below} if below is not None else {})}


def make_sampler(given: Any, model: Any, tokenizer: Any = None) -> Sampler:
    """A sampler by name or mapping, as `check_sampler` takes it (None: the default); one that is made is returned."""
    if isinstance(given, Sampler):
        return given
    what = f"a sampler is an object with sample and refresh, a name or a mapping, got {shown(given)}"
    require(given is None or isinstance(given, (str, Mapping)), RecipeError, what)
    settings = check_sampler(DEFAULT if given is None else given)
    build, below = sampler_class(settings.pop("name")), settings.pop("sampler", None)
    objects = {"model": model, "tokenizer": tokenizer}
    if below is not None:
        objects["sampler"] = make_sampler(below, model, tokenizer)
    made: Sampler = build(**{name: objects[name] for name in _positional(build)[0]}, **settings)
    return made


def check_reachable(given: Any, *, patient: bool = True, prompts: Sequence[PromptItem] = ()) -> None:
    """Ask the server of a sampler (or of what `make_sampler` takes) whether it is there; if not patient, only once.

    Of `prompts` one with images is sent. Raises `RolloutError` if nobody answers, or these cannot be sampled from,
    `RecipeError` if the server does not have the model.
    """
    sampler = given
    if given is None or isinstance(given, (str, Mapping)):
        settings = check_sampler(DEFAULT if given is None else given)
        settings = settings.get("sampler", settings)
        build = sampler_class(settings.pop("name"))
        if "model" in _positional(build)[0] or not hasattr(build, "check_reachable"):
            return
        sampler = build(**settings)
    sampler = getattr(sampler, "sampler", sampler)
    if (check := getattr(sampler, "check_reachable", None)) is not None:
        check(patient=patient)
    if (look := getattr(sampler, "check_pictures", None)) is not None:
        look(prompts)


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `check_sampler` gave, JSON-like, what decides which completions are drawn."""
    found = _without_neutral(sampler_class(settings["name"]), settings)
    return found | ({"sampler": deciding(settings["sampler"])} if "sampler" in settings else {})


def describe_sampler(sampler: Any) -> dict[str, Any]:
    """`deciding` of a sampler that is made already; of one that is none of ours just its name."""
    found = _without_neutral(type(sampler), {"name": sampler.name, **getattr(sampler, "given", {})})
    return found | ({"sampler": describe_sampler(sampler.sampler)} if hasattr(sampler, "sampler") else {})


def _without_neutral(build: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in settings.items() if k not in getattr(build, "neutral", ())}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))  # as it comes back from a file
    return plain


def _named(given: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(given, str):
        return given, {}
    named = isinstance(given, Mapping) and isinstance(given.get("name"), str)
    require(named, RecipeError, f"a sampler needs a name, got {shown(given)}; expected for example {{name: hf}}")
    return given["name"], {k: v for k, v in given.items() if k != "name"}


def _positional(build: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """Names of a constructor's positional arguments: those that the trainer supplies, and the others."""
    parameters = inspect.signature(build).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return [n for n in names if n in OBJECTS], [n for n in names if n not in OBJECTS]
