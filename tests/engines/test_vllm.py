"""Sampling and training with a real vLLM server. `make test-vllm` installs it and runs this."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.engines.vllm import LONGEST, Vllm, saved_model
from tests.rollout.stub import ANSWERS, Tcp, shape
from tests.training.ranks import on_ranks
from tokengrain.errors import DataError, RolloutError, read_log
from tokengrain.models import StreamedWeights
from tokengrain.rollout import transfer
from tokengrain.rollout.client import ServerError
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import PromptItem, Rollouts, SamplingConfig, encode_prompts
from tokengrain.rollout.server import OpenAIServer
from tokengrain.scoring.score import score
from tokengrain.training.config import OnlineConfig
from tokengrain.training.online import FAR, OnlineTrainer

pytestmark = pytest.mark.vllm
CLOSE = 1e-4  # nats, in float32
ROWS = [{"id": f"r{i}", "prompt": f"What is {i} + {i + 1}? The answer is"} for i in range(16)]
KINDS: dict[str, dict[str, Any]] = {
    "model": {},
    "temperature and top-p": {"temperature": 0.7, "top_p": 0.8},
    "temperature and top-k": {"temperature": 0.7, "top_k": 5},
    "min-p": {"min_p": 0.1},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("vllm") / "tiny"
    return folder, *saved_model(folder)


@pytest.fixture(scope="module")
def servers(tiny: tuple[Path, Any, Any]) -> Iterator[tuple[Vllm, Vllm]]:
    """One with its defaults and adapters, one that gives log-probabilities of what was drawn from."""
    sent = "--weight-transfer-config", '{"backend": "nccl"}'
    both = (
        Vllm(tiny[0], "--enable-lora", "--max-loras", "2", *sent),
        Vllm(tiny[0], "--logprobs-mode", "processed_logprobs"),
    )
    try:
        for one in both:
            one.start()
        for one in both:
            one.wait()
        yield both
    finally:
        for one in both:
            one.kill()


@pytest.fixture
def raw(servers: tuple[Vllm, Vllm]) -> Vllm:
    return servers[0]


@pytest.fixture(scope="module")
def prompts(tiny: tuple[Path, Any, Any]) -> list[PromptItem]:
    return encode_prompts(ROWS, tiny[2])


def sampler(server: Vllm | list[str], tokenizer: Any = None, **settings: Any) -> OpenAIServer:
    url = server.url if isinstance(server, Vllm) else server
    return OpenAIServer(url, tokenizer, model="tiny", **{"timeout": 300.0, **settings})


def off(rollouts: Rollouts, model: Any) -> float:
    """The largest difference between the server's log-probabilities and the model's, in nats."""
    batch = rollouts.to_batch()
    with torch.no_grad():
        own = score(model, batch).logps
    return float((batch.columns["raw_logps"] - own).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_the_models(kind: str, raw: Vllm, tiny: Any, prompts: Any) -> None:
    sampling = SamplingConfig(max_new_tokens=24, seed=1, **KINDS[kind])
    rollouts = sampler(raw, tiny[2]).sample(prompts, n=4, sampling=sampling)
    assert off(rollouts, tiny[1]) < CLOSE
    assert ("sampling_logps" in rollouts.to_batch().columns) == (kind == "model")


@pytest.mark.parametrize("kind", KINDS)
def test_processed_log_probabilities(kind: str, servers: Any, tiny: Any, prompts: Any) -> None:
    """Temperature, then top-k, min-p and top-p, each renormalised, written out by hand."""
    sampling = SamplingConfig(max_new_tokens=16, seed=1, **KINDS[kind])
    rollouts = sampler(servers[1], logps="processed").sample(prompts[:4], n=2, sampling=sampling)
    worst = 0.0
    for prompt, group in rollouts:
        for completion in group:
            ids = torch.tensor([prompt.ids + completion.ids])
            with torch.no_grad():
                logits = tiny[1](ids).logits[0, -len(completion.ids) - 1 : -1].double()
            for token, row, found in zip(completion.ids, logits, completion.sampling_logps, strict=True):
                worst = max(worst, abs(float(drawn_from(row, sampling)[token]) - found))
    assert worst < CLOSE


def drawn_from(logits: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    logps = (logits / sampling.temperature).log_softmax(-1)
    keep = torch.ones_like(logps, dtype=torch.bool)
    if sampling.top_k:
        keep &= logps >= logps.topk(sampling.top_k).values[-1]
    if sampling.min_p:
        keep &= logps.exp() >= sampling.min_p * logps.exp().max()
    if sampling.top_p < 1:
        order = logps.argsort(descending=True)
        before = logps[order].exp().cumsum(-1) - logps[order].exp()
        keep[order[before >= sampling.top_p]] = False
    return logps.where(keep, torch.tensor(-torch.inf, dtype=logps.dtype)).log_softmax(-1)


def test_seeds_and_the_most_probable_tokens(raw: Vllm, tiny: Any, prompts: Any) -> None:
    server, sampling = sampler(raw), SamplingConfig(max_new_tokens=16, seed=3)
    first, again = (server.sample(prompts[:4], n=4, sampling=sampling) for _ in range(2))
    assert [c.ids for c in first.completions] == [c.ids for c in again.completions]
    assert len({tuple(c.ids) for c in first.completions}) == 16
    greedy = SamplingConfig(max_new_tokens=16, temperature=0.0)
    here = HFGenerate(tiny[1], tiny[2]).sample(prompts, n=1, sampling=greedy)
    there = server.sample(prompts, n=1, sampling=greedy)
    assert [c.ids for c in there.completions] == [c.ids for c in here.completions]


def test_stop_strings_and_ids(raw: Vllm, tiny: Any, prompts: Any) -> None:
    server, tokenizer = sampler(raw), tiny[2]
    free = server.sample(prompts, n=4, sampling=SamplingConfig(max_new_tokens=48, seed=3))
    texts = [tokenizer.decode(c.ids) for c in free.completions]
    pieces = Counter(t[i : i + 2] for t in texts for i in range(len(t) - 2) if t[i : i + 2].isascii())
    stops = tuple(piece for piece, _ in pieces.most_common(4))
    stopped = server.sample(prompts, n=4, sampling=SamplingConfig(max_new_tokens=48, seed=3, stop=stops))
    right = 0
    for whole, completion in zip(free.completions, stopped.completions, strict=True):
        assert completion.ids == whole.ids[: len(completion.ids)]
        if completion.finish_reason == "stop" and completion.ids[-1] != tokenizer.eos_token_id:
            assert any(stop in tokenizer.decode(completion.ids) for stop in stops)
            assert not any(stop in tokenizer.decode(completion.ids[:-1]) for stop in stops)
            right += 1
    assert right > 20
    token = free.completions[0].ids[6]
    sampling = SamplingConfig(max_new_tokens=48, seed=3, stop_ids=(token,))
    ended = server.sample(prompts, n=4, sampling=sampling).completions
    assert ended[0].ids[-1] == token
    assert all((c.ids[-1] == token) == (c.finish_reason == "stop") for c in ended)
    assert not any(token in c.ids[:-1] for c in ended)


def changed(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return type(model)(model.config).eval()


def test_refresh_with_a_checkpoint(raw: Vllm, tiny: Any, prompts: Any, tmp_path: Path) -> None:
    folder, model, tokenizer = tiny
    other, server = changed(model, 7), sampler(raw, tokenizer, refresh="checkpoint")
    other.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    server.check_reachable()
    assert server.longest == LONGEST
    sampling = SamplingConfig(max_new_tokens=16, seed=1)
    for source, weights in ((tmp_path, other), (folder, model)):
        server.refresh(source)
        found = server.sample(prompts, n=2, sampling=sampling)
        assert off(found, weights) < CLOSE
        assert found.metrics["rollout/redrawn"] == 0
    assert httpx.get(raw.url + "/weight_info").json() == {"weight_version": server.weights.name}
    assert httpx.get(raw.url + "/is_paused").json() == {"is_paused": False}


def test_refresh_while_others_sample(raw: Vllm, tiny: Any, prompts: Any) -> None:
    """It waits for the requests under way, and those that come meanwhile wait for it."""
    folder, model, _ = tiny
    one, two, found = sampler(raw, refresh="checkpoint"), sampler(raw), []
    sampling = SamplingConfig(max_new_tokens=200, seed=1, stop_ids=())
    busy = threading.Thread(target=lambda: found.append(two.sample(prompts, n=4, sampling=sampling)))
    busy.start()
    time.sleep(0.5)
    one.refresh(folder)
    busy.join()
    assert off(found[0], model) < CLOSE


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    names = ["q_proj", "v_proj"]
    config = LoraConfig(r=8, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(changed(model, 0), config).eval()


def test_refresh_with_an_adapter(raw: Vllm, tiny: Any, prompts: Any, tmp_path: Path) -> None:
    server, sampling = sampler(raw, refresh="adapter"), SamplingConfig(max_new_tokens=16, seed=1)
    model = adapted(tiny[1])
    model.get_base_model().load_state_dict(
        {
            n.replace("q_proj.", "q_proj.base_layer.").replace("v_proj.", "v_proj.base_layer."): v
            for n, v in tiny[1].state_dict().items()
        },
        strict=False,
    )
    model.save_pretrained(tmp_path)
    for _ in range(3):  # two are held at a time
        server.refresh(tmp_path)
        assert off(server.sample(prompts, n=2, sampling=sampling), model) < CLOSE
    # Taken away, as where the server is started anew.
    answer = httpx.post(raw.url + "/v1/unload_lora_adapter", json={"lora_name": server.adapter})
    assert answer.is_success
    again = server.sample(prompts, n=2, sampling=sampling)
    assert off(again, model) < CLOSE
    assert again.metrics["rollout/redrawn"] == 32
    server.release()
    assert off(server.sample(prompts, n=2, sampling=sampling), tiny[1]) < CLOSE


def digits(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [sum(character.isdigit() for character in text) / max(len(text), 1) for text in completions]


def train(
    folder: Path, tiny: Any, server: Vllm | list[str], *, model: Any = None, **given: Any
) -> list[dict[str, Any]]:
    """The log of three steps of online training; the server begins with other weights than the policy's."""
    settings: dict[str, Any] = {
        "use_cpu": True,
        "num_generations": 4,
        "prompts_per_rollout": 4,
        "max_new_tokens": 16,
        "max_steps": 3,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "overwrite_output_dir": True,
        **given.pop("settings", {}),
    }
    url = server.url if isinstance(server, Vllm) else server
    how = given.pop("refresh", "checkpoint")
    trainer = OnlineTrainer(
        changed(tiny[1], 11) if model is None else model,
        OnlineConfig(str(folder), **settings),
        rewards=[digits],
        train_dataset=ROWS,
        processing_class=tiny[2],
        sampler={"name": "server", "url": url, "model": "tiny", "refresh": how, "timeout": 300.0},
        **given,
    )
    trainer.train()
    return [entry for entry in read_log(folder / "log.jsonl") if "loss" in entry]


