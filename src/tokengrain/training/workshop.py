"""What the stages of one run share: the process, and data and models that were loaded already."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tokengrain.data import tokenizer_fingerprint
from tokengrain.data.render import template_text
from tokengrain.files import fingerprint
from tokengrain.recipe import ModelSpec, Recipe, ResolvedStage
from tokengrain.training import inputs, models, tables
from tokengrain.training.reference import is_peft


@dataclass
class Workshop:
    """What the stages of one run share: process state, data and models that were loaded already.

    Attributes:
        recipe: the run's recipe.
        console: where progress is shown.
        state: accelerate's `PartialState`: device, rank, number of processes.
    """

    recipe: Recipe
    console: Console
    state: Any
    _tokenizers: dict[str, Any] = field(default_factory=dict)
    _datasets: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    _frozen: dict[str, Any] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.output_dir)

    def path(self, spec: ModelSpec) -> str:
        return models.locate(spec, self.run_dir)

    def tokenizer(self, spec: ModelSpec, *, own_template: bool = False) -> Any:
        """A model's tokenizer, with the recipe's chat template if it has one.

        Args:
            own_template: leave its own chat template, as a reward model needs that reads text for itself.
        """
        path = self.path(spec)
        key = f"{path} {own_template}"
        if key not in self._tokenizers:
            tokenizer = models.load_tokenizer(spec, path)
            template = template_text(self.recipe.data.tokenize.get("chat_template"))
            if template is not None and not own_template:  # so that it is saved with the trained model
                tokenizer.chat_template = template
            self._tokenizers[key] = tokenizer
        return self._tokenizers[key]

    def datasets(self, stage: ResolvedStage, like: ModelSpec | None = None) -> tuple[Any, Any]:
        """`(training, held-out or None)` of a stage, every row checked; prepared once per kind and settings.

        Args:
            like: use this model's tokenizer and positions, while the stage's own model does not exist yet.
        """
        model = like or stage.model
        tokenizer = self.tokenizer(model)
        positions = models.positions(models.load_config(model, self.path(model)))
        online = stage.online is not None
        kind = stage.online.prompts.model_dump() if stage.online is not None else inputs.wants_pairs(stage)
        marks = [tokenizer_fingerprint(tokenizer), positions, kind]
        key = fingerprint([stage.data.model_dump(), *marks])
        if key not in self._datasets:
            train, held_out = inputs.open_rows(stage.data, self.recipe.seed, prompts=online)
            prepared = inputs.prepare(stage, train, tokenizer, positions)
            held = inputs.prepare(stage, held_out, tokenizer, positions) if held_out is not None else None
            self._datasets[key] = (prepared, held)
            for part, dataset in (("training", prepared), ("held-out", held)):
                tables.print_rows(self.console, stage, part, dataset)
        return self._datasets[key]

    def frozen(self, spec: ModelSpec) -> Any:
        """A model that is only asked, never trained; loaded once per stage."""
        key = fingerprint([spec.model_dump(), self.path(spec)])
        if key not in self._frozen:
            model = models.load_model(spec, self.path(spec), merge_adapter=True)
            self._frozen[key] = model.eval().requires_grad_(False).to(self.state.device)
        return self._frozen[key]

    def reward_model(self, spec: ModelSpec) -> Any:
        """A trained token-level reward model, frozen; loaded once per stage."""
        from tokengrain.training.reward_models import load_trained_reward_model

        key = fingerprint(["reward", spec.model_dump(), self.path(spec)])
        if key not in self._frozen:
            self._frozen[key] = load_trained_reward_model(self.path(spec)).to(self.state.device)
        return self._frozen[key]

    def completion_model(self, spec: ModelSpec) -> Any:
        """A model that judges whole completions, frozen; loaded once per stage."""
        from tokengrain.training.completion_models import load_completion_model

        key = fingerprint(["completions", spec.model_dump(), self.path(spec)])
        if key not in self._frozen:
            model = load_completion_model(self.path(spec), trust_remote_code=spec.trust_remote_code)
            self._frozen[key] = model.to(self.state.device)
        return self._frozen[key]

    def frozen_beside(self, policy: Any, spec: ModelSpec, name: str) -> Any:
        """A frozen model as a `Reference`: an adapter loaded into the policy, if both sit on the same base."""
        from tokengrain.scoring.reference import AdapterReference, FrozenReference

        path = self.path(spec)
        if is_peft(policy) and models.is_adapter(path) and self._same_base(policy, path):
            policy.load_adapter(path, adapter_name=name, is_trainable=False)
            return AdapterReference(policy, name)
        return FrozenReference(self.frozen(spec))

    def _same_base(self, policy: Any, adapter: str) -> bool:
        base = policy.peft_config[policy.active_adapter].base_model_name_or_path
        return bool(base) and models.model_fingerprint(base) == models.model_fingerprint(
            models.base_of_adapter(adapter)
        )

    def release(self) -> None:
        """Forget loaded models."""
        self._frozen.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
