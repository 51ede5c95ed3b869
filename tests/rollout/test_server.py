"""The server sampler against a stub that speaks the protocol."""

import asyncio
import ctypes
import json
import multiprocessing
import os
import re
import time

import pytest
import torch

from tests.credit.small import llama, tokenizer
from tests.rollout.stub import ANSWERS, Served, serving, shape
from tokengrain.errors import RecipeError, RolloutError
from tokengrain.methods._clipped import sampler_mismatch
from tokengrain.rollout.client import JsonClient, ServerError
from tokengrain.rollout.sampler import PromptItem, SamplingConfig
from tokengrain.rollout.server import OpenAIServer
from tokengrain.scoring.score import score

PROMPTS = [PromptItem([1, 3, 4 + i], row=f"r{i}", raw={"answer": i}) for i in range(3)]
SAMPLING = SamplingConfig(max_new_tokens=6, seed=2, stop_ids=(2, 5, 6))


def completions(path, body):
    """Deterministic: ids from prompt and index; the last completion is truncated."""
    choices = []
    for index in reversed(range(body["n"])):
        ids = [7 + (sum(body["prompt"]) + index + t) % 9 for t in range(3)]
        finish = "length" if index == body["n"] - 1 else "stop"
        ids += [] if finish == "length" else [2]
        logprobs = {"token_logprobs": [-0.5 - t for t in range(len(ids))], "tokens": [f"token_id:{i}" for i in ids]}
        choice = {"index": index, "text": "", "token_ids": ids, "logprobs": logprobs, "finish_reason": finish}
        choices.append(choice)
    return {"choices": choices}


def server(stub, **kwargs):
    return OpenAIServer(stub.url, model="m", **{"backoff": 0.01, "retries": 2, "timeout": 5.0, **kwargs})


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


def test_ids_and_log_probabilities_come_back_in_order():
    with serving(completions) as stub:
        rollouts = server(stub).sample(PROMPTS, n=3, sampling=SAMPLING)
        bodies = {tuple(body["prompt"]): body for _, body in stub.requests}
    for prompt, group in rollouts:
        choices = sorted(completions("", bodies[tuple(prompt.ids)])["choices"], key=lambda c: c["index"])
        assert [c.ids for c in group] == [c["token_ids"] for c in choices]
        assert [c.raw_logps for c in group] == [c["logprobs"]["token_logprobs"] for c in choices]
    assert rollouts.truncated.tolist() == [False, False, True] * 3
    body = bodies[1, 3, 4]
    assert body["n"] == 3
    assert body["max_tokens"] == 6
    assert body["stop_token_ids"] == [2, 5, 6]
    assert body["top_k"] == -1
    assert len({b["seed"] for b in bodies.values()}) == 3
    assert rollouts.to_batch().columns["sampling_logps"].shape == (3 * 11,)


def test_names_of_tokens_will_do():
    def old(path, body):
        answer = completions(path, body)
        for choice in answer["choices"]:
            del choice["token_ids"]
        return answer

    with serving(completions) as new, serving(old) as stub:
        want = server(new).sample(PROMPTS, n=2, sampling=SAMPLING)
        got = server(stub).sample(PROMPTS, n=2, sampling=SAMPLING)
    assert got.groups == want.groups


@pytest.mark.parametrize(
    ("kind", "sampling", "known"),
    [
        ("raw", {}, {"sampling_logps", "raw_logps"}),
        ("raw", {"temperature": 0.5}, {"raw_logps"}),
        ("raw", {"top_p": 0.5}, {"raw_logps"}),
        ("tempered", {"temperature": 0.5}, {"sampling_logps"}),
        ("tempered", {"top_k": 3}, {"raw_logps"}),
        ("tempered", {"top_k": 3, "temperature": 0.5}, set()),
        ("processed", {"top_k": 3, "temperature": 0.5}, {"sampling_logps"}),
        ("processed", {}, {"sampling_logps", "raw_logps"}),
    ],
)
def test_what_the_log_probabilities_are_of(kind, sampling, known):
    with serving(completions) as stub:
        rollouts = server(stub, logps=kind).sample(PROMPTS, n=1, sampling=SamplingConfig(**sampling))
    assert set(rollouts.to_batch().columns) == known | {"truncated"}


