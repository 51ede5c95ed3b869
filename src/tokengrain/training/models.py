"""Model specs of a recipe as loaded models: folders, hub names, worlds, earlier stages, adapters."""

from __future__ import annotations

import difflib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tokengrain.errors import ModelError
from tokengrain.files import file_fingerprint, fingerprint
from tokengrain.recipe.specs import ModelSpec

ADAPTER = "adapter_config.json"
_CONTENT = ("*.safetensors", "*.bin", "*.json", "*.model", "*.jinja", "*.txt")


def locate(spec: ModelSpec, run_dir: Path) -> str:
    """The folder or hub name that `spec` stands for.

    `@stage` is that stage's model in `run_dir`; a world's base model is trained now if it is not cached yet.

    Raises:
        ModelError: the spec is a model that has yet to be built from scratch.
    """
    if spec.stage is not None:
        return str(run_dir.resolve() / spec.stage / "model")
    if spec.is_world:
        from tokengrain.worlds import load_world

        return str(load_world(str(spec.path)).base_model())
    if spec.path is None:
        raise ModelError("the model is built from scratch by the run's init stage and does not exist yet")
    return os.path.expanduser(spec.path)


def is_adapter(path: str) -> bool:
    """Whether `path` is a folder with a PEFT adapter instead of a whole model."""
    return (Path(path) / ADAPTER).is_file()


def base_of_adapter(path: str) -> str:
    """Where the base model of an adapter folder is.

    Raises:
        ModelError: the adapter does not say, or the base has gone.
    """
    base = json.loads((Path(path) / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{path}/{ADAPTER} does not name its base model (base_model_name_or_path)")
    if Path(base).is_dir() or not os.path.isabs(base):
        return str(base)
    # The base may be an earlier stage of the same run, whose folder was moved since.
    moved = Path(path).resolve().parent.parent / Path(base).parent.name / Path(base).name
    if moved.is_dir():
        return str(moved)
    raise ModelError(f"the base model of adapter {path} is not there: {base}")


def load_tokenizer(spec: ModelSpec, path: str) -> Any:
    """The tokenizer in a model's folder, with a padding token.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    for place in (path, base_of_adapter(path)) if is_adapter(path) else (path,):
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=spec.trust_remote_code)
            break
        except (OSError, ValueError, KeyError) as error:
            reason = _first_line(error)
    else:
        raise ModelError(f"no tokenizer could be loaded from {path}: {reason}{_near_path(path)}")
    if tokenizer.pad_token_id is None:
        # Only saved files and `generate` ever use it: batches are not padded with it.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(
    spec: ModelSpec, path: str, *, merge_adapter: bool = False, train_adapter: bool = False
) -> torch.nn.Module:
    """The causal language model at `path`; an adapter folder is loaded on its base.

    Args:
        merge_adapter: fold an adapter into its base, which gives a plain model of the same function.
        train_adapter: go on training the adapter.

    Raises:
        ModelError: there is no model, or transformers cannot load it.
    """
    if is_adapter(path):
        peft = import_peft()
        base = load_model(spec, base_of_adapter(path))
        try:
            adapted = peft.PeftModel.from_pretrained(base, path, is_trainable=train_adapter)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"adapter {path} does not fit its base model: {_first_line(error)}") from error
        return adapted.merge_and_unload() if merge_adapter else adapted
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=spec.dtype,
            attn_implementation=spec.attn_implementation,
            trust_remote_code=spec.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"no model could be loaded from {path}: {_first_line(error)}{_near_path(path)}") from error


def resolve_model(spec: ModelSpec | str, run_dir: str | Path = ".") -> tuple[torch.nn.Module, Any]:
    """`(model, tokenizer)` of a spec that exists: a path, hub name, world:// or, in a run folder, @stage.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
    """
    spec = ModelSpec.model_validate(spec)
    path = locate(spec, Path(run_dir))
    return load_model(spec, path), load_tokenizer(spec, path)


def load_config(spec: ModelSpec, path: str) -> Any:
    """The architecture's config, without the weights."""
    from transformers import AutoConfig

    place = base_of_adapter(path) if is_adapter(path) else path
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no model at {place}: {_first_line(error)}{_near_path(place)}") from error


def positions(config: Any) -> int | None:
    """Most tokens the model can read, if it has a limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_vocabulary(tokenizer: Any, config: Any, tokens_of: str, model: str) -> None:
    """The model must have an embedding for every token id of the tokenizer.

    Raises:
        ModelError: with both sizes.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is not None and size < len(tokenizer):
        raise ModelError(
            f"{model} has a vocabulary of {size} tokens, the tokenizer of {tokens_of} has {len(tokenizer)}; "
            "they must share one tokenizer"
        )


def check_same_vocabulary(tokenizer: Any, other: Any, name: str, other_name: str) -> None:
    """Two models whose per-token numbers are combined must give every token the same id.

    Raises:
        ModelError: with both sizes, or with a token whose ids differ.
    """
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        detail = f"{len(ours)} tokens in {name}, {len(theirs)} in {other_name}"
    else:
        token = next(t for t in ours if theirs.get(t) != ours[t])
        detail = f"{len(ours)} tokens in both, but {token!r} is {ours[token]} in {name}, {theirs.get(token)} there"
    raise ModelError(f"{other_name} has another vocabulary than {name}: {detail}")


def model_fingerprint(path: str) -> str:
    """Identifies the content of a model folder (weights, config, tokenizer), or a hub name and revision."""
    folder = Path(path)
    if not folder.is_dir():
        return fingerprint(["hub", path, _hub_revision(path)])
    files = sorted({p for pattern in _CONTENT for p in folder.glob(pattern)})
    stats = [(p, p.stat()) for p in files]
    parts: list[Any] = [[p.name, _file_hash(p, stat.st_size, stat.st_mtime_ns)] for p, stat in stats]
    if is_adapter(path):
        parts.append(["base", model_fingerprint(base_of_adapter(path))])
    return fingerprint(parts)


def _hub_revision(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a possible hub name; loading it will say so
        return None
    return Path(found).parent.name if isinstance(found, str) else None


@lru_cache(maxsize=256)
def _file_hash(path: Path, size: int, modified: int) -> str:
    # Size and time are part of the key, so that a file that changed is read again.
    return file_fingerprint(path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _near_path(path: str) -> str:
    if Path(path).is_dir():
        return ""
    parent = Path(path).parent
    if parent.is_dir() and str(parent) != ".":
        names = [p.name for p in parent.iterdir() if p.is_dir()]
        close = difflib.get_close_matches(Path(path).name, names, n=1)
        return "; there is no such folder" + (f", did you mean {str(parent / close[0])!r}?" if close else "")
    hint = "the hub is not asked while HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "no such folder"
    return f"; {hint}"


def import_peft() -> Any:
    """The peft library.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError("LoRA needs peft: pip install 'tokengrain[peft]'") from error
    return peft
