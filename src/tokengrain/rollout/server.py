"""`OpenAIServer`: sampling from a server that speaks OpenAI's completions protocol (vLLM, SGLang)."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import random
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from tokengrain.errors import RecipeError, RolloutError, shown
from tokengrain.rollout.sampler import (
    PromptItem,
    Rollouts,
    SampledCompletion,
    SamplingConfig,
    checked_prompts,
    derived_seed,
    occurrences,
)
from tokengrain.settings import Count, NonNegative, Positive, Whole, nearest, validate_settings

# ----------------------------------------------------------------------------------------------------
# JSON over HTTP with timeouts, retries and bounded concurrency. Only the standard library is needed.

T = TypeVar("T")
R = TypeVar("R")

# Too many requests, server busy or broken: another attempt may succeed. Other codes are final.
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
# There is a server, but no such path, or not for this.
NO_LIST = frozenset({404, 405, 501})
LONGEST_PAUSE = 60.0


class ServerError(RolloutError):
    """A server that gave no usable answer, after the retries that make sense.

    Attributes:
        status: the code with which it refused; None where it did not answer, or not usably.
    """

    status: int | None = None


class JsonClient:
    """Posts and reads JSON, with retries.

    Connection errors, timeouts, the status codes in `AGAIN` and answers that are not JSON are retried, with
    pauses that double (and the server's `Retry-After`); any other status is an error at once.

    Args:
        url: the server's root, such as "http://localhost:8000" ("/v1" at the end is taken off).
        timeout: seconds without an answer that end an attempt.
        retries: further attempts after the first.
        backoff: seconds of the first pause.
        api_key_env: name of the environment variable that holds the key; None: no key is sent.

    Raises:
        RecipeError: not an http(s) address, or the variable is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 600.0,
        retries: int = 5,
        backoff: float = 0.5,
        api_key_env: str | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise RecipeError(f"server address is {url!r}; expected one that begins with http:// or https://")
        if timeout <= 0 or retries < 0 or backoff < 0:
            raise RecipeError(f"timeout {timeout}, retries {retries}, backoff {backoff}; expected > 0, >= 0, >= 0")
        if api_key_env is not None and api_key_env not in os.environ:
            raise RecipeError(f"the environment variable {api_key_env!r} for the server's key is not set")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.retries, self.backoff, self.api_key_env = timeout, retries, backoff, api_key_env

    def briefer(self, timeout: float, retries: int = 0) -> JsonClient:
        """The same client with at most this time-out, and so many retries."""
        other = copy.copy(self)
        other.timeout, other.retries = min(self.timeout, timeout), retries
        return other

    def post(self, path: str, body: Any, check: Callable[[Any], T], stop: threading.Event | None = None) -> T:
        """Post `body` to `path`; the answer goes through `check`.

        Args:
            check: turns the decoded answer into a result; a ValueError of it counts as a malformed answer and is
                retried.
            stop: no further attempt once this is set.

        Raises:
            ServerError: no usable answer; names the address, what was wrong last, and the attempts.
        """
        return self._asked(path, body, check, stop)

    def get(self, path: str, check: Callable[[Any], T]) -> T:
        """The same without anything to send."""
        return self._asked(path, None, check, None)

    def _asked(self, path: str, body: Any, check: Callable[[Any], T], stop: threading.Event | None) -> T:
        reason = ""
        for attempt in range(self.retries + 1):
            pause = min(self.backoff * 2**attempt * random.uniform(0.5, 1.0), LONGEST_PAUSE)
            try:
                return check(self._once(path, body))
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}: {_message(error)}"
                if error.code not in AGAIN:
                    failure = ServerError(f"{self.url}{path}: {reason}")
                    failure.status = error.code
                    raise failure from None
                pause = max(pause, _retry_after(error))
            except (OSError, HTTPException, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
            if attempt == self.retries or (stop is not None and stop.is_set()):
                break
            logger.warning("%s%s: %s; trying again in %.1f s", self.url, path, reason, pause)
            if stop is not None:
                stop.wait(pause)
            else:
                time.sleep(pause)
        raise ServerError(f"{self.url}{path}: {reason} (attempts: {attempt + 1}, timeout {self.timeout:g} s)")

    def _once(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_env]}"
        content, method = (None, "GET") if body is None else (json.dumps(body).encode(), "POST")
        request = urllib.request.Request(self.url + path, content, headers, method=method)
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            found = answer.read()
        # Some endpoints answer with plain text or with nothing.
        if "json" not in (answer.headers.get("Content-Type") or ""):
            return found.decode(errors="replace")
        return json.loads(found)