def test_no_field_may_change_what_is_drawn():
    for extra in ({"repetition_penalty": 1.1}, {"priority": 1, "presence_penalty": 0.5}, {"temperature": 0.5}):
        with pytest.raises(RecipeError, match=f"extra has {list(extra)[-1]}; expected fields that do not change"):
            OpenAIServer("http://localhost:1", model="m", extra=extra)
    assert OpenAIServer("http://localhost:1", model="m", extra={"priority": 1}).extra == {"priority": 1}


@pytest.mark.parametrize("fault", [500, 503, 429, "garbage", "hang", "drop"])
def test_passing_faults_are_retried(fault):
    with serving(completions) as stub:
        want = server(stub).sample(PROMPTS, n=2, sampling=SAMPLING)
        stub.requests.clear()
        stub.faults[:] = [fault, fault]
        got = server(stub, timeout=0.2, concurrency=1).sample(PROMPTS, n=2, sampling=SAMPLING)
        assert len(stub.requests) == 5
    assert got.groups == want.groups


@pytest.mark.parametrize(
    ("faults", "message", "requests"),
    [
        ([500] * 9, r"row r0: .*/v1/completions: status 500: fault 500 \(attempts: 3", 3),
        ([400], r"row r0: .*status 400: fault 400$", 1),
        (["hang"] * 9, r"row r0: .*[Tt]ime.*\(attempts: 3, timeout 0.2 s\)", 3),
        (["garbage"] * 9, r"row r0: .*JSONDecodeError", 3),
    ],
)
def test_lasting_faults_are_errors(faults, message, requests):
    with serving(completions) as stub:
        stub.faults[:] = faults
        with pytest.raises(ServerError, match=message):
            server(stub, timeout=0.2).sample(PROMPTS[:1], n=2, sampling=SAMPLING)
        assert len(stub.requests) == requests
    with pytest.raises(ServerError, match=r"[Rr]efused|reset"):
        server(stub).sample(PROMPTS[:1], n=2, sampling=SAMPLING)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c["logprobs"]["token_logprobs"].pop(), "4 token ids and 3 log-probabilities"),
        (lambda c: c.update(logprobs=None), "4 token ids and no log-probabilities"),
        (lambda c: c.update(token_ids=[]), "token ids are"),
        (lambda c: (c.pop("token_ids"), c["logprobs"].update(tokens=["a"])), "no token ids"),
        (lambda c: c.update(logprobs=[-1.0]), "logprobs are"),
        (lambda c: c.update(finish_reason="abort"), "finish_reason is 'abort'"),
        (lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, None), "not finite"),
        (lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, 0.5), "at most 0"),
        (lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, True), "not finite"),
        (lambda c: c["logprobs"]["token_logprobs"].__setitem__(0, -(10**400)), "not finite"),
        (lambda c: c["token_ids"].__setitem__(0, True), "token ids are"),
        (lambda c: c["token_ids"].__setitem__(0, 2**40), "token ids are"),
        (lambda c: (c["token_ids"].extend([7] * 6), c["logprobs"]["token_logprobs"].extend([-1.0] * 6)), "10 tokens"),
        (lambda c: c.update(index=1), r"indices \[1, 1\]"),
        (lambda c: c.update(index="0"), "indices"),
    ],
)
def test_malformed_answers(spoil, message):
    def wrong(path, body):
        answer = completions(path, body)
        spoil(answer["choices"][-1])
        return answer

    with serving(wrong) as stub, pytest.raises(RolloutError, match=message):
        server(stub, retries=0).sample(PROMPTS, n=2, sampling=SAMPLING)
    for choices in ([], ["a", "b"]):
        with (
            serving(lambda *_, c=choices: {"choices": c}) as stub,
            pytest.raises(RolloutError, match="no list of 2 choices"),
        ):
            server(stub, retries=0).sample(PROMPTS, n=2, sampling=SAMPLING)


