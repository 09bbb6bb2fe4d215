"""Distillation: a student is trained on what a teacher says of the same tokens, through the one loop.

With `m` the loss mask, `w` the weight and `d` the divergence of the two distributions (`compress.divergence`), the
student minimises

    sum_t m_t ((1 - w) (nll_t + z_loss) + w d_t + h r_t) + auxiliary,      weight = sum_t m_t,

where `r` compares hidden states (`compress.matching`) with the weight `h`. The teacher is an argument of the step,
laid out by the same rules; where its likeliest tokens were cached (`compress.teacher_cache`) it is not even loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from absl import logging

from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import find_agreed, read_meta, restore_params
from gptjax.compress import divergence as divergences
from gptjax.compress import matching, teacher_cache
from gptjax.compress.divergence import Divergence, TopK
from gptjax.data.loader import TrainData
from gptjax.data.tokenizer import Tokenizer
from gptjax.kernels import cross_entropy
from gptjax.nn import transformer
from gptjax.nn.config import ModelConfig
from gptjax.parallel import rules
from gptjax.train import objective as objectives
from gptjax.train import setup as setup_lib
from gptjax.train.run import RunConfig
from gptjax.train.task import Prepared, Task
from gptjax.types import Array, Batch, Loss, Mean, ModelOutput, Objective, Params


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Who teaches, and what is compared.

    Attributes:
      teacher: checkpoint, or a workdir for its newest one.
      loss: see `compress.divergence`; `temperature` and `beta` too.
      weight: of the divergence; the data's own loss has the rest.
      top_k: compares so many tokens, the teacher's likeliest, and all others as one; 0 compares all.
      cache: local directory where the teacher's `top_k` are kept for every run on the same rows; None keeps none.
      hidden_weight: of the comparison of hidden states; 0 leaves it out.
      hidden_layers: pairs of a layer of the student's and one of the teacher's, from 1, whose outputs are compared;
        none spreads the teacher's evenly over the student's.
    """

    teacher: str = ""
    loss: divergences.Kind = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    weight: float = 0.5
    top_k: int = 0
    cache: str | None = None
    hidden_weight: float = 0.0
    hidden_layers: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", self.cache or None)
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"weight={self.weight} of the teacher: expected 0 to 1, the data's loss having the rest")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: expected at least 0, which is the whole vocabulary")
        if not self.hidden_weight >= 0.0:
            raise ValueError(f"hidden_weight={self.hidden_weight}: expected at least 0")
        if self.hidden_layers and not self.hidden_weight:
            raise ValueError("hidden_layers are given, but hidden_weight=0; expected it above 0")
        if self.cache and not self.top_k:
            raise ValueError(f"cache={self.cache}: whole vocabularies are not cached; set top_k, such as 32")
        if self.cache and "://" in self.cache:
            raise ValueError(f"cache={self.cache}: expected a local directory, as it is memory-mapped")
        if self.cache and self.hidden_weight:
            raise ValueError("hidden states are not cached; set hidden_weight=0, or leave cache out")
        self.divergence  # noqa: B018  # which checks

    @property
    def divergence(self) -> Divergence:
        return Divergence(kind=self.loss, temperature=self.temperature, beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class DistillRun(RunConfig):
    """A run's config, the student's model in it, with the teacher's part."""

    distill: DistillConfig = DistillConfig()


class Teacher(NamedTuple):
    """A checkpoint that teaches; its parameters are not read yet."""

    path: Any
    model: ModelConfig
    fingerprint: str

    def load(self) -> Params:
        """The parameters, laid out by the rules in use on the mesh in use, in their stored dtype."""
        mesh = jax.sharding.get_mesh()
        shapes, axes = transformer.abstract_params(self.model), transformer.param_axes(self.model)
        logging.info("Loading the teacher %s.", self.path)
        return restore_params(self.path, shardings=rules.tree_shardings(mesh, axes, shapes))[1]


def task(cfg: RunConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> Task:
    """Distillation as `train.run` takes it.

    Raises:
      ValueError: if the teacher cannot be read or does not fit the student, the tokenizer or the config.
    """
    assert isinstance(cfg, DistillRun) and tokenizer is not None
    distill = cfg.distill
    if cfg.train.objective != "next_token":
        raise ValueError(f"train.objective={cfg.train.objective!r}: distillation needs 'next_token'")
    teacher = open_teacher(distill.teacher, model, tokenizer, seq_len=cfg.model.seq_len)
    layers = matching.layer_map(model, teacher.model, distill.hidden_layers) if distill.hidden_weight else ()
    facts = {
        "teacher": teacher.fingerprint,
        "loss": distill.loss,
        "temperature": distill.temperature,
        "weight": distill.weight,
        "top_k": distill.top_k,
        "hidden_weight": distill.hidden_weight,
    }
    if distill.loss == "jsd":
        facts["beta"] = distill.beta
    companions = matching.projections(model, teacher.model, layers)

    def evaluated(params: Params, frozen: object, batch: Batch, rng: Array, step: Array) -> Loss:
        return objectives.next_token(model)(companions.apart(params)[0], frozen, batch, rng, step)

    return Task(
        objective=objective(model, teacher.model, distill, layers=layers, z_loss=cfg.train.z_loss),
        evaluated=evaluated,
        stage=setup_lib.stage("distill", cfg) | facts,
        prepare=functools.partial(_prepare, cfg, teacher),
        companions=companions,
    )


def open_teacher(path: str, student: ModelConfig, tokenizer: Tokenizer, *, seq_len: int) -> Teacher:
    """Finds a teacher and checks that it can teach `student`; every process calls it.

    Raises:
      ValueError: if there is none, or its vocabulary, tokenizer, direction or longest sequence is another.
    """
    if not path:
        raise ValueError("distill.teacher: missing; give a checkpoint or a workdir")
    found = find_agreed(path)
    meta = read_meta(found)
    theirs, ours = meta.model.vocab_size, student.vocab_size
    if meta.tokenizer != tokenizer.fingerprint:
        raise ValueError(
            f"distill.teacher={path}: its tokens are of tokenizer {meta.tokenizer[:12] or '(none)'}, the student's of "
            f"{tokenizer.fingerprint[:12]}; prepare data with the teacher's, --tokenizer={found}/assets"
        )
    if theirs != ours:
        raise ValueError(
            f"distill.teacher={path}: has a vocabulary of {theirs}, the student one of {ours}, for the same "
            f"tokenizer of {tokenizer.vocab_size} pieces padded differently; set model.vocab_size={theirs}"
        )
    if not (meta.model.causal and student.causal):
        raise ValueError(f"distill.teacher={path}: expected causal models, teacher and student")
    if meta.model.seq_len < seq_len:
        raise ValueError(
            f"distill.teacher={path}: reads at most {meta.model.seq_len} tokens; expected the student's "
            f"model.seq_len={seq_len} not to be above that"
        )
    return Teacher(found, meta.model, meta_lib.params_hash(meta.model, meta.checksums))


def objective(
    student: ModelConfig,
    teacher: ModelConfig,
    distill: DistillConfig,
    *,
    layers: matching.LayerMap = (),
    z_loss: float = 0.0,
) -> Objective:
    """The loss above; `frozen` is the teacher's parameters, or `()` where each batch has its `TopK`.

    Metrics, besides the data loss's: `distill_loss`, the divergence in nats per target, times `T^2`; and `hidden_loss`.
    """

    def run(params: Params, frozen: Any, batch: Batch, rng: Array, step: Array) -> Loss:
        del rng, step
        own, projections = matching.apart(params)
        output, found = _forward(student, own, batch, layers)
        if isinstance(batch.teacher, TopK):
            return language_loss(own, output, batch, _cached_term(distill, batch.teacher))
        frozen = jax.lax.stop_gradient(frozen)
        theirs, wanted = _forward(teacher, frozen, batch, layers)
        loss = language_loss(own, output, batch, _term(distill, teacher, frozen, theirs.hidden_BTD))
        if not layers:
            return loss
        hidden = matching.hidden_loss(projections, layers, found, wanted, batch.loss_mask)
        metrics = loss.metrics | {"hidden_loss": Mean(hidden, loss.weight)}
        return Loss(loss.total + distill.hidden_weight * hidden, loss.weight, metrics)

    def language_loss(params: Params, output: ModelOutput, batch: Batch, term: objectives.Term) -> Loss:
        return objectives.language_loss(
            student, params, output, batch.targets, batch.loss_mask, z_loss=z_loss, term=term
        )

    return run


def _forward(
    cfg: ModelConfig, params: Params, batch: Batch, layers: matching.LayerMap
) -> tuple[ModelOutput, list[Array]]:
    given = {"positions_BT": batch.positions, "segment_ids_BT": batch.segment_ids}
    if layers:
        return transformer.forward_with_residuals(cfg, params, batch.tokens, **given)
    return transformer.forward(cfg, params, batch.tokens, **given), []  # type: ignore[arg-type]


def _term(distill: DistillConfig, teacher: ModelConfig, params: Params, hidden_BTD: Array) -> objectives.Term:
    """The divergence from a teacher's output; its logits are made chunk by chunk, as the student's are."""
    head, divergence = transformer.head_params(teacher, params), distill.divergence

    def loss_fn(logits: Array, hidden: Array) -> Array:
        theirs = jax.lax.stop_gradient(transformer.head_logits(teacher, head, hidden))
        if not distill.top_k:
            return divergences.between(divergence, theirs, logits)
        return divergences.between_top_k(divergence, divergences.top_k(divergence, theirs, distill.top_k), logits)

    return objectives.Term("distill_loss", distill.weight, loss_fn, hidden_BTD)


def _cached_term(distill: DistillConfig, teacher: TopK) -> objectives.Term:
    loss_fn = functools.partial(_top_k_loss, distill.divergence)
    return objectives.Term("distill_loss", distill.weight, loss_fn, teacher)


def _top_k_loss(divergence: Divergence, logits: Array, teacher: TopK) -> Array:
    return divergences.between_top_k(divergence, teacher, logits)


def top_k_fn(distill: DistillConfig, teacher: ModelConfig) -> Callable[[Params, Batch], TopK]:
    """`(the teacher's parameters, batch) -> TopK` of every position, `[B, T, K]`, a chunk of positions at a time."""

    def run(params: Params, batch: Batch) -> TopK:
        hidden_BTD = _forward(teacher, params, batch, ())[0].hidden_BTD
        head = transformer.head_params(teacher, params)

        def of_chunk(hidden: Array) -> TopK:
            return divergences.top_k(distill.divergence, transformer.head_logits(teacher, head, hidden), distill.top_k)

        return cross_entropy.chunked_map(
            of_chunk, hidden_BTD, num_chunks=objectives.num_chunks(teacher, batch.tokens.shape)
        )

    return run


def _prepare(cfg: DistillRun, teacher: Teacher, data: TrainData) -> Prepared:
    distill = cfg.distill
    if distill.cache is None:
        return Prepared(data, teacher.load())
    key = teacher_cache.Key(
        teacher=teacher.fingerprint, top_k=distill.top_k, temperature=distill.temperature, order=data.order
    )
    cache = teacher_cache.TeacherCache(distill.cache, key)
    num_rows = cfg.train.num_steps * cfg.data.batch_size
    if cache.missing(num_rows):
        params, fn = teacher.load(), jax.jit(top_k_fn(distill, teacher.model))
        cache.fill(num_rows, data, functools.partial(fn, params), batch_size=cfg.data.batch_size)
    return Prepared(data.annotated(cache.read))
