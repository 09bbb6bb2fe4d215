"""How to train, in transformers' words."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

from gptjax import config as config_lib
from gptjax.optim.build import OptimConfig
from gptjax.optim.schedule import Shape

_SCHEDULES: dict[str, Shape] = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "inverse_sqrt": "rsqrt",
    "warmup_stable_decay": "wsd",
}

_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
)


@dataclass(frozen=True)
class TrainingArguments:
    """The arguments of transformers' class of this name that have a meaning here; others are refused.

    Attributes:
      output_dir: gets checkpoints, `metrics.jsonl` and TensorBoard's files.
      per_device_train_batch_size: rows of one device in one microbatch.
      gradient_accumulation_steps: microbatches a step.
      num_train_epochs: passes over the training set; the last step has what is left of it.
      max_steps: optimizer steps; above 0 it overrides `num_train_epochs`.
      warmup_steps, warmup_ratio: steps until `learning_rate` is reached, or their share of all steps.
      lr_scheduler_type: what follows: linear, cosine, constant (or constant_with_warmup), inverse_sqrt (which
        needs a warmup), warmup_stable_decay (the last fifth decays); see `optim.schedule`.
      optim: adamw, adafactor, lion or muon.
      max_grad_norm: gradients are scaled down to it; 0 leaves them as they are.
      logging_steps: steps between lines of figures.
      eval_strategy: `no` evaluates on `evaluate()` only, `steps` every `eval_steps` (`logging_steps` unless
        told), `epoch` after each epoch; the last two at the end of training too.
      save_strategy: `steps` saves every `save_steps`, `epoch` after each epoch, both at the end too; `no` saves
        at the end only.
      save_total_limit: newest checkpoints that stay; None keeps all.
      overwrite_output_dir: removes the checkpoints that another run left in `output_dir`.
      bf16: computes in bfloat16; False leaves it to the model's `dtype`.
    """

    output_dir: str
    _: dataclasses.KW_ONLY
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int = -1
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    optim: str = "adamw"
    logging_steps: int = 500
    eval_strategy: str = "no"
    eval_steps: int | None = None
    save_strategy: str = "steps"
    save_steps: int = 500
    save_total_limit: int | None = None
    overwrite_output_dir: bool = False
    bf16: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        if isinstance(self.output_dir, os.PathLike):
            object.__setattr__(self, "output_dir", os.fspath(self.output_dir))
        if not self.output_dir:
            raise ValueError("output_dir is empty; name a directory")
        config_lib.check(self)
        self.optimizer(num_steps=1)
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        for name in ("eval_strategy", "save_strategy"):
            if getattr(self, name) not in ("no", "steps", "epoch"):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected no, steps or epoch")
        if self.eval_steps is not None and self.eval_strategy != "steps":
            raise ValueError(f"eval_steps={self.eval_steps} means nothing without eval_strategy='steps'")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs}, max_steps={self.max_steps}: one must be above 0"
            )

    def eval_every(self, steps_per_epoch: int) -> int | None:
        """Steps between evaluations while training; None for none."""
        every = {"no": None, "steps": self.eval_steps or self.logging_steps, "epoch": steps_per_epoch}
        return every[self.eval_strategy]

    def save_every(self, steps_per_epoch: int) -> int:
        """Steps between checkpoints; 0 saves at the end only."""
        return {"no": 0, "steps": self.save_steps, "epoch": steps_per_epoch}[self.save_strategy]

    def num_rows(self, dataset_size: int) -> int | None:
        """Rows of all epochs together; None where `max_steps` counts instead."""
        return None if self.max_steps > 0 else math.ceil(self.num_train_epochs * dataset_size)

    def optimizer(self, *, num_steps: int) -> OptimConfig:
        """The same in gptjax's words.

        Raises:
          ValueError: for a value of the wrong type or outside its range.
        """
        if self.lr_scheduler_type not in _SCHEDULES:
            raise ValueError(f"lr_scheduler_type={self.lr_scheduler_type!r}: expected one of {', '.join(_SCHEDULES)}")
        warmup_steps = self.warmup_steps or math.ceil(self.warmup_ratio * num_steps)
        if self.lr_scheduler_type == "inverse_sqrt" and not warmup_steps:
            # It would fall to half within four steps.
            raise ValueError("lr_scheduler_type='inverse_sqrt' needs warmup_steps or warmup_ratio: it falls from there")
        values = dict(
            name=self.optim,
            learning_rate=self.learning_rate,
            schedule=_SCHEDULES[self.lr_scheduler_type],
            warmup_steps=warmup_steps,
            final_lr_scale=0.0,
            decay_fraction=0.2 if self.lr_scheduler_type == "warmup_stable_decay" else 0.0,
            weight_decay=self.weight_decay,
            clip_norm=self.max_grad_norm or None,
            b1=self.adam_beta1,
            b2=self.adam_beta2,
        )
        return config_lib.from_dict(OptimConfig, values, path="TrainingArguments")

    def to_dict(self) -> dict[str, Any]:
        return config_lib.to_dict(self)