def test_whether_a_server_is_there():
    def models(path, body):
        assert (path, body) == ("/v1/models", None)  # without a tokenizer of ours nothing else is asked
        return {"data": [{"id": "m"}, {"id": "other"}]}

    with serving(models) as stub:
        server(stub).check_reachable()
        stub.faults[:] = [503, 503]  # still starting
        server(stub).check_reachable()
        stub.faults[:] = [404]  # a server without such a list
        server(stub).check_reachable()
        stub.faults[:] = [503]
        with pytest.raises(ServerError, match=r"sampler 'server': .*/v1/models: status 503.*expected a running vllm"):
            server(stub).check_reachable(patient=False)
        stub.faults[:] = [401]
        with pytest.raises(ServerError, match="status 401"):
            server(stub).check_reachable()
        wrong = OpenAIServer(stub.url, model="mother")
        with pytest.raises(RecipeError, match=r"has no model 'mother'; did you mean 'other'\?"):
            wrong.check_reachable()
        OpenAIServer(stub.url, model="mother", flavour="sglang").check_reachable()
    with serving(lambda *_: {"object": "list"}) as stub, pytest.raises(ServerError, match="no list of models"):
        server(stub).check_reachable()


def test_concurrency_is_bounded_and_one_error_stops_the_rest():
    prompts = [PromptItem([i + 1], row=i) for i in range(12)]
    with serving(completions) as stub:
        stub.delay = 0.02
        server(stub, concurrency=3).sample(prompts, n=1, sampling=SAMPLING)
        assert 1 < stub.most_busy <= 3
        stub.requests.clear()
        stub.faults[:] = [400]
        with pytest.raises(ServerError, match="400"):
            server(stub, concurrency=1).sample(prompts, n=1, sampling=SAMPLING)
        assert len(stub.requests) < 12


def test_adapters_are_loaded_under_a_new_name_each_time(tmp_path, caplog):
    def answer(path, body):
        return completions(path, body) if path == "/v1/completions" else {"message": "ok"}

    with serving(answer) as stub:
        sampler = server(stub, refresh="adapter")
        for _ in range(2):
            sampler.refresh(tmp_path)
            sampler.sample(PROMPTS[:1], n=1, sampling=SAMPLING)
        calls = [(path, body.get("lora_name"), body.get("model")) for path, body in stub.requests]
        first, second = calls[0][1], calls[2][1]
        assert calls == [
            ("/v1/load_lora_adapter", first, None),
            ("/v1/completions", None, first),
            ("/v1/load_lora_adapter", second, None),
            ("/v1/unload_lora_adapter", first, None),
            ("/v1/completions", None, second),
        ]
        assert [re.sub("-[0-9a-f]{8}-", "-", name) for name in (first, second)] == ["tokengrain-1", "tokengrain-2"]
        other = server(stub, refresh="adapter")
        other.refresh(tmp_path)  # a run that was killed has left its names on the server
        assert other.model not in (first, second)
        assert stub.requests[0][1]["lora_path"] == str(tmp_path.resolve())
        stub.faults[:] = [400]
        with pytest.raises(ServerError, match="fault 400"):
            sampler.refresh(tmp_path)
        assert sampler.model == second
        sampler.release()
        assert stub.requests[-1] == ("/v1/unload_lora_adapter", {"lora_name": second})
        assert sampler.model == "m"
        stub.requests.clear()
        sampler.release()
        assert not stub.requests
        assert server(stub, flavour="sglang").model == "m"
    other.release()  # the server is gone: a warning, no error, no waiting
    assert other.adapter is None
    assert "stays on the server: http" in caplog.text


