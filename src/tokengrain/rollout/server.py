"""`OpenAIServer`: sampling from a server that speaks OpenAI's completions protocol (vLLM, SGLang)."""

from __future__ import annotations

import base64
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import httpx

from tokengrain.data.marking import LOGP_ROUNDING
from tokengrain.data.pictures import content_of
from tokengrain.errors import RecipeError, RolloutError, require, shown
from tokengrain.rollout.client import JsonClient, ServerError, finished, gather, plain
from tokengrain.rollout.sampler import (
    PromptItem,
    Rollouts,
    SampledCompletion,
    SamplingConfig,
    checked_prompts,
    derived_seed,
    occurrences,
)
from tokengrain.rollout.transfer import Transfer, send
from tokengrain.settings import (
    Count,
    NonNegative,
    Positive,
    Whole,
    keyword_types,
    nearest,
    validate_settings,
)

T = TypeVar("T")
R = TypeVar("R")
logger = logging.getLogger(__name__)

# There is a server, but no such path, or not for this.
UNKNOWN = frozenset({404, 405, 501})
# A text whose tokens a server is asked for, to see whether it has the trainer's tokenizer.
SPOKEN = "The na\u00efve answer is 12 + 3.5 = 15.5\n"
# How often a rollout is drawn again from servers that were started anew meanwhile.
ROUNDS = 3
MOST_NAMES = 20  # of a server's models in a message
# What requests say themselves, and what would make completions no samples of the policy.
_OWN = """
    model prompt n max_tokens temperature top_p top_k min_p seed logprobs stop stop_token_ids ignore_eos
    repetition_penalty presence_penalty frequency_penalty logit_bias min_tokens bad_words allowed_token_ids
"""
OWN = frozenset(_OWN.split())

# ---- The sampler ----


class _Request(NamedTuple):
    """A prompt, its place among those of the call, and how often its row came before."""

    place: int
    prompt: PromptItem
    seen: int


# The server that was asked, by its place, and the completions; None: it does not have the weights to sample from.
_Answer = tuple[int, tuple[SampledCompletion, ...] | None]

Flavour = Literal["vllm", "sglang"]
LogpKind = Literal["raw", "tempered", "processed"]
Refresh = Literal["none", "checkpoint", "adapter", "nccl"]


class Endpoints(NamedTuple):
    """Where a kind of server takes what is not in OpenAI's protocol, and the log-probabilities that it gives."""

    load_adapter: str
    unload_adapter: str
    sleep: str
    wake_up: str
    logps: LogpKind


VLLM = Endpoints("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/sleep?level=1", "/wake_up", "raw")
SGLANG = Endpoints(
    "/load_lora_adapter", "/unload_lora_adapter", "/release_memory_occupation", "/resume_memory_occupation", "tempered"
)


class Weights(NamedTuple):
    """What the servers sample from: their own weights (version 0), or what they were last given."""

    version: int = 0
    folder: str | None = None
    name: str | None = None  # of the version, on the servers; of the adapter, where it is one
    lost: frozenset[int] = frozenset()  # servers, by their place, that do not have them or do not answer