def served_models(client: JsonClient) -> list[str]:
    """The names of the models that a server lists; none where it has no such list.

    Raises:
        ServerError: it does not answer, or refuses.
    """
    try:
        return client.get("/v1/models", _model_names)
    except ServerError as error:
        if error.status in NO_LIST:
            return []
        raise


def _model_names(answer: Any) -> list[str]:
    try:
        return [str(model["id"]) for model in answer["data"]]
    except (KeyError, TypeError):
        raise ValueError(f"the answer is no list of models: {shown(answer)}") from None


def gather(function: Callable[[T, threading.Event], R], items: Sequence[T], concurrency: int) -> list[R]:
    """`function(item, stop)` for all items in threads, in order; the first error stops the rest.

    Args:
        concurrency: most calls at a time.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, min(concurrency, len(items)))) as pool:
        futures = [pool.submit(function, item, stop) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    return [future.result() for future in futures]


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says was wrong, in OpenAI's form or as it stands."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, HTTPException):
        return str(error.reason)
    try:
        found: Any = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        return str(found.get("message", found)) if isinstance(found, dict) else shown(found)
    except ValueError:
        return shown(text)


def _retry_after(error: urllib.error.HTTPError) -> float:
    try:
        return min(float(error.headers.get("Retry-After") or 0), LONGEST_PAUSE)
    except ValueError:  # a date
        return 0.0


logger = logging.getLogger(__name__)

Flavour = Literal["vllm", "sglang"]
LogpKind = Literal["raw", "tempered", "processed"]
Refresh = Literal["none", "checkpoint", "adapter"]


@dataclass(frozen=True)
class Endpoints:
    """Where a kind of server takes what is not in OpenAI's protocol."""

    load_adapter: str
    unload_adapter: str
    logps: LogpKind


