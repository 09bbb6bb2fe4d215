"""From a run's config to the parts of its training step, checked against each other; no memory is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jax.sharding import Mesh

from gptjax.data.loader import DataConfig
from gptjax.data.tokenizer import Tokenizer
from gptjax.nn import storage, transformer
from gptjax.nn.config import ModelConfig, MoEConfig
from gptjax.nn.spec import ModelSpec
from gptjax.optim import build
from gptjax.optim.build import OptimConfig, Optimizer
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig
from gptjax.train import objective as objectives
from gptjax.train import state as state_lib
from gptjax.train.model_of import ModelOf
from gptjax.train.state import TrainState
from gptjax.train.task import Task
from gptjax.types import Objective

VOCAB_MULTIPLE = 128


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, what for, and what to write on the way.

    Attributes:
      num_steps: optimizer steps of the whole run.
      accumulate_steps: microbatches that a batch is computed in, one after the other.
      z_loss: weight of the z-loss; see `train.objective`.
      log_every: steps between lines of `metrics.jsonl`.
      eval_every: steps between evaluations; 0 evaluates at the end only.
      eval_batches: size of an evaluation, in batches; 0 takes the whole store.
      checkpoint_every: steps between checkpoints; 0 saves at the end only.
      keep_checkpoints: newest ones that are kept; 0 keeps all.
      keep_every: checkpoints whose step is a multiple are kept too; 0 for none.
      keep_best: checkpoints with the lowest `eval/loss` that are kept too.
      init_from: checkpoint or workdir whose parameters a new run starts with; None, or nothing, draws them.
      objective: `masked_lm` trains a bidirectional model to fill in hidden tokens.
      profile_steps: first and last step of a profile; None records none.
    """

    num_steps: int
    accumulate_steps: int
    z_loss: float
    log_every: int
    eval_every: int
    eval_batches: int
    checkpoint_every: int
    keep_checkpoints: int
    objective: Literal["next_token", "masked_lm"] = "next_token"
    profile_steps: tuple[int, int] | None = None
    keep_every: int = 0
    keep_best: int = 0
    init_from: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "init_from", self.init_from or None)
        for name in ("num_steps", "accumulate_steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        not_negative = ("z_loss", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints")
        for name in (*not_negative, "keep_every", "keep_best"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 0")
        if self.keep_best and (not self.eval_every or self.checkpoint_every % self.eval_every):
            raise ValueError(
                f"keep_best={self.keep_best}: each checkpoint needs an evaluation of its own; got eval_every="
                f"{self.eval_every}, expected a number that divides checkpoint_every={self.checkpoint_every}"
            )
        if (self.keep_every or self.keep_best) and not self.keep_checkpoints:
            raise ValueError(
                f"keep_every={self.keep_every}, keep_best={self.keep_best}: keep_checkpoints=0 keeps all; "
                "expected it above 0, or these two 0"
            )
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(f"profile_steps={self.profile_steps}: expected (first, last) with 1 <= first <= last")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes.

    Attributes:
      name: for people.
      seed: of the parameters, the order of the data and every random draw.
      model: its keys, or whose it is.
    """

    name: str
    seed: int
    model: ModelSpec | ModelOf
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    mesh: MeshConfig


class Setup(NamedTuple):
    """The parts of a training step; `shapes` and `shardings` are trees like the state."""

    model: ModelConfig
    task: Task
    optimizer: Optimizer
    shapes: TrainState
    shardings: TrainState


TaskFn = Callable[[RunConfig, ModelConfig, Tokenizer | None], Task]


def make(cfg: RunConfig, mesh: Mesh, tokenizer: Tokenizer | None = None, *, task_fn: TaskFn | None = None) -> Setup:
    """The parts of `cfg`'s training step on `mesh`, under the partitioning rules in use.

    Args:
      tokenizer: `masked_lm` needs its mask token.
      task_fn: what to train for; `pretraining` unless given.

    Raises:
      ValueError: where sections of the config contradict each other, the mesh or the tokenizer.
    """
    check_batch(cfg, mesh)
    if cfg.train.keep_best and cfg.data.eval is None:
        raise ValueError(f"train.keep_best={cfg.train.keep_best}: there is nothing to evaluate; give data.eval a store")
    model = cfg.model.build()
    check_experts(model, mesh)
    if model.quant is not None:
        storage.check(model.quant, transformer.layouts(model))
    if cfg.train.objective == "masked_lm":
        model = objectives.bidirectional(model)
    task = (task_fn or pretraining)(cfg, model, tokenizer)
    params = {**transformer.abstract_params(model), **task.companions.shapes}
    axes = {**transformer.param_axes(model), **task.companions.axes}
    optimizer = build.build(cfg.optim, params, axes, num_steps=cfg.train.num_steps, balance_rate=balance_rate(model))
    extra = task.carried.shapes if task.carried else None
    shapes = state_lib.abstract_state(params, optimizer.tx, extra=extra)
    shardings = rules.state_shardings(mesh, shapes, axes, params)
    return Setup(model, task, optimizer, shapes, shardings)


def pretraining(cfg: RunConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> Task:
    """Training on data alone, for `train.objective`."""
    objective = _objective(cfg, model, tokenizer)
    return Task(objective=objective, evaluated=objective, stage=stage("pretrain", cfg))


def stage(name: str, cfg: RunConfig) -> dict[str, object]:
    """What every stage of training notes of itself in the lineage."""
    return {"stage": name, "name": cfg.name, "seed": cfg.seed}


def facts(cfg: RunConfig) -> dict[str, Any]:
    """What the lineage says of a run besides its task: as it began, a run may become longer."""
    facts = {"data": dict(cfg.data.train), "num_steps": cfg.train.num_steps, "zeros": cfg.optim.zeros}
    made = {"quant": cfg.model.quant, "prune": cfg.optim.prune and dataclasses.asdict(cfg.optim.prune)}
    return facts | {name: value for name, value in made.items() if value}


def check_batch(cfg: RunConfig, mesh: Mesh) -> None:
    """Raises:
    ValueError: when the batch cannot be shared out evenly.
    """
    parts, num = rules.axis_size(mesh, "act_batch"), cfg.train.accumulate_steps
    if cfg.data.batch_size % (parts * num):
        raise ValueError(
            f"data.batch_size={cfg.data.batch_size}: expected a multiple of {parts * num}, for {parts} parts of "
            f"the mesh {dict(mesh.shape)} that share a batch, times train.accumulate_steps={num}"
        )
    length_parts = rules.axis_size(mesh, "act_length")
    if cfg.model.seq_len % length_parts:
        raise ValueError(f"model.seq_len={cfg.model.seq_len}: expected a multiple of mesh.context={length_parts}")


def check_experts(model: ModelConfig, mesh: Mesh) -> None:
    """Raises:
    ValueError: when experts cannot be shared out evenly: each device would keep all of them.
    """
    parts = rules.axis_size(mesh, "experts")
    for block in model.blocks:
        if isinstance(block.mlp, MoEConfig) and block.mlp.num_experts % parts:
            raise ValueError(
                f"model.moe.num_experts={block.mlp.num_experts}: expected a multiple of {parts}, the parts that mesh "
                f"axes {', '.join(rules.mesh_axes('experts'))} cut experts into; give them fewer devices"
            )


def check_vocabulary(cfg: RunConfig, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raises:
    ValueError: where the model has no room for the tokenizer, or more than a config would ask for.
    """
    if isinstance(cfg.model, ModelSpec):
        return check_tokenizer(model, tokenizer, path=cfg.data.tokenizer)
    # A checkpoint's table is padded as its makers did.
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"data.tokenizer={cfg.data.tokenizer}: has {tokenizer.vocab_size} pieces, the model of "
            f"{cfg.model.checkpoint} {model.vocab_size}; prepare data with its own, --tokenizer=<checkpoint>/assets"
        )
    return None