def test_checkpoints(tmp_path):
    with serving(lambda path, body: {"success": True}) as stub:
        first = server(stub, refresh="checkpoint")
        first.refresh(tmp_path)
        server(stub, refresh="checkpoint", flavour="sglang").refresh(str(tmp_path))
        folder = str(tmp_path.resolve())
        assert stub.requests == [
            ("/pause?mode=wait", {}),
            ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
            ("/reset_prefix_cache", {}),
            ("/update_weight_version", {"new_version": first.weights.name}),
            ("/resume", {}),
            ("/update_weights_from_disk", {"model_path": folder, "flush_cache": True}),
        ]
        stub.requests.clear()
        server(stub).sleep()
        server(stub).wake_up()
        assert [path for path, _ in stub.requests] == ["/sleep?level=1", "/wake_up"]
        stub.answer = lambda path, body: {"success": False, "message": "no such shape"}
        with pytest.raises(ServerError, match="refuses: no such shape"):
            server(stub, refresh="checkpoint", flavour="sglang", retries=0).refresh(tmp_path)
        with pytest.raises(RolloutError, match="not to be refreshed"):
            server(stub).refresh(tmp_path)
        with pytest.raises(RolloutError, match="save the model first"):
            server(stub, refresh="checkpoint").refresh(llama())


def test_a_model_behind_the_server_agrees_with_the_trainer():
    """The stub samples from a real model: ids and log-probabilities survive the way there and back."""
    model = llama().float()
    with serving(Served(model)) as stub:
        first = server(stub).sample(PROMPTS, n=3, sampling=SAMPLING)
        again = server(stub, concurrency=1).sample(PROMPTS, n=3, sampling=SAMPLING)
    assert first.groups == again.groups
    batch = first.to_batch()
    with torch.no_grad():
        logps = score(model, batch).logps
    assert sampler_mismatch(batch.columns["raw_logps"], logps, batch.segments)["mismatch/max_abs"] < 1e-4


def saved(folder, seed):
    """Another model's weights on disk, and the model."""
    torch.manual_seed(seed)
    model = llama().float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def off(sampler, model):
    """How far the log-probabilities of a rollout are from the model's, in nats."""
    rollouts = sampler.sample(PROMPTS, n=2, sampling=SAMPLING)
    batch = rollouts.to_batch()
    with torch.no_grad():
        logps = score(model, batch).logps
    return sampler_mismatch(batch.columns["raw_logps"], logps, batch.segments)["mismatch/max_abs"], rollouts


def test_what_a_server_started_anew_answers_is_drawn_again(tmp_path, caplog):
    model, served = saved(tmp_path, 3), Served(llama().float())
    with serving(served) as stub:
        sampler = server(stub, refresh="checkpoint", concurrency=1, timeout=60)
        sampler.refresh(tmp_path)
        far, whole = off(sampler, model)
        assert far < 1e-4
        assert whole.metrics == {"rollout/redrawn": 0, "rollout/servers_lost": 0, "rollout/weights_version": 1}
        answer, asked = stub.answer, []

        def crashes(path, body):
            asked.append(path)
            if asked.count("/v1/completions") == 2:
                served.start_anew()
            return answer(path, body)

        stub.answer = crashes
        far, again = off(sampler, model)
        assert far < 1e-4
        assert again.groups == whole.groups
        assert again.metrics["rollout/redrawn"] == 6
        assert "was started anew; it is given the present weights again" in caplog.text
        stub.answer = lambda path, body: served.start_anew() or answer(path, body)
        with pytest.raises(ServerError, match="row r0: the server lost its weights 3 times"):
            sampler.sample(PROMPTS, n=2, sampling=SAMPLING)
        # One that does not say which weights it has is believed, and asked once.
        asked.clear()
        stub.answer = lambda path, body: asked.append(path) or {"/v1/completions": served}[path](path, body)
        other = server(stub, refresh="checkpoint")
        other.weights = sampler.weights
        for _ in range(2):
            other.sample(PROMPTS, n=1, sampling=SAMPLING)
        assert asked.count("/weight_info") == 1