ENDPOINTS: dict[Flavour, Endpoints] = {
    "vllm": Endpoints("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "raw"),
    "sglang": Endpoints("/load_lora_adapter", "/unload_lora_adapter", "tempered"),
}


class OpenAIServer:
    """Samples from a vLLM or SGLang server. Prompts and completions go over the wire as token ids.

    One request per prompt asks for all its completions, so that the server shares the prompt; several requests
    run at a time. The server must be started with log-probabilities of the sampled token allowed (the default)
    and the trainer's tokenizer.

    Args:
        url: the server's root, for example "http://localhost:8000".
        model: the model's name on the server.
        flavour: "vllm" or "sglang".
        logps: which log-probabilities the server gives: of the model's own distribution ("raw", vLLM's default),
            after the temperature ("tempered", SGLang's default), or after top-k, top-p and min-p too
            ("processed", vLLM with `--logprobs-mode processed_logprobs`). None: the flavour's default.
        refresh: what `refresh` does: "adapter" loads a LoRA adapter under a new name, samples from it and
            unloads the one before (vLLM: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, `--enable-lora`, `--max-loras 2`;
            SGLang: `--enable-lora`); "checkpoint" has the server load a whole checkpoint (vLLM:
            VLLM_SERVER_DEV_MODE=1; SGLang as it is); "none" refuses. The server must see the trainer's files.
        adapter_name: what the names of adapters begin with; the rest is drawn for each sampler, so that a run that was
            killed does not find its names taken.
        timeout, retries, backoff, api_key_env: see `JsonClient`.
        concurrency: most requests at a time.
        extra: further fields of every completions request.

    Raises:
        RecipeError: an unknown flavour, kind or way to refresh; a bad address.
    """

    name = "server"
    # Where the server is and how it is asked; a run may go on with another one.
    neutral: ClassVar[frozenset[str]] = frozenset(
        {"url", "adapter_name", "timeout", "retries", "backoff", "concurrency", "api_key_env"}
    )

    def __init__(
        self,
        url: str,
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
        given = {
            "url": url,
            "model": model,
            "flavour": flavour,
            "logps": logps,
            "refresh": refresh,
            "adapter_name": adapter_name,
            "timeout": timeout,
            "retries": retries,
            "backoff": backoff,
            "concurrency": concurrency,
            "api_key_env": api_key_env,
            "extra": extra,
        }
        self.given = validate_settings("sampler 'server'", OpenAIServer, given, also=("url",))
        self.client = JsonClient(url, timeout=timeout, retries=retries, backoff=backoff, api_key_env=api_key_env)
        self.base_model, self.flavour, self.how, self.adapter_name = model, flavour, refresh, adapter_name
        self.endpoints, self.concurrency, self.extra = ENDPOINTS[flavour], concurrency, dict(extra or {})
        self.logps: LogpKind = logps or self.endpoints.logps
        self.adapter: str | None = None
        self.version, self._own = 0, secrets.token_hex(4)

    @classmethod
    def check(cls, **settings: Any) -> None:
        """Raises `RecipeError` for settings that do not work. Neither server nor key need be there yet."""
        cls(**{**settings, "api_key_env": None})

    def check_reachable(self, *, patient: bool = True) -> None:
        """Ask the server which models it has; if not patient, once and for no longer than 5 s.

        Raises:
            ServerError: nobody answers, or the key is refused.
            RecipeError: vLLM has no model of this name. (SGLang does not mind the name.)
        """
        client = self.client.briefer(30.0, self.client.retries) if patient else self.client.briefer(5.0)
        try:
            names = served_models(client)
        except ServerError as error:
            raise ServerError(f"sampler 'server': {error}; expected a running {self.flavour} server") from None
        if self.flavour == "vllm" and names and self.base_model not in names:
            known = nearest(self.base_model, names)
            raise RecipeError(f"sampler 'server': {client.url} has no model {self.base_model!r}{known}")

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
        work = list(zip(prompts, occurrences(prompts), strict=True))

        def one(item: tuple[PromptItem, int], stop: threading.Event) -> tuple[SampledCompletion, ...]:
            prompt, seen = item
            body = self._body(prompt, seen, n, sampling)
            try:
                return self.client.post("/v1/completions", body, lambda a: self._read(a, n, sampling), stop)
            except ServerError as error:
                raise ServerError(f"row {prompt.row}: {error}") from None

        groups = tuple(gather(one, work, self.concurrency))
        return Rollouts(prompts, groups, sampling, time.perf_counter() - started)

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
            # The server adds its model's end-of-sequence token unless told to ignore it.
            body |= {"stop_token_ids": list(sampling.stop_ids), "ignore_eos": True}
        return body | self.extra

    def _read(self, answer: Any, n: int, sampling: SamplingConfig) -> tuple[SampledCompletion, ...]:
        """The completions in an answer. Raises `ValueError` where it is not what was asked for."""
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != n or not all(isinstance(c, dict) for c in choices):
            raise ValueError(f"the answer has no list of {n} choices")
        found = []
        for choice in sorted(choices, key=lambda c: c.get("index") or 0):
            logprobs = choice.get("logprobs") or {}
            if not isinstance(logprobs, dict):
                raise ValueError(f"the answer's logprobs are {logprobs!r:.80}; expected an object")
            logps = logprobs.get("token_logprobs")
            ids = choice.get("token_ids")
            if ids is None:
                ids = _ids_from_names(logprobs.get("tokens"))
            _check(ids, logps, choice.get("finish_reason"))
            finish: Any = choice["finish_reason"]
            # By what the server says they are; None where that is neither.
            raw = self.logps == "raw" or sampling.is_model or (self.logps == "tempered" and sampling.temperature == 1)
            drawn = (
                self.logps == "processed" or (self.logps == "tempered" and not sampling.truncates) or sampling.is_model
            )
            found.append(SampledCompletion(ids, logps if drawn else None, logps if raw else None, finish))
        return tuple(found)

    def refresh(self, model_or_path: Any) -> None:
        """Load the folder of an adapter or checkpoint on the server and sample from it from now on.

        Raises:
            RolloutError: not a folder, or this sampler was told not to refresh.
            ServerError: the server refuses; it goes on with what it had.
        """
        path = Path(model_or_path) if isinstance(model_or_path, (str, Path)) else None
        if path is None or not path.is_dir():
            raise RolloutError(f"a server loads weights from a folder, got {model_or_path!r}; save the model first")
        if self.how == "none":
            raise RolloutError(f"{self.client.url} is not to be refreshed; expected refresh: adapter or checkpoint")
        folder = str(path.resolve())
        if self.how == "checkpoint":
            self._load_checkpoint(folder)
        else:
            self._load_adapter(folder)
        self.version += 1

    def _load_checkpoint(self, folder: str) -> None:
        if self.flavour == "sglang":
            body = {"model_path": folder, "flush_cache": True}
            self.client.post("/update_weights_from_disk", body, _succeeded)
            return
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        self.client.post("/collective_rpc", body, _succeeded)
        # Cached prompts were computed with the old weights.
        self.client.post("/reset_prefix_cache", {}, _succeeded)

    def _load_adapter(self, folder: str) -> None:
        # A new name each time: the server's caches go by the name, and requests under way keep the old one.
        name, before = f"{self.adapter_name}-{self._own}-{self.version + 1}", self.adapter
        self.client.post(self.endpoints.load_adapter, {"lora_name": name, "lora_path": folder}, _succeeded)
        self.adapter = name
        if before is not None:
            self.client.post(self.endpoints.unload_adapter, {"lora_name": before}, _succeeded)

    def release(self) -> None:
        """Unload the adapter, if one is loaded; a server that does not answer is left alone, with a warning."""
        if self.adapter is None:
            return
        try:
            self.client.briefer(10.0).post(self.endpoints.unload_adapter, {"lora_name": self.adapter}, _succeeded)
        except ServerError as error:
            logger.warning("adapter %s stays on the server: %s", self.adapter, error)
        self.adapter = None

    def sleep(self) -> None:
        """Have the server free its device memory (vLLM: `--enable-sleep-mode` and VLLM_SERVER_DEV_MODE=1)."""
        path = "/sleep?level=1" if self.flavour == "vllm" else "/release_memory_occupation"
        self.client.post(path, {}, _succeeded)

    def wake_up(self) -> None:
        """The opposite of `sleep`."""
        path = "/wake_up" if self.flavour == "vllm" else "/resume_memory_occupation"
        self.client.post(path, {}, _succeeded)


def _ids_from_names(tokens: Any) -> list[int]:
    """Ids from tokens of the form "token_id:123" (vLLM's `return_tokens_as_token_ids`)."""
    if not isinstance(tokens, list) or not all(isinstance(t, str) and t.startswith("token_id:") for t in tokens):
        raise ValueError("the answer has no token ids; expected a server that knows `return_token_ids`")
    return [int(t.removeprefix("token_id:")) for t in tokens]


def _check(ids: Any, logps: Any, finish: Any) -> None:
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ValueError(f"the answer's token ids are {ids!r:.80}; expected at least one whole number")
    if not isinstance(logps, list) or len(logps) != len(ids):
        count = len(logps) if isinstance(logps, list) else "no"
        raise ValueError(f"the answer has {len(ids)} token ids and {count} log-probabilities")
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in logps):
        raise ValueError("the answer has log-probabilities that are not finite numbers")
    if finish not in ("stop", "length"):
        raise ValueError(f"the answer's finish_reason is {finish!r}; expected stop or length")


def _succeeded(answer: Any) -> None:
    if isinstance(answer, dict) and answer.get("success") is False:
        raise ValueError(f"the server refuses: {answer.get('message', answer)}")