class OpenAIServer:
    """Samples from vLLM or SGLang servers. Prompts and completions go over the wire as token ids.

    One request per prompt asks for all its completions, so that the server shares the prompt; several requests
    run at a time. The server must be started with log-probabilities of the sampled token allowed (the default)
    and the trainer's tokenizer.

    Of several servers, each request goes to the one with the fewest under way. One that stops answering is left alone
    until the next `refresh`, and its requests go to the others. A server that was started anew, with the weights it
    starts with, is given the present ones, and what it answered meanwhile is drawn again.

    Args:
        url: the server's root, for example "http://localhost:8000", or a list of them.
        tokenizer: the trainer's; an answer with a token id beyond it is an error.
        model: the model's name on the server.
        flavour: "vllm" or "sglang".
        logps: which log-probabilities the server gives: of the model's own distribution ("raw", vLLM's default),
            after the temperature ("tempered", SGLang's default), or after top-k, top-p and min-p too
            ("processed", vLLM with `--logprobs-mode processed_logprobs`). None: the flavour's default.
        refresh: what `refresh` does: "adapter" loads a LoRA adapter under a new name, samples from it and
            unloads the one before (vLLM: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, `--enable-lora`, `--max-loras 2`;
            SGLang: `--enable-lora`); "checkpoint" has the server load a whole checkpoint (vLLM:
            VLLM_SERVER_DEV_MODE=1; SGLang as it is). Both must see the trainer's files. "nccl" sends a vLLM server the
            weights from GPU to GPU, see `tokengrain.rollout.transfer`: not run on a GPU yet. "none" refuses.
        adapter_name: what the names of adapters begin with; the rest is drawn for each sampler, so that a run that was
            killed does not find its names taken.
        timeout, retries, backoff, api_key_env: see `JsonClient`.
        concurrency: most requests at a time, over all servers.
        extra: further fields of every completions request; none that changes what is drawn, such as a penalty.

    Attributes:
        weights: what the servers sample from. A rank that did not call `refresh` takes over that of the one that did.
        longest: most tokens of prompt and completion, as `check_reachable` found it; None: not known.
    """

    name = "server"
    # Where the server is and how it is asked; a run may resume with another one.
    neutral: ClassVar[frozenset[str]] = frozenset(
        {"url", "adapter_name", "timeout", "retries", "backoff", "concurrency", "api_key_env"}
    )

    def __init__(
        self,
        url: str | list[str],
        tokenizer: Any = None,
        *,
        model: str,
        flavour: Flavour = "vllm",
        logps: LogpKind | None = None,
        refresh: Refresh = "none",
        adapter_name: str = "tokengrain",
        timeout: Positive = 600.0,
        retries: Whole = 5,
        backoff: NonNegative = 0.5,
        concurrency: Count = 16,
        api_key_env: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        given = locals()
        own = {name: given[name] for name in keyword_types(OpenAIServer, ("url",))}
        self.given = validate_settings("sampler 'server'", OpenAIServer, own, also=("url",))
        urls = [url] if isinstance(url, str) else list(url)
        require(urls, RecipeError, "sampler 'server': url is an empty list; expected an address or several")
        self.clients = [JsonClient(one, timeout, retries, backoff, api_key_env) for one in urls]
        self.busy = [0] * len(urls)  # requests under way on each
        self.base_model, self.flavour, self.how, self.adapter_name = model, flavour, refresh, adapter_name
        self.endpoints = VLLM if flavour == "vllm" else SGLANG
        self.concurrency, self.extra = concurrency, dict(extra or {})
        taken = sorted(OWN & self.extra.keys())
        what = f"sampler 'server': extra has {', '.join(taken)}; expected fields that do not change what is drawn"
        require(not taken, RecipeError, what)
        self.logps: LogpKind = logps or self.endpoints.logps
        self.tokenizer, self.vocabulary = tokenizer, 2**31 if tokenizer is None else len(tokenizer)
        self.weights, self._own = Weights(), secrets.token_hex(4)
        what = "sampler 'server': refresh: nccl is vLLM's; expected checkpoint or adapter for sglang"
        require(refresh != "nccl" or flavour == "vllm", RecipeError, what)
        self.transfers = [Transfer(client) for client in self.clients] if refresh == "nccl" else []
        self.longest: int | None = None
        self._mute: set[int] = set()  # servers that do not say which weights they have

    @classmethod
    def check(cls, **settings: Any) -> None:
        """Raises `RecipeError` for settings that do not work. Neither server nor key need be there yet."""
        cls(**{**settings, "api_key_env": None})

    def check_reachable(self, *, patient: bool = True) -> None:
        """Ask every server for its models and tokenizer; if not patient, once and for no longer than 5 s.

        Raises `ServerError` if nobody answers or the key is refused, `RecipeError` if vLLM has no model of this name or
        another tokenizer, and whatever keeps `refresh: nccl` from working as far as can be seen.
        """
        for client in self.clients:
            client = client.briefer(30.0, client.retries) if patient else client.briefer(5.0)
            try:
                models = client.post("/v1/models", None, _models)
                spoken = self._spoken(client)
            except ServerError as error:
                if error.status in UNKNOWN:
                    continue
                raise ServerError(f"sampler 'server': {error}; expected a running {self.flavour} server") from None
            known = self.flavour != "vllm" or not models or self.base_model in models
            names = list(models)[:MOST_NAMES]
            what = f"sampler 'server': {client.url} has no model {self.base_model!r}{nearest(self.base_model, names)}"
            require(known, RecipeError, what)
            what = f"sampler 'server': {client.url} has another tokenizer: {SPOKEN!r} is {shown(spoken)} there; "
            same = spoken is None or spoken == self._own_ids()
            require(same, RecipeError, f"{what}expected that of the model being trained")
            lengths = [n for n in (models.get(self.base_model), self.longest) if n is not None]
            self.longest = min(lengths, default=None)
        for transfer in self.transfers:
            transfer.check()

    def check_pictures(self, prompts: Sequence[PromptItem]) -> None:
        """Have every server answer the first prompt with images by one token, if any prompt has some.

        Raises `RolloutError` for a prompt that a server cannot be sent, or one that does not read it as we do.
        """
        seeing = [prompt for prompt in prompts if prompt.vision is not None]
        for prompt in seeing:
            self._check_sent(prompt)
        one = SamplingConfig(max_new_tokens=1)
        for client in self.clients if seeing else ():
            body = self._with_images(self._body(seeing[0], 0, 1, one), seeing[0])
            try:
                client.post("/v1/chat/completions", body, partial(self._read, n=1, sampling=one, prompt=seeing[0]))
            except ServerError as error:
                why = "expected a server that is sent images, of the model being trained, or the sampler 'hf'"
                raise ServerError(f"sampler 'server': row {seeing[0].row}: {error}; {why}", error.status) from None

    def _own_ids(self) -> list[int]:
        return list(self.tokenizer(SPOKEN, add_special_tokens=False)["input_ids"])

    def _spoken(self, client: JsonClient) -> list[int] | None:
        """The server's token ids of a text; None where neither it nor we have a tokenizer to ask."""
        if self.flavour != "vllm" or not callable(self.tokenizer):
            return None
        body = {"model": self.base_model, "prompt": SPOKEN, "add_special_tokens": False}
        try:
            return client.briefer(10.0).post("/tokenize", body, _tokens)
        except ServerError:
            return None  # an older server, or a wrong model, which is said in words of its own

    @property
    def client(self) -> JsonClient:
        return self.clients[0]

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that is sampled from."""
        return self.weights.name if self.how == "adapter" else None

    @property
    def model(self) -> str:
        """What requests name as their model."""
        if self.adapter is None:
            return self.base_model
        return self.adapter if self.flavour == "vllm" else f"{self.base_model}:{self.adapter}"

    def sample(self, prompts: Sequence[PromptItem], *, n: int, sampling: SamplingConfig) -> Rollouts:
        """`n` completions of each prompt. Raises `RolloutError` (`ServerError`), naming the row."""
        started = time.perf_counter()
        prompts = checked_prompts(prompts, n)
        if self.how == "none":  # else lost ones have to be refreshed first
            self.weights = Weights()
        found: list[Any] = [None] * len(prompts)
        work = [_Request(i, p, seen) for i, (p, seen) in enumerate(zip(prompts, occurrences(prompts), strict=True))]
        before, redrawn = self.weights.lost, 0
        for _ in range(ROUNDS):
            ask = partial(gather, self.client, self._asking(n, sampling), work, self.concurrency)
            answers = finished(ask)
            stale = self._renew({at for at, _ in answers}, {at for at, group in answers if group is None})
            for request, (at, group) in zip(work, answers, strict=True):
                found[request.place] = None if at in stale else group
            work = [request for request in work if found[request.place] is None]
            redrawn += len(work) * n
            if not work:
                break
        else:
            what = f"row {work[0].prompt.row}: the server lost its weights {ROUNDS} times during a rollout"
            raise ServerError(f"{what}; expected one that stays up")
        metrics = {"rollout/redrawn": redrawn, "rollout/servers_lost": len(self.weights.lost - before)}
        metrics |= {"rollout/weights_version": self.weights.version}
        return Rollouts(prompts, tuple(found), sampling, time.perf_counter() - started, metrics)

    def _asking(
        self, n: int, sampling: SamplingConfig
    ) -> Callable[[httpx.AsyncClient, _Request], Coroutine[Any, Any, _Answer]]:
        """Asks the server with the fewest requests under way, and another one where that does not answer."""
        tokens = n * sampling.max_new_tokens

        async def one(http: httpx.AsyncClient, request: _Request) -> _Answer:
            body, path = self._body(request.prompt, request.seen, n, sampling), "/v1/completions"
            if request.prompt.vision is not None:
                body, path = self._with_images(body, request.prompt), "/v1/chat/completions"
            while True:
                usable = [at for at in range(len(self.clients)) if at not in self.weights.lost]
                at = min(usable, key=lambda at: self.busy[at], default=0)
                client, last = self.clients[at], len(usable) <= 1
                client = client if last else client.briefer(client.timeout, min(client.retries, 1))
                self.busy[at] += 1
                try:
                    read = partial(self._read, n=n, sampling=sampling, prompt=request.prompt)
                    return at, await client.ask(http, path, body, read, tokens)
                except ServerError as error:
                    if error.status == 404 and self.adapter is not None:  # started anew, without our adapter
                        return at, None
                    if error.status is not None or last:
                        raise ServerError(f"row {request.prompt.row}: {error}") from None
                    self._lose(at, error)
                finally:
                    self.busy[at] -= 1

        return one

    def _lose(self, at: int, error: RolloutError) -> None:
        if at not in self.weights.lost:
            logger.warning("%s; the other servers do its work until the next refresh", error)
            self.weights = self.weights._replace(lost=self.weights.lost | {at})

    def _renew(self, used: set[int], bare: set[int]) -> set[int]:
        """Which of the servers `used` sample from other weights; they are given the present ones, or are lost.

        `bare`: those that have said so themselves.
        """
        if self.weights.name is None:
            return set()

        async def one(http: httpx.AsyncClient, at: int) -> bool:
            client = self.clients[at]
            try:
                if at not in bare and await self._is_current(http, at):
                    return False
                await self._load_again(http, client)
            except ServerError as error:
                if len(self.weights.lost) + 1 >= len(self.clients):
                    raise
                self._lose(at, error)
            return True

        places = sorted(used)
        renewed = finished(lambda: gather(self.client, one, places, self.concurrency))
        return {at for at, stale in zip(places, renewed, strict=True) if stale}

    async def _load_again(self, http: httpx.AsyncClient, client: JsonClient) -> None:
        what = f"{client.url} was started anew, without the weights, which are sent again only before the next rollout"
        require(not self.transfers, ServerError, what)
        logger.warning("%s was started anew; it is given the present weights again", client.url)
        try:
            await self._load(http, client, self.weights, None)
        except ServerError as error:
            # Another rank may have been quicker to give the adapter back.
            there = error.status == 400 and self.how == "adapter"
            if not there or self.weights.name not in await client.ask(http, "/v1/models", None, _models):
                raise

    async def _is_current(self, http: httpx.AsyncClient, at: int) -> bool:
        """Whether a server says that it has the present weights, or does not say which it has."""
        if self.how == "adapter" or self.flavour != "vllm" or at in self._mute:
            return True
        try:
            version = await self.clients[at].ask(http, "/weight_info", None, _version)
        except ServerError as error:
            if error.status not in UNKNOWN:
                raise
            self._mute.add(at)
            return True
        return version == self.weights.name

    def _body(self, prompt: PromptItem, seen: int, n: int, sampling: SamplingConfig) -> dict[str, Any]:
        body = {
            "model": self.model,
            "prompt": prompt.ids,
            "n": n,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # Both servers take every token with -1; 0 is refused by some versions.
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "seed": derived_seed(sampling.seed, prompt.row, seen) % 2**31,
            "logprobs": 1 if self.flavour == "sglang" else 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        if self.flavour == "vllm":
            body |= {"return_tokens_as_token_ids": True, "include_stop_str_in_output": True}
        else:
            body["no_stop_trim"] = True
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.stop_ids is not None:
            # The server adds its model's end-of-sequence token unless asked to ignore it.
            body |= {"stop_token_ids": list(sampling.stop_ids), "ignore_eos": True}
        return body | self.extra

    def _with_images(self, body: dict[str, Any], prompt: PromptItem) -> dict[str, Any]:
        """The request as a chat, whose images are parts of its messages: a server takes none beside token ids.

        The server writes the prompt's tokens itself; `_read` compares them.
        """
        self._check_sent(prompt)
        changed = {"messages": [_for_server(m) for m in prompt.messages or ()], "logprobs": True}
        held = {f"{i}": -100 for i in prompt.placeholders}
        kept = {name: value for name, value in body.items() if name != "prompt"}
        return {**kept, **changed, "top_logprobs": 0, "logit_bias": held}

    def _check_sent(self, prompt: PromptItem) -> None:
        """Raises `RolloutError` unless a prompt with images can be sent to a server."""
        what = f"row {prompt.row}: the prompt has images, "
        require(self.flavour == "vllm", RolloutError, f"{what}which are sent to vLLM only; expected the sampler 'hf'")
        fits = "expected whole messages without tools, with images in them, or the sampler 'hf'"
        require(prompt.messages, RolloutError, f"{what}and a server writes no such prompt as it is; {fits}")
        kinds = {part["type"] for message in prompt.messages or () for part in _parts(message)}
        what = f"row {prompt.row}: videos are sent to no server; expected 'hf'"
        require("video" not in kinds, RolloutError, what)

    def _read(self, answer: Any, n: int, sampling: SamplingConfig, prompt: PromptItem) -> tuple[SampledCompletion, ...]:
        """The completions in an answer. Raises `ValueError` where it is not what was asked for."""
        if prompt.vision is not None and isinstance(answer, dict):
            _check_prompt(answer.get("prompt_token_ids"), prompt)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != n or not all(isinstance(c, dict) for c in choices):
            raise ValueError(f"the answer has no list of {n} choices")
        found, held = {}, prompt.placeholders
        # By what the server says its log-probabilities are; None where that is neither.
        raw = self.logps == "raw" or sampling.is_model or (self.logps == "tempered" and sampling.temperature == 1)
        drawn = self.logps == "processed" or (self.logps == "tempered" and not sampling.truncates) or sampling.is_model
        for place, choice in enumerate(choices):
            ids, logps, finish = self._choice(choice, sampling.max_new_tokens)
            if wrong := held.intersection(ids):
                raise ValueError(f"the answer's completion has token {min(wrong)}, which stands for an image")
            index = choice.get("index", place)
            found[index if _whole(index, n) else None] = SampledCompletion(
                ids, logps if drawn else None, logps if raw else None, finish
            )
        if found.keys() != set(range(n)):
            raise ValueError(f"the answer's choices have indices {shown([c.get('index') for c in choices])}")
        return tuple(found[index] for index in range(n))

    def _choice(self, choice: dict[str, Any], most: int) -> tuple[list[int], list[float], Any]:
        logprobs: Any = choice.get("logprobs") or {}
        ids, finish = choice.get("token_ids"), choice.get("finish_reason")
        if not isinstance(logprobs, dict):
            raise ValueError(f"the answer's logprobs are {shown(logprobs)}; expected an object")
        logps: Any = logprobs.get("token_logprobs")
        if isinstance(said := logprobs.get("content"), list):  # of a chat
            logps = [part.get("logprob") if isinstance(part, dict) else None for part in said]
        ids = _ids_from_names(logprobs.get("tokens")) if ids is None else ids
        count = len(logps) if isinstance(logps, list) else "no"
        if not isinstance(ids, list) or not ids or not all(_whole(i, self.vocabulary) for i in ids):
            reason = f"token ids are {shown(ids)}; expected at least one, whole numbers below {self.vocabulary}"
        elif len(ids) > most:
            reason = f"completion has {len(ids)} tokens; expected at most {most}"
        elif count != len(ids):
            reason = f"completion has {len(ids)} token ids and {count} log-probabilities"
        elif not all(type(v) in (int, float) and -1e6 <= v <= LOGP_ROUNDING for v in logps):
            reason = f"log-probabilities are {shown(logps)}; some are not finite numbers, at most 0"
        elif finish not in ("stop", "length"):
            reason = f"finish_reason is {shown(finish)}; expected stop or length"
        else:
            return ids, logps, finish
        raise ValueError(f"the answer's {reason}")

    def refresh(self, model_or_path: Any) -> None:
        """Load the folder of an adapter or checkpoint on the servers and sample from it; or send them weights.

        Of several servers, those that cannot load it are not asked any more, with a warning.

        Args:
            model_or_path: the folder; with `refresh: nccl` a `transfer.Whole`, which is gone through once, to its end.

        Raises:
            RolloutError: no server has taken them.
        """
        version, before = self.weights.version + 1, self.weights.name
        # A new name each time: the server's caches go by the name, and requests under way keep the old one.
        name = f"{self.adapter_name}-{self._own}-{version}"
        if self.transfers:
            self._now(Weights(version, None, name), send(self.transfers, model_or_path, name))
            return
        path = Path(model_or_path) if isinstance(model_or_path, (str, Path)) else Path()
        what = f"a server loads weights from a folder, got {model_or_path!r}; save the model first"
        require(path != Path() and path.is_dir(), RolloutError, what)
        what = f"{self.client.url} is not to be refreshed; expected refresh: adapter, checkpoint or nccl"
        require(self.how != "none", RolloutError, what)
        new = Weights(version, str(path.resolve()), name)

        async def load(http: httpx.AsyncClient, client: JsonClient) -> ServerError | None:
            try:
                await self._load(http, client, new, before)
            except ServerError as error:
                return error
            return None

        errors = finished(lambda: gather(self.client, load, self.clients, len(self.clients)))
        self._now(new, {at: error for at, error in enumerate(errors) if error is not None})

    def _now(self, new: Weights, lost: Mapping[int, RolloutError]) -> None:
        """Sample from `new`, but not from the servers that do not have them."""
        if len(lost) == len(self.clients):
            sees = "" if new.folder is None else f", which reads {new.folder}"
            raise ServerError(f"sampler 'server': {lost[0]}; expected a server of the model being trained{sees}")
        self.weights = new
        for at, error in lost.items():
            self._lose(at, error)

    async def _load(self, http: httpx.AsyncClient, client: JsonClient, new: Weights, before: str | None) -> None:
        do = partial(self._do, http, client)
        if self.how == "adapter":
            await do(self.endpoints.load_adapter, lora_name=new.name, lora_path=new.folder)
            if before is not None:  # gone already where the server was started anew
                await self._do_if_known(http, client, self.endpoints.unload_adapter, lora_name=before)
        elif self.flavour == "sglang":
            await do("/update_weights_from_disk", model_path=new.folder, flush_cache=True)
        else:
            # Requests under way end first, those that come meanwhile wait.
            await self._do_if_known(http, client, "/pause?mode=wait")
            try:
                await do("/collective_rpc", method="reload_weights", kwargs={"weights_path": new.folder})
                await do("/reset_prefix_cache")  # cached prompts were computed with the old weights
                await self._do_if_known(http, client, "/update_weight_version", new_version=new.name)
            finally:
                await self._do_if_known(http, client, "/resume")

    def release(self) -> None:
        """Unload the adapter, if one is loaded; a server that does not answer is left alone, with a warning."""
        name = self.adapter
        for client in self.clients if name is not None else ():
            try:
                client.briefer(10.0).post(self.endpoints.unload_adapter, {"lora_name": name}, _succeeded)
            except ServerError as error:
                logger.warning("adapter %s stays on the server: %s", name, error)
        for transfer in self.transfers:
            transfer.close()
        self.weights = Weights(self.weights.version)

    def sleep(self) -> None:
        """Have the servers free their device memory (vLLM: `--enable-sleep-mode` and VLLM_SERVER_DEV_MODE=1)."""
        for client in self.clients:
            client.post(self.endpoints.sleep, {}, _succeeded)

    def wake_up(self) -> None:
        """Undo `sleep`."""
        for client in self.clients:
            client.post(self.endpoints.wake_up, {}, _succeeded)

    async def _do(self, http: httpx.AsyncClient, client: JsonClient, path: str, **body: Any) -> None:
        await client.ask(http, path, body, _succeeded)

    async def _do_if_known(self, http: httpx.AsyncClient, client: JsonClient, path: str, **body: Any) -> None:
        """The same where the server knows the path; older ones do not."""
        try:
            await self._do(http, client, path, **body)
        except ServerError as error:
            if error.status not in UNKNOWN:
                raise


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _for_server(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message in OpenAI's form, images as data URLs."""
    parts = []
    for part in _parts(message):
        if part["type"] == "image":
            url = "data:image;base64," + base64.b64encode(content_of(part["image"], None)[0]).decode()
            part = {"type": "image_url", "image_url": {"url": url}}
        parts.append(part)
    return {**message, **({"content": parts} if parts else {})}


def _check_prompt(ids: Any, prompt: PromptItem) -> None:
    """Raises `ValueError` unless the server has read the prompt's tokens as they are trained on."""
    if ids != prompt.ids:
        count = f"{len(ids)} tokens" if isinstance(ids, list) else shown(ids)
        expected = "the same chat template and sizes of images"
        raise ValueError(f"the server read another prompt ({count}, ours has {len(prompt.ids)}); expected {expected}")


def _whole(value: Any, below: int) -> bool:
    return type(value) is int and 0 <= value < below


def _ids_from_names(tokens: Any) -> list[int]:
    """Ids from "token_id:123" (vLLM's `return_tokens_as_token_ids`)."""
    if not isinstance(tokens, list) or not all(isinstance(t, str) and t.startswith("token_id:") for t in tokens):
        raise ValueError("the answer has no token ids; expected a server that knows `return_token_ids`")
    return [int(t.removeprefix("token_id:")) for t in tokens]


def _models(answer: Any) -> dict[str, int | None]:
    """The longest sequence of each model, in tokens; None where the server does not say."""
    try:
        found = {plain(str(model["id"])): model.get("max_model_len") for model in answer["data"]}
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"the answer is no list of models: {shown(answer)}") from None
    return {name: length if _whole(length, 2**40) else None for name, length in found.items()}


def _tokens(answer: Any) -> list[int]:
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(tokens, list) or not all(_whole(t, 2**31) for t in tokens):
        raise ValueError(f"the answer has no token ids: {shown(answer)}")
    return tokens


def _version(answer: Any) -> str:
    version = answer.get("weight_version") if isinstance(answer, dict) else None
    if not isinstance(version, str):
        raise ValueError(f"the answer has no weight_version: {shown(answer)}")
    return version


def _succeeded(answer: Any) -> None:
    if isinstance(answer, dict) and answer.get("success") is False:
        raise ValueError(f"the server refuses: {answer.get('message', answer)}")