def test_an_adapter_that_a_server_has_lost_is_loaded_again(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(llama().float(), config).eval()
    model.save_pretrained(tmp_path)
    served = Served(llama().float())
    with serving(served) as stub:
        sampler = server(stub, refresh="adapter", timeout=60)
        sampler.refresh(tmp_path)
        assert off(sampler, model)[0] < 1e-4
        served.start_anew()
        far, rollouts = off(sampler, model)
        assert far < 1e-4
        assert rollouts.metrics["rollout/redrawn"] == 6
        assert list(served.adapters) == [sampler.adapter]
        served.start_anew()
        sampler.refresh(tmp_path)  # the one before is gone already
        assert list(served.adapters) == [sampler.adapter]


def test_several_servers_share_the_work_and_one_that_dies_loses_it(tmp_path, caplog):
    model = saved(tmp_path, 3)
    prompts = [PromptItem([1, 3, 4 + i], row=i) for i in range(5)]
    with serving(Served(model)) as alone:
        want = server(alone, timeout=60).sample(prompts, n=2, sampling=SAMPLING).groups
    first, second = Served(llama().float()), Served(llama().float())
    with serving(first) as one:
        with serving(second) as two:
            sampler = OpenAIServer(
                [one.url, two.url], model="m", refresh="checkpoint", retries=2, backoff=0.01, concurrency=4
            )
            sampler.check_reachable()
            assert sampler.longest == 64
            sampler.refresh(tmp_path)
            assert (first.version, second.version) == (sampler.weights.name,) * 2
            one.delay = two.delay = 0.02
            assert sampler.sample(prompts, n=2, sampling=SAMPLING).groups == want
            asked = [sum(path == "/v1/completions" for path, _ in stub.requests) for stub in (one, two)]
            assert min(asked) >= 2
            address = two.url
        rollouts = sampler.sample(prompts, n=2, sampling=SAMPLING)
        assert rollouts.groups == want
        assert rollouts.metrics["rollout/servers_lost"] == 1
        assert f"{address}/v1/completions" in caplog.text
        assert "the other servers do its work until the next refresh" in caplog.text
        sampler.refresh(tmp_path)  # it is tried again, and left alone again
        assert sampler.weights.lost == {1}
        assert sampler.sample(prompts, n=2, sampling=SAMPLING).groups == want
    with pytest.raises(ServerError, match=r"row \d: http.*/v1/completions: .*attempts: 3"):
        sampler.sample(prompts, n=2, sampling=SAMPLING)
    with pytest.raises(ServerError, match=one.url):
        sampler.refresh(tmp_path)
    with pytest.raises(RecipeError, match="url is an empty list"):
        OpenAIServer([], model="m")


def test_a_server_that_fails_to_load_goes_on_with_what_it_has(tmp_path):
    served = Served(llama().float())
    with serving(served) as stub:
        sampler = server(stub, refresh="checkpoint", retries=0)
        stub.faults[:] = [(200, {}), 500]
        with pytest.raises(
            ServerError, match=rf"status 500.*; expected a server of the model .*, which reads {tmp_path}"
        ):
            sampler.refresh(tmp_path)
        assert stub.requests[-1][0] == "/resume"
        assert sampler.weights.version == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="a network of its own needs root")
def test_a_network_without_a_route_to_the_server():
    def work():
        assert ctypes.CDLL(None).unshare(0x40000000) == 0  # CLONE_NEWNET: an empty network for this process
        with pytest.raises(ServerError, match=r"10\.77\.0\.1:8000/v1/models: .*unreachable.*; expected a running vllm"):
            OpenAIServer("http://10.77.0.1:8000", model="m", retries=1, backoff=0.01).check_reachable()

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_a_server_with_another_tokenizer(tok):
    served = Served(llama().float())
    served.tokenizer = lambda text: tok(text, add_special_tokens=False)["input_ids"]
    with serving(served) as stub:
        OpenAIServer(stub.url, tok, model="m").check_reachable()
        served.tokenizer = lambda text: [1, 2, 3]
        with pytest.raises(RecipeError, match=r"has another tokenizer: .* is \[1, 2, 3\] there"):
            OpenAIServer(stub.url, tok, model="m").check_reachable()


