"""Samplers by name: what is refused and with which words, what is made, and what identifies one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.credit.small import llama, tokenizer
from tokengrain.errors import RecipeError
from tokengrain.rollout.branching import Branching
from tokengrain.rollout.local import HFContinuous, HFGenerate
from tokengrain.rollout.sampler import SAMPLERS, check_sampler, deciding, describe_sampler, make_sampler
from tokengrain.rollout.server import OpenAIServer

SERVER = {"name": "server", "url": "http://localhost:8000", "model": "m"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("contnuous", "unknown sampler 'contnuous'; did you mean 'continuous'?"),
        ({"cache": "static"}, "a sampler needs a name"),
        ({"name": "hf", "cahce": "static"}, "sampler 'hf': unknown setting 'cahce'; did you mean 'cache'?"),
        ({"name": "hf", "cache": "paged"}, "sampler 'hf': cache = 'paged': Input should be 'dynamic' or 'static'"),
        ({"name": "hf", "max_batch_tokens": 0}, "max_batch_tokens = 0: Input should be greater than or equal to 1"),
        ({"name": "hf", "max_batch_tokens": 1.5}, "max_batch_tokens = 1.5"),
        ({"name": "hf", "sampler": "hf"}, "sampler 'hf': unknown setting 'sampler'"),
        (
            {"name": "continuous", "settings": {"page_sice": 8}},
            "unknown setting 'page_sice'; did you mean 'page_size'?",
        ),
        ({"name": "server", "model": "m"}, "sampler 'server': setting 'url' is missing"),
        ({**SERVER, "ulr": "x"}, "unknown setting 'ulr'; did you mean 'url'?"),
        ({**SERVER, "url": "localhost:8000"}, "server address is 'localhost:8000'"),
        ({**SERVER, "refresh": "adaptor"}, "refresh = 'adaptor': Input should be 'none', 'checkpoint', 'adapter' or"),
        ({**SERVER, "retries": -1}, "retries = -1"),
        ({"name": "branching", "window": 0}, "sampler 'branching': window = 0"),
        ({"name": "branching", "sampler": "sever"}, "unknown sampler 'sever'; did you mean 'server'?"),
        ({"name": "branching", "sampler": "branching"}, "sampler 'branching' on top of 'branching'"),
        ("nowhere.py:Sampler", "no file 'nowhere.py'"),
    ],
)
def test_what_is_wrong_is_named(given: Any, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        check_sampler(given)
    assert message in str(error.value)


def test_samplers_are_made_with_their_settings() -> None:
    model, tok = llama().float(), tokenizer()
    assert isinstance(make_sampler(None, model), HFGenerate)
    made = make_sampler({"name": "hf", "max_batch_tokens": 100}, model, tok)
    assert isinstance(made, HFGenerate)
    assert (made.max_batch_tokens, made.model, made.tokenizer) == (100, model, tok)
    paged = make_sampler({"name": "continuous", "settings": {"page_size": 32}}, model, tok)
    assert isinstance(paged, HFContinuous)
    assert (paged.settings, paged.model) == ({"page_size": 32}, model)
    server = make_sampler({**SERVER, "refresh": "adapter", "timeout": 3}, model, tok)
    assert isinstance(server, OpenAIServer)
    assert (server.model, server.how, server.client.url) == ("m", "adapter", "http://localhost:8000")
    assert server.client.timeout == 3
    branching = make_sampler({"name": "branching", "sampler": SERVER, "triggers": ["sea"], "window": 2}, model, tok)
    assert isinstance(branching, Branching)
    assert isinstance(branching.sampler, OpenAIServer)
    assert (branching.model, branching.window) == (model, 2)
    assert branching.trigger_mask is not None
    assert branching.trigger_mask.nonzero()[:, 0].tolist() == tok.convert_tokens_to_ids(["sea"])
    assert make_sampler(branching, None) is branching
    with pytest.raises(RecipeError, match="a sampler is an object with sample and refresh"):
        make_sampler(3, model)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_made_sampler_is_identified_as_its_settings_are(name: str) -> None:
    given = {**SERVER, "extra": {"a": (1, 2)}} if name == "server" else {"name": name}
    checked = check_sampler(given)
    found = deciding(checked)
    assert found == describe_sampler(make_sampler(given, llama().float(), tokenizer()))
    assert found == json.loads(json.dumps(found))
    assert found["name"] == name


def test_only_what_decides_the_samples_identifies_one() -> None:
    moved = {**SERVER, "url": "https://elsewhere", "retries": 0, "concurrency": 2}
    assert deciding(check_sampler(moved)) == deciding(check_sampler(SERVER))
    assert deciding(check_sampler({**SERVER, "flavour": "sglang"})) != deciding(check_sampler(SERVER))
    on_top = {"name": "branching", "sampler": {"name": "hf", "max_batch_tokens": 3}}
    assert deciding(check_sampler(on_top)) == deciding(check_sampler("branching"))
    on_top["sampler"] = {"name": "hf", "cache": "static"}
    assert deciding(check_sampler(on_top)) != deciding(check_sampler("branching"))


def test_a_sampler_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from tokengrain.rollout.local import HFGenerate\n"
        "class Twice(HFGenerate):\n"
        "    name = 'twice'\n"
        "    def __init__(self, model, *, times: int = 2):\n"
        "        super().__init__(model)\n"
        "        self.times, self.given = times, {'times': times}\n"
    )
    model = llama().float()
    made: Any = make_sampler({"name": f"{file}:Twice", "times": 3}, model)
    assert (made.times, made.model) == (3, model)
    assert describe_sampler(made) == {"name": "twice", "times": 3}
    with pytest.raises(RecipeError, match="unknown setting 'time'"):
        check_sampler({"name": f"{file}:Twice", "time": 3})
