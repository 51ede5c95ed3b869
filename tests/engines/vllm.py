"""A real vLLM server in a process of its own, and a model small enough for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("TOKENGRAIN_VLLM_PYTHON", str(ROOT / ".venvs" / "vllm" / "bin" / "python"))
LONGEST = 384
START = 900.0  # seconds that a start may take on a busy machine


def saved_model(folder: Path) -> tuple[Any, Any]:
    """A random llama of 0.4 million parameters and its tokenizer, saved in `folder`: (model, tokenizer)."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    sums = (f"What is {a} + {b}? The answer is {a + b}.\n" for a in range(40) for b in range(40))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    pieces.train_from_iterator(
        sums,
        trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, **names)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
        **sizes,
        **ids,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


class Vllm:
    """A server of the model in `folder`, called "tiny". It can be killed and started anew at the same address."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.options, self.url = folder, options, f"http://127.0.0.1:{self.port}"
        self.log = folder.parent / f"vllm-{self.port}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert Path(PYTHON).exists(), f"there is no vLLM at {PYTHON}: run `make test-vllm`"
        own = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        left = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "tiny"]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(LONGEST), "--max-num-seqs", "32"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.options], env=left | own, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Return when it answers."""
        until = time.monotonic() + START
        while time.monotonic() < until:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
            try:
                if httpx.get(self.url + "/health", timeout=5).is_success:
                    return
            except httpx.HTTPError:
                time.sleep(0.5)
        raise TimeoutError(f"vLLM did not answer within {START:g} s: {self.log.read_text(errors='replace')[-3000:]}")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