@pytest.mark.parametrize("method", ["grpo", "thr"])
def test_online_training(method: str, raw: Vllm, tiny: Any, tmp_path: Path) -> None:
    credit = ["group", "thr"] if method == "thr" else ["group"]
    log = train(tmp_path, tiny, raw, objective="grpo", credit=credit)
    assert len(log) == 3
    assert max(entry["mismatch/max_abs"] for entry in log) < CLOSE
    assert all(entry["seconds/refresh"] > 0 for entry in log)
    versions = [entry["rollout/weights_version"] for entry in log]
    assert versions == sorted(set(versions))


def test_one_rollout_ahead(raw: Vllm, tiny: Any, tmp_path: Path) -> None:
    """The first two rollouts come from the first weights; then each from those before the last update."""
    log = train(tmp_path, tiny, raw, settings={"max_staleness": 1, "max_steps": 4, "learning_rate": 1e-3})
    assert [entry["rollout/staleness"] for entry in log] == [0, 1, 1, 1]
    first, *versions = [entry["rollout/weights_version"] for entry in log]
    assert versions == [first, first + 1, first + 2]
    assert log[0]["mismatch/max_abs"] < CLOSE
    assert all(entry["mismatch/max_abs"] > CLOSE and entry["mismatch/mean_abs"] < FAR for entry in log[1:])