def check_tokenizer(model: ModelConfig, tokenizer: Tokenizer, *, path: str) -> None:
    """Raises:
    ValueError: unless the model has the tokenizer's size, or that rounded up to a multiple of 128.
    """
    size = tokenizer.vocab_size
    rounded = -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if model.vocab_size not in (size, rounded):
        raise ValueError(
            f"model.vocab_size={model.vocab_size}: the tokenizer {path} has {size} pieces; "
            f"expected {size}" + (f", or {rounded}, the next multiple of {VOCAB_MULTIPLE}" if rounded > size else "")
        )


def _objective(cfg: RunConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> Objective:
    if cfg.train.objective == "next_token":
        return objectives.next_token(model, z_loss=cfg.train.z_loss)
    if tokenizer is None or tokenizer.mask_id is None:
        raise ValueError(
            f"train.objective='masked_lm' needs a tokenizer with a mask token; {cfg.data.tokenizer} has none"
        )
    return objectives.masked_lm(
        model,
        mask_id=tokenizer.mask_id,
        vocab_size=tokenizer.vocab_size,
        special_ids=sorted(tokenizer.special_ids),
        z_loss=cfg.train.z_loss,
    )


def balance_rate(model: ModelConfig) -> float | None:
    """The step of the balance biases; one for all, as the optimizer has one group for them."""
    biased = [b.mlp for b in model.blocks if isinstance(b.mlp, MoEConfig) and b.mlp.balancing == "bias"]
    rates = {moe.balance_rate for moe in biased}
    if len(rates) > 1:
        raise ValueError(f"balance_rate: expected the same in all layers that balance by bias, got {sorted(rates)}")
    return rates.pop() if rates else None