def test_the_stub_answers_as_a_real_server_did(tmp_path):
    """What vLLM 0.32.0 answered, recorded: it is read, and the stub says nothing that it does not say."""
    recorded = {(r["path"], r["status"]): r for r in json.loads(ANSWERS.read_text())}
    drawn = recorded["/v1/completions", 200]
    with serving(lambda path, body: recorded[path, 200]["answer"]) as stub:
        sampler = OpenAIServer(stub.url, range(2**20), model="tiny", refresh="checkpoint")
        sampler.check_reachable()
        assert sampler.longest == 384
        sampler.refresh(tmp_path)
        sampler.weights = sampler.weights._replace(name="v")  # what the recorded server was told
        sampling = SamplingConfig(max_new_tokens=3, temperature=0.7)
        found = sampler.sample([PromptItem(drawn["body"]["prompt"])], n=2, sampling=sampling)
    choices = drawn["answer"]["choices"]
    assert [c.ids for c in found.completions] == [c["token_ids"] for c in choices]
    assert [c.raw_logps for c in found.completions] == [c["logprobs"]["token_logprobs"] for c in choices]
    model = llama().float()
    model.save_pretrained(tmp_path)
    served = Served(model)
    served.tokenizer = lambda text: [1, 2]
    for (path, status), one in recorded.items():
        body = one["body"] and {**one["body"], "stop_token_ids": [2]}
        if path == "/collective_rpc":
            body["kwargs"]["weights_path"] = str(tmp_path)
        if path == "/finish_weight_update":
            served.awaited = set()  # the real one does not mind that nothing came
        if "model" in (body or {}):
            body["model"] = {"tiny": "m"}.get(body["model"], body["model"])
        if status == 404:
            with pytest.raises(KeyError):
                served(path, body)
        else:
            assert within(shape(served(path, body)), shape(one["answer"])), path