def test_online_training_of_an_adapter(raw: Vllm, tiny: Any, tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    sampler(raw, refresh="checkpoint").refresh(tiny[0])
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(tiny[0])
    log = train(tmp_path, tiny, raw, model=base, refresh="adapter", peft_config=config)
    assert max(entry["mismatch/max_abs"] for entry in log) < CLOSE
    held = [model["id"] for model in httpx.get(raw.url + "/v1/models").json()["data"]]
    assert held == ["tiny"]


def test_two_ranks_share_a_server(raw: Vllm, tiny: Any, tmp_path: Path) -> None:
    one = train(tmp_path / "one", tiny, raw)
    on_ranks(2, lambda: train(tmp_path / "two", tiny, raw) and None, timeout=600)
    two = [entry for entry in read_log(tmp_path / "two" / "log.jsonl") if "loss" in entry]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["mismatch/max_abs"] < CLOSE
        assert ours["rollout/tokens"] == theirs["rollout/tokens"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_a_prompt_without_room_on_the_server(raw: Vllm, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="longer than the server's max_model_len"):
        train(tmp_path, tiny, raw, settings={"max_new_tokens": 380})


def test_what_it_answers_is_what_the_stub_answers(raw: Vllm, tiny: Any) -> None:
    """The recorded answers, which the fast tests read. TOKENGRAIN_RECORD=1 writes them anew."""

    def asked(path: str, body: Any = None) -> dict[str, Any]:
        answer = httpx.get(raw.url + path) if body is None else httpx.post(raw.url + path, json=body, timeout=300)
        return {"path": path, "body": body, "status": answer.status_code, "answer": answer.json()}

    draw = {"prompt": [5, 6, 7], "n": 2, "max_tokens": 3, "temperature": 0.7, "seed": 1, "logprobs": 0}
    draw |= {"return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False}
    found = [
        asked("/v1/models"),
        asked("/v1/completions", {"model": "tiny", **draw}),
        asked("/v1/completions", {"model": "gone", **draw}),
        asked("/tokenize", {"model": "tiny", "prompt": "1 + 1", "add_special_tokens": False}),
        asked("/v1/unload_lora_adapter", {"lora_name": "gone"}),
        asked("/pause?mode=wait", {}),
        asked("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(tiny[0])}}),
        asked("/reset_prefix_cache", {}),
        asked("/update_weight_version", {"new_version": "v"}),
        asked("/weight_info"),
        asked("/get_world_size"),
        asked("/shutdown_weight_transfer_engine", {}),
        asked("/start_weight_update", {}),
        asked("/finish_weight_update", {"weight_version": "w"}),
        asked("/resume", {}),
    ]
    if os.environ.get("TOKENGRAIN_RECORD"):
        ANSWERS.write_text(json.dumps(found, indent=1).replace(str(tiny[0]), "FOLDER") + "\n")
    recorded = json.loads(ANSWERS.read_text())
    assert [(r["path"], r["status"], shape(r["answer"])) for r in recorded] == [
        (r["path"], r["status"], shape(r["answer"])) for r in found
    ]


def test_the_weight_transfer_up_to_its_wire(raw: Vllm, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server understands what it is told, and says in its own words that it has no GPU to join with."""
    monkeypatch.setattr(transfer, "Nccl", Tcp)
    server = sampler(raw, tiny[2], refresh="nccl", timeout=60.0, retries=0)
    server.check_reachable()
    with pytest.raises(RolloutError, match=r"/init_weight_transfer_engine: status 500: .*(NCCL|accelerator|CUDA)"):
        server.refresh(StreamedWeights(tiny[1]))
    sent = httpx.post(raw.url + "/init_weight_transfer_engine", json={"init_info": {"world": 2}}, timeout=60)
    assert sent.status_code == 500  # it reads the fields, so those above are right
    assert "world" in sent.text


def test_speed_is_that_of_a_bare_loop(raw: Vllm, prompts: Any) -> None:
    """Tokens per second, at least 0.8 times those of the same requests sent without anything around them."""
    server, sampling = sampler(raw), SamplingConfig(max_new_tokens=96, seed=2, stop_ids=())
    bodies = [server._body(prompt, 0, 4, sampling) for prompt in prompts]

    async def bare() -> None:
        gate = asyncio.Semaphore(server.concurrency)
        async with httpx.AsyncClient(timeout=300) as http:

            async def one(body: Any) -> None:
                async with gate:
                    (await http.post(raw.url + "/v1/completions", json=body)).json()

            await asyncio.gather(*(one(body) for body in bodies))

    times: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(4):
        for name, work in (
            ("bare", lambda: asyncio.run(bare())),
            ("ours", lambda: server.sample(prompts, n=4, sampling=sampling)),
        ):
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    ratio = min(times["bare"]) / min(times["ours"])
    print(f"speed through the sampler: {ratio:.2f} of a bare loop")
    assert ratio > 0.8


def test_a_server_killed_in_a_rollout(servers: tuple[Vllm, Vllm], tiny: Any, prompts: Any, tmp_path: Path) -> None:
    """Its requests go to the other; alone, it is waited for within a bound, and given the weights anew."""
    first, second = servers
    model = changed(tiny[1], 13)
    model.save_pretrained(tmp_path)
    tiny[2].save_pretrained(tmp_path)
    both = sampler([first.url, second.url], refresh="checkpoint", retries=2, backoff=0.2)
    both.refresh(tmp_path)
    sampling = SamplingConfig(max_new_tokens=128, seed=2, stop_ids=())
    threading.Timer(1.0, second.kill).start()
    found = both.sample(prompts, n=4, sampling=sampling)
    assert off(found, model) < CLOSE
    assert both.weights.lost == {1}
    assert found.metrics["rollout/servers_lost"] == 1
    second.start()
    second.wait()  # with the weights on its disk
    both.refresh(tmp_path)
    assert both.weights.lost == frozenset()
    alone = sampler(second, refresh="checkpoint", retries=2000, backoff=0.1)
    alone.refresh(tmp_path)

    def kill_and_start() -> None:
        second.kill()
        second.start()

    threading.Timer(1.0, kill_and_start).start()
    found = alone.sample(prompts, n=4, sampling=sampling)
    assert found.metrics["rollout/redrawn"] > 0
    assert off(found, model) < CLOSE
    gone = sampler(["http://127.0.0.1:9"], retries=1, backoff=0.1)
    with pytest.raises(ServerError, match=r"row r0: .*refused"):
        gone.sample(prompts[:1], n=1, sampling=sampling)
