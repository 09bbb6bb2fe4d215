"""Distillation: a student is trained on what a teacher says of the same tokens, through the one loop.

With `m` the loss mask, `w` the weight and `d` the divergence of the two distributions (`compress.divergence`), the
student minimises

    sum_t m_t ((1 - w) (nll_t + z_loss) + w d_t + h r_t + a s_t) + auxiliary,      weight = sum_t m_t,

where `r` compares hidden states and `s` attention (`compress.matching`) with the weights `h` and `a`; of tokens that
the student wrote itself (`compress.on_policy`) `w` is 1. The teacher is an argument of the step, laid out by the same
rules; where its likeliest tokens were cached (`compress.teacher_cache`) it is not even loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from absl import logging

from gptjax import config as config_lib
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import find_agreed, read_meta, restore_params
from gptjax.compress import divergence as divergences
from gptjax.compress import matching, on_policy, teacher_cache
from gptjax.compress.divergence import Divergence, TopK
from gptjax.data.loader import TrainData
from gptjax.data.tokenizer import Tokenizer
from gptjax.kernels import cross_entropy
from gptjax.nn import cost, transformer
from gptjax.nn.config import ModelConfig
from gptjax.parallel import hosts, rules
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
      weight: of the divergence; the data's own loss has the rest. Measured: docs/log.md.
      top_k: compares so many tokens, the teacher's likeliest, and all others as one; 0 compares all.
      cache: local directory where the teacher's `top_k` are kept for every run on the same rows; None keeps none.
      hidden_weight: of the comparison of hidden states; 0 leaves it out.
      hidden_layers: pairs of a layer of the student's and one of the teacher's, from 1, whose outputs are compared;
        none spreads the teacher's evenly over the student's.
      attention_weight, attention_layers: the same of attention; no pairs compare the last layers.
      on_policy: fraction of the rows that the student writes itself; 0 for none.
      on_policy_steps: steps whose rows are written at once.
      on_policy_prompt: tokens of the data that such a row begins with.
    """

    teacher: str = ""
    loss: divergences.Kind = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    weight: float = 0.9
    top_k: int = 0
    cache: str | None = None
    hidden_weight: float = 0.0
    hidden_layers: tuple[tuple[int, int], ...] = ()
    attention_weight: float = 0.0
    attention_layers: tuple[tuple[int, int], ...] = ()
    on_policy: float = 0.0
    on_policy_steps: int = 8
    on_policy_prompt: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", self.cache or None)
        for name in ("weight", "on_policy"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 to 1, the data having the rest")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: expected at least 0, which is the whole vocabulary")
        for name in ("on_policy_steps", "on_policy_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("hidden", "attention"):
            weight = getattr(self, f"{name}_weight")
            if not weight >= 0.0:
                raise ValueError(f"{name}_weight={weight}: expected at least 0")
            if getattr(self, f"{name}_layers") and not weight:
                raise ValueError(f"{name}_layers are given, but {name}_weight=0; expected it above 0")
            if self.cache and weight:
                raise ValueError(f"{name} states are not cached; set {name}_weight=0, or leave cache out")
        if self.cache and self.on_policy:
            raise ValueError("what the student writes is in no cache; set on_policy=0, or leave cache out")
        if self.cache and not self.top_k:
            raise ValueError(f"cache={self.cache}: whole vocabularies are not cached; set top_k, such as 32")
        if self.cache and "://" in self.cache:
            raise ValueError(f"cache={self.cache}: expected a local directory, as it is memory-mapped")
        self.divergence  # noqa: B018  # which checks
        if self.loss != "jsd" and self.beta != Divergence.beta:
            raise ValueError(f"beta={self.beta}: loss={self.loss!r} does not read it; set loss='jsd', or leave it out")

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


class Layers(NamedTuple):
    """Pairs of layers that are compared, by what of them is."""

    hidden: matching.LayerMap = ()
    attention: matching.LayerMap = ()


NO_LAYERS = Layers()


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
    layers = compared_layers(model, teacher.model, distill)
    facts = config_lib.to_dict(distill) | {"teacher": teacher.fingerprint}
    del facts["cache"]
    companions = matching.projections(model, teacher.model, layers.hidden)
    writing = _writing(cfg, model, tokenizer) if distill.on_policy else None

    def evaluated(params: Params, frozen: object, batch: Batch, rng: Array, step: Array) -> Loss:
        return objectives.next_token(model)(companions.apart(params)[0], frozen, batch, rng, step)

    def prepare(data: TrainData) -> Prepared:
        if hosts.is_lead():
            logging.info("distillation\n%s", summary(distill, model, teacher, layers))
        prepared = _prepare(cfg, model, teacher, data)
        if writing is None:
            return prepared
        return prepared._replace(renew_fn=functools.partial(on_policy.renew, writing, data))

    return Task(
        objective=objective(model, teacher.model, distill, layers=layers, z_loss=cfg.train.z_loss),
        evaluated=evaluated,
        stage=setup_lib.stage("distill", cfg) | facts,
        prepare=prepare,
        companions=companions,
        carried=None if writing is None else on_policy.carried(writing),
    )


def open_teacher(path: str, student: ModelConfig, tokenizer: Tokenizer, *, seq_len: int) -> Teacher:
    """Finds a teacher and checks that it can teach `student`; every process calls it.

    Raises:
      ValueError: if there is none, or its tokenizer, direction or longest sequence is another.
    """
    if not path:
        raise ValueError("distill.teacher: missing; give a checkpoint or a workdir")
    found = find_agreed(path)
    meta = read_meta(found)
    if meta.tokenizer != tokenizer.fingerprint:
        raise ValueError(
            f"distill.teacher={path}: its tokens are of tokenizer {meta.tokenizer[:12] or '(none)'}, the student's of "
            f"{tokenizer.fingerprint[:12]}; prepare data with the teacher's, --tokenizer={found}/assets"
        )
    if not (meta.model.causal and student.causal):
        raise ValueError(f"distill.teacher={path}: expected causal models, teacher and student")
    if meta.model.seq_len < seq_len:
        raise ValueError(
            f"distill.teacher={path}: reads at most {meta.model.seq_len} tokens; expected the student's "
            f"model.seq_len={seq_len} not to be above that"
        )
    return Teacher(found, meta.model, meta_lib.params_hash(meta.model, meta.checksums))


def compared_layers(student: ModelConfig, teacher: ModelConfig, distill: DistillConfig) -> Layers:
    """What `distill` asks for, checked.

    Raises:
      ValueError: as `matching.layer_map`.
    """
    hidden: matching.LayerMap = ()
    attention: matching.LayerMap = ()
    if distill.hidden_weight:
        hidden = matching.layer_map(student, teacher, distill.hidden_layers, key="hidden_layers")
    if distill.attention_weight:
        wanted = distill.attention_layers or ((student.num_layers, teacher.num_layers),)
        attention = matching.layer_map(student, teacher, wanted, key="attention_layers")
    return Layers(hidden, attention)


def summary(distill: DistillConfig, student: ModelConfig, teacher: Teacher, layers: Layers) -> str:
    """Who teaches whom, and a line for each loss with its weight."""

    def sizes(cfg: ModelConfig) -> str:
        return f"{cfg.num_layers} layers, {cost.count(cfg).total:,} parameters"

    def pairs(of: matching.LayerMap) -> str:
        return ", ".join(f"{mine} of {other}" for mine, other in of)

    what = f"the teacher's {distill.top_k} likeliest tokens and the rest" if distill.top_k else "all tokens"
    what += f", at temperature {distill.temperature:g}" + (f", beta {distill.beta:g}" if distill.loss == "jsd" else "")
    rows = [
        ("teacher", sizes(teacher.model), teacher.path),
        ("student", sizes(student), ""),
        ("data", f"weight {1 - distill.weight:g}", "cross-entropy of the next token"),
        (distill.loss, f"weight {distill.weight:g}", what + (f", from {distill.cache}" if distill.cache else "")),
    ]
    if layers.hidden:
        rows.append(("hidden states", f"weight {distill.hidden_weight:g}", f"layers {pairs(layers.hidden)}"))
    if layers.attention:
        rows.append(("attention", f"weight {distill.attention_weight:g}", f"layers {pairs(layers.attention)}"))
    if distill.on_policy:
        what = f"of the rows, by {distill.loss} alone; the student writes those of {distill.on_policy_steps} steps"
        rows.append(("on policy", f"{distill.on_policy:.0%}", what))
    return "\n".join(f"{name:14} {first:32} {rest}".rstrip() for name, first, rest in rows)


def objective(
    student: ModelConfig,
    teacher: ModelConfig,
    distill: DistillConfig,
    *,
    layers: Layers = NO_LAYERS,
    z_loss: float = 0.0,
) -> Objective:
    """The loss above; `frozen` is the teacher's parameters, or `()` where each batch has their `TopK` in its notes.

    Metrics, besides the data loss's: `distill_loss`, the divergence in nats per target, times `T^2`; the same as
    `distill_loss_alone` of what the student wrote itself; `hidden_loss` and `attention_loss`.
    """

    def run(params: Params, frozen: Any, batch: Batch, rng: Array, step: Array) -> Loss:
        del rng, step
        own, projections = matching.apart(params)
        output, found = _forward(student, own, batch, layers)
        if isinstance(batch.notes, TopK):
            return language_loss(own, output, batch, _cached_term(distill, batch.notes))
        frozen = jax.lax.stop_gradient(frozen)
        theirs, wanted = _forward(teacher, frozen, batch, layers)
        term = _term(distill, teacher, frozen, theirs.hidden_BTD, vocab_size=student.vocab_size)
        if isinstance(batch.notes, on_policy.Own):
            term = term._replace(alone_BT=batch.notes.written_BT)
        loss = language_loss(own, output, batch, term)
        if layers.hidden:
            hidden = matching.hidden_loss(projections, layers.hidden, found, wanted, batch.loss_mask)
            loss = _plus(loss, "hidden_loss", hidden, weight=distill.hidden_weight)
        if layers.attention:
            attention = matching.attention_loss(layers.attention, found, wanted, batch)
            loss = _plus(loss, "attention_loss", attention, weight=distill.attention_weight)
        return loss

    def language_loss(params: Params, output: ModelOutput, batch: Batch, term: objectives.Term) -> Loss:
        return objectives.language_loss(
            student, params, output, batch.targets, batch.loss_mask, z_loss=z_loss, term=term
        )

    return run


def _plus(loss: Loss, name: str, value: Array, *, weight: float) -> Loss:
    return Loss(loss.total + weight * value, loss.weight, loss.metrics | {name: Mean(value, loss.weight)})


def _forward(
    cfg: ModelConfig, params: Params, batch: Batch, layers: Layers
) -> tuple[ModelOutput, list[transformer.LayerValues]]:
    given = {"positions_BT": batch.positions, "segment_ids_BT": batch.segment_ids}
    if layers.hidden or layers.attention:
        return transformer.forward_with_layers(cfg, params, batch.tokens, **given)
    return transformer.forward(cfg, params, batch.tokens, **given), []  # type: ignore[arg-type]


def _term(
    distill: DistillConfig, teacher: ModelConfig, params: Params, hidden_BTD: Array, *, vocab_size: int
) -> objectives.Term:
    """The divergence from a teacher's output; its logits are made chunk by chunk, as the student's are."""
    head, divergence = transformer.head_params(teacher, params), distill.divergence
    shared = min(vocab_size, teacher.vocab_size)

    def loss_fn(logits: Array, hidden: Array) -> Array:
        theirs = jax.lax.stop_gradient(transformer.head_logits(teacher, head, hidden))
        # Both have all pieces of the tokenizer, and may have rows that are none, in another number.
        theirs, own = theirs[..., :shared], logits[..., :shared]
        if not distill.top_k:
            return divergences.between(divergence, theirs, own)
        return divergences.between_top_k(divergence, divergences.top_k(divergence, theirs, distill.top_k), own)

    return objectives.Term("distill_loss", distill.weight, loss_fn, hidden_BTD)


def _cached_term(distill: DistillConfig, teacher: TopK) -> objectives.Term:
    loss_fn = functools.partial(_top_k_loss, distill.divergence)
    return objectives.Term("distill_loss", distill.weight, loss_fn, teacher)


def _top_k_loss(divergence: Divergence, logits: Array, teacher: TopK) -> Array:
    return divergences.between_top_k(divergence, teacher, logits)


def top_k_fn(distill: DistillConfig, teacher: ModelConfig, *, vocab_size: int) -> Callable[[Params, Batch], TopK]:
    """`(the teacher's parameters, batch) -> TopK` of every position, `[B, T, K]`, a chunk of positions at a time.

    Args:
      vocab_size: tokens from here on are left out.
    """

    def run(params: Params, batch: Batch) -> TopK:
        hidden_BTD = _forward(teacher, params, batch, NO_LAYERS)[0].hidden_BTD
        head = transformer.head_params(teacher, params)

        def of_chunk(hidden: Array) -> TopK:
            logits = transformer.head_logits(teacher, head, hidden)[..., :vocab_size]
            return divergences.top_k(distill.divergence, logits, distill.top_k)

        return cross_entropy.chunked_map(
            of_chunk, hidden_BTD, num_chunks=objectives.num_chunks(teacher, batch.tokens.shape)
        )

    return run


def _writing(cfg: DistillRun, model: ModelConfig, tokenizer: Tokenizer) -> on_policy.Writing:
    return on_policy.Writing(
        student=model,
        batch_size=cfg.data.batch_size,
        num_parts=rules.axis_size(jax.sharding.get_mesh(), "act_batch"),
        seq_len=cfg.model.seq_len,
        fraction=cfg.distill.on_policy,
        num_steps=cfg.distill.on_policy_steps,
        prompt_tokens=cfg.distill.on_policy_prompt,
        vocab_size=tokenizer.vocab_size,
        eos_ids=tokenizer.eos_ids,
        seed=cfg.seed,
    )


def _prepare(cfg: DistillRun, model: ModelConfig, teacher: Teacher, data: TrainData) -> Prepared:
    distill = cfg.distill
    if distill.cache is None:
        return Prepared(data, teacher.load())
    shared = min(model.vocab_size, teacher.model.vocab_size)
    key = teacher_cache.Key(
        teacher=teacher.fingerprint,
        vocab_size=shared,
        top_k=distill.top_k,
        temperature=distill.temperature,
        order=data.order,
    )
    cache = teacher_cache.TeacherCache(distill.cache, key)
    num_rows = cfg.train.num_steps * cfg.data.batch_size
    if cache.missing(num_rows):
        params, fn = teacher.load(), jax.jit(top_k_fn(distill, teacher.model, vocab_size=shared))
        cache.fill(num_rows, data, functools.partial(fn, params), batch_size=cfg.data.batch_size)
    return Prepared(data.annotated(cache.read))