def within(ours, theirs):
    """Whether each key of `ours` is in `theirs`, with the same kind of value."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return all(name in theirs and within(value, theirs[name]) for name, value in ours.items())
    return within(ours[0], theirs[0]) if isinstance(ours, list) and isinstance(theirs, list) else ours == theirs


def test_keys_and_addresses(monkeypatch):
    monkeypatch.delenv("STUB_KEY", raising=False)
    with pytest.raises(RecipeError, match="STUB_KEY"):
        JsonClient("http://x", api_key_env="STUB_KEY")
    monkeypatch.setenv("STUB_KEY", "s3cret")
    with serving(completions) as stub:
        server(stub, api_key_env="STUB_KEY").sample(PROMPTS[:1], n=1, sampling=SAMPLING)
        assert stub.headers_seen[0]["Authorization"] == "Bearer s3cret"
        assert JsonClient(stub.url + "/v1/").url == stub.url
    for wrong in ({"url": "localhost:1"}, {"flavour": "tgi"}, {"logps": "x"}, {"refresh": "x"}, {"concurrency": 0}):
        with pytest.raises(RecipeError):
            OpenAIServer(**{"url": "http://x", "model": "m", **wrong})


def test_retry_after_is_kept_to(monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    with serving(lambda *_: {"ok": 1}) as stub:
        stub.faults[:] = [(503, {"Retry-After": "7"}), (429, {"Retry-After": "1e9"}), (503, {"Retry-After": "Monday"})]
        monkeypatch.setattr("tokengrain.rollout.client.asyncio.sleep", sleep)
        client = JsonClient(stub.url, retries=3, backoff=0.01, timeout=20)
        assert client.post("/", {}, lambda a: a) == {"ok": 1}
    assert pauses[:2] == [7.0, 20.0]
    assert pauses[2] < 1


def test_the_key_goes_to_no_other_server_and_into_no_message(monkeypatch, caplog):
    monkeypatch.setenv("STUB_KEY", "s3cret-key")
    with serving(lambda *_: {"ok": 1}) as other, serving(lambda *_: {"ok": 1}) as stub:
        client = JsonClient(stub.url, api_key_env="STUB_KEY", retries=1, backoff=0.01, timeout=5)
        for status in (301, 302, 303, 307, 308):
            for target in (other.url + "/x", "ftp://127.0.0.1/x", "file:///etc/passwd"):
                stub.faults[:] = [(status, {"Location": target})]
                with pytest.raises(ServerError, match=f"status {status}: redirects to another server"):
                    client.post("/", {}, lambda a: a)
        assert not other.requests
        stub.faults[:] = [(307, {"Location": "/elsewhere"})]
        assert client.post("/", {"a": 1}, lambda a: a) == {"ok": 1}
        assert stub.requests[-1] == ("/elsewhere", {"a": 1})
        stub.faults[:] = [(302, {"Location": "/"})] * 9
        with pytest.raises(ServerError, match="status 302"):
            client.post("/", {}, lambda a: a)
        stub.faults[:] = [(500, {}, "no Bearer s3cret-key\x1b[31m"), (401, {}, '{"error": {"message": "s3cret-key"}}')]
        with pytest.raises(ServerError, match=r"status 401: \[key\]") as error:
            client.post("/", {}, lambda a: a)

        def wrong(answer):
            raise ValueError("got s3cret-key")

        with pytest.raises(ServerError, match=r"got \[key\]"):
            client.post("/", {}, wrong)
        stub.faults[:] = [(401, {}, json.dumps({"message": "x" * 291 + "s3cret-key"})), (401, {}, "of S3CRET-KEY")]
        for message in (r"x\[key\]$", r"of \[key\]"):  # cut off by the limit of a message; in capitals
            with pytest.raises(ServerError, match=message):
                client.post("/", {}, lambda a: a)
    for text in (caplog.text, str(error.value)):
        assert "s3cret" not in text
        assert "\x1b" not in text
    for key in ("", "two\nlines", "k\u00e9y"):
        monkeypatch.setenv("STUB_KEY", key)
        with pytest.raises(RecipeError, match="STUB_KEY"):
            JsonClient("http://x", api_key_env="STUB_KEY")
    for url in ("http://u:pass@x", "http://x?key=pass", "ftp://x", "file:///x", "http://"):
        with pytest.raises(RecipeError) as refused:
            JsonClient(url)
        assert "pass" not in str(refused.value)


def test_answers_are_bounded_in_time_and_size():
    with serving(lambda *_: {"ok": 1}) as stub:
        client = JsonClient(stub.url, retries=0, timeout=1.0)
        for fault, message in (
            ("slow", "no whole answer within 1 s"),
            ("slow headers", "no whole answer within 1 s"),
            ("endless", "more than 4194304 bytes"),
            ((200, {"Content-Length": str(10**15)}, "{}"), "more than 4194304 bytes"),
            ((200, {}, "[" * 100_000), "RecursionError|JSONDecodeError"),
            ((400, {}, json.dumps({"error": {"message": "A" * 10**6}})), "status 400: A+$"),
            ((200, {"Content-Type": "application/json"}, "\xff<html>"), "Error"),
        ):
            stub.faults[:] = [fault]
            started = time.monotonic()
            with pytest.raises(ServerError, match=message) as error:
                client.post("/", {}, lambda a: a)
            assert time.monotonic() - started < 4
            assert len(str(error.value)) < 600


def test_in_a_running_loop():
    async def notebook():
        with serving(completions) as stub:
            return server(stub).sample(PROMPTS, n=2, sampling=SAMPLING)

    assert len(asyncio.run(notebook()).completions) == 6


def test_token_ids_beyond_the_vocabulary():
    with serving(completions) as stub, pytest.raises(ServerError, match="whole numbers below 9"):
        OpenAIServer(stub.url, range(9), model="m", retries=0).sample(PROMPTS, n=2, sampling=SAMPLING)
