"""Smaller models in one call each, for notebooks; thin over `gptjax.compress`, with the defaults of `experiments`.

What they return is of the same class as what they got, which is untouched. Its `evaluate(dataset)` gives loss,
perplexity and accuracy beside those of the original.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

import jax
from jax.sharding import Mesh

from gptjax.api.arguments import TrainingArguments
from gptjax.api.model import GPT4LMHeadModel
from gptjax.api.text import GPT4Tokenizer
from gptjax.api.trainer import Trainer
from gptjax.compress import distill, prune, quantize, saving
from gptjax.compress import text as text_lib
from gptjax.compress.distill import DistillConfig
from gptjax.compress.text import Calibration
from gptjax.data import examples
from gptjax.model import Model
from gptjax.nn import quant_spec
from gptjax.nn.config import ModelConfig
from gptjax.nn.formats import WeightFormat
from gptjax.optim import sparsity as sparsity_lib
from gptjax.parallel import rules
from gptjax.types import Array, Objective, Params

AnyModel = TypeVar("AnyModel", Model, GPT4LMHeadModel)

NUM_BITS = (2, 3, 4, 5, 6, 8)
_CALIBRATION_LENGTH, _CALIBRATION_ROWS, _ROWS_AT_ONCE = 512, 128, 16


def prune_model(
    model: AnyModel,
    pruning_rate: float | str = 0.5,
    *,
    method: prune.Method | None = None,
    calibration: Sequence[Any] | None = None,
) -> AnyModel:
    """The model with a part of its layers' weights at zero.

    Without calibration text the smallest weights go (`magnitude`). On text that is like what the model is for,
    `sparsegpt` sees which weights matter to it and mends the others: at a rate of 0.5 that keeps several times as much
    of a model's quality. `wanda` only sees, and is faster.

    Args:
      pruning_rate: the part that goes, or n:m, such as `"2:4"`, where n of every m consecutive weights stay.
      method: `magnitude` without calibration and `sparsegpt` with it, unless told.
      calibration: examples as for `evaluate`.

    Raises:
      ValueError: for a rate that leaves nothing or everything, a model in few bits, and text that is missing, not
        read or too short.
    """
    _check_model("model", model)
    try:
        sparsity = sparsity_lib.parse(pruning_rate)
    except ValueError as error:
        raise ValueError(f"pruning_rate={pruning_rate!r}: {error}") from error
    method = method or ("magnitude" if calibration is None else "sparsegpt")
    if method not in get_args(prune.Method):
        raise ValueError(f"method={method!r}: expected one of {', '.join(get_args(prune.Method))}")
    if method == "magnitude" and calibration is not None:
        raise ValueError("method='magnitude' looks at no text; leave out calibration, or choose wanda or sparsegpt")
    prune.check(model.config, sparsity)
    text = _calibration(model, calibration)
    cfg, params = prune.prune(model.config, model.params, _batches(text), method=method, sparsity=sparsity)
    return _made(model, cfg, params, {"stage": "prune", "done": [f"{method}, sparsity={sparsity}"]}, text)


def quantize_model(
    model: AnyModel,
    num_bits: int = 8,
    *,
    group_size: int | None = None,
    method: str | None = None,
    calibration: Sequence[Any] | None = None,
    kv_cache: str = "none",
) -> AnyModel:
    """The model with its layers' weights stored in few bits.

    Without calibration text weights are rounded to the nearest (`rtn`), which 8 bits hardly notice. From 4 bits down
    text pays: `gptq` makes good in the later weights what rounding the earlier ones cost.

    Args:
      num_bits: one of `NUM_BITS`.
      group_size: inputs that share a scale, 0: all of a row; 128 unless told, and all of a row for 8 bits.
      method: a name of `gptjax.compress.quantize.METHODS`; `rtn` without calibration and `gptq` with it, unless told.
      calibration: examples as for `evaluate`.
      kv_cache: format of keys and values, such as `int8`; see `gptjax.nn.quant_spec`.

    Raises:
      ValueError: for other bits, a group size that does not divide, a model in few bits already, and text that is
        missing, not read or too short.
    """
    _check_model("model", model)
    if isinstance(num_bits, bool) or not isinstance(num_bits, int) or num_bits not in NUM_BITS:
        raise ValueError(f"num_bits={num_bits!r}: expected one of {', '.join(map(str, NUM_BITS))}")
    name = method or ("rtn" if calibration is None else "gptq")
    if name not in quantize.METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(quantize.METHODS)}")
    chosen = quantize.METHODS[name]
    if calibration is not None and not chosen.is_calibrated:
        raise ValueError(f"method={name!r} looks at no text; leave out calibration, or choose gptq or awq")
    activations: quant_spec.Activations = "int8" if chosen.scaling == "smoothquant" else "none"
    quant = quant_spec.rules(_weights(num_bits, group_size), activations=activations)
    quant = dataclasses.replace(quant, kv_cache=quant_spec.cache_format(kv_cache) or model.config.kv_cache)
    quantize.check(model.config, quant, method=chosen)
    text = _calibration(model, calibration)
    found = quantize.quantize(model.config, model.params, quant, method=chosen, batches=_batches(text))
    facts = dataclasses.asdict(quant)
    entry = {"stage": "quantize", "method": dataclasses.asdict(chosen)} | {
        key: facts[key] for key in ("rules", "kv_cache")
    }
    return _made(model, found.model, found.params, entry, text)


def knowledge_distillation(
    teacher_model: Model | GPT4LMHeadModel,
    student_model: AnyModel,
    *,
    train_dataset: Sequence[Any],
    args: TrainingArguments,
    **options: Any,
) -> AnyModel:
    """A student trained on what a teacher says of the same tokens; its original is the teacher.

    What is given is untouched; what is returned is of the student's class.

    Args:
      train_dataset, args: as for `Trainer`; like there, weights that were pruned stay 0.
      options: `loss`, `temperature`, `beta`, `weight` (the data's own loss has the rest) and `top_k` of
        `gptjax.compress.distill.DistillConfig`.

    Raises:
      ValueError: for another vocabulary or tokenizer, a teacher that reads fewer tokens, models that are not causal, a
        student in few bits, and as `Trainer`.
    """
    known = {"loss", "temperature", "beta", "weight", "top_k"}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"knowledge_distillation: {unknown[0]}: unknown; expected of {', '.join(sorted(known))}")
    for name, model in (("teacher_model", teacher_model), ("student_model", student_model)):
        _check_model(name, model)
    config = DistillConfig(**options)
    teacher: GPT4LMHeadModel = _head_model(teacher_model)
    untrained: GPT4LMHeadModel = _head_model(student_model)
    _check_pair(teacher, untrained)
    entry = {
        "stage": "distill",
        **{name: getattr(config, name) for name in sorted(known)},
        "teacher": saving.fingerprint(teacher.config, teacher.params),
        "init_params_sha256": saving.fingerprint(untrained.config, untrained.params),
        "examples": len(train_dataset),
    }
    student = GPT4LMHeadModel(
        untrained.config,
        untrained.params,
        tokenizer=untrained.tokenizer or teacher.tokenizer,
        lineage=(*untrained.lineage, entry),
        original=teacher,
    )
    trained = _Distiller(student, args, train_dataset=train_dataset, teacher=teacher, config=config).train()
    student.lineage = (*untrained.lineage, entry | {"num_steps": trained.global_step})
    if isinstance(student_model, GPT4LMHeadModel):
        return student
    return dataclasses.replace(student.inner(), original=teacher.inner(), made=student.lineage)


class _Distiller(Trainer):
    """A `Trainer` whose objective compares with a teacher."""

    def __init__(
        self,
        model: GPT4LMHeadModel,
        args: TrainingArguments,
        *,
        train_dataset: Sequence[Any],
        teacher: GPT4LMHeadModel,
        config: DistillConfig,
    ) -> None:
        super().__init__(model, args, train_dataset=train_dataset, tokenizer=model.tokenizer)
        self._teacher, self._config = teacher, config

    def _objective(self) -> Objective:
        return distill.objective(self.model.config, self._teacher.config, self._config)

    def _frozen(self, mesh: Mesh) -> Params:
        return jax.device_put(self._teacher.params, rules.replicated(mesh))


def _check_pair(teacher: GPT4LMHeadModel, student: GPT4LMHeadModel) -> None:
    theirs, ours = teacher.config, student.config
    if theirs.vocab_size != ours.vocab_size:
        raise ValueError(
            f"teacher_model: has a vocabulary of {theirs.vocab_size}, the student one of {ours.vocab_size}; "
            "expected the same, of one tokenizer"
        )
    names = [model.tokenizer.inner.fingerprint for model in (teacher, student) if model.tokenizer is not None]
    if len(set(names)) > 1:
        raise ValueError(
            f"teacher_model: its tokens are of tokenizer {names[0][:12]}, the student's of {names[1][:12]}"
        )
    if not (theirs.causal and ours.causal):
        raise ValueError("teacher_model, student_model: expected causal models; one sees what it is to predict")
    if theirs.seq_len < ours.seq_len:
        raise ValueError(f"teacher_model: reads at most {theirs.seq_len} tokens, the student {ours.seq_len}")
    if ours.has_stored_kernels:
        raise ValueError("student_model: its kernels are in few bits, which do not train; distil first, then quantise")


def _weights(num_bits: int, group_size: int | None) -> WeightFormat:
    if group_size is None:
        return quant_spec.weight_format(f"int{num_bits}")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 0:
        raise ValueError(f"group_size={group_size!r}: expected inputs that share a scale, or 0 for all of a row")
    return quant_spec.weight_format(f"int{num_bits}:" + (f"g{group_size}" if group_size else "rows"))


def _calibration(model: Model | GPT4LMHeadModel, dataset: Sequence[Any] | None) -> Calibration | None:
    if dataset is None:
        return None
    core, length = _core(model), min(model.config.seq_len, _CALIBRATION_LENGTH)
    found = [*examples.rows(dataset, core.tokenizer, seq_len=model.config.seq_len, name="calibration")]
    rows = min(_CALIBRATION_ROWS, max(1, sum(map(len, found)) // length))
    return text_lib.cut("calibration", found, rows=rows, length=length)


def _batches(text: Calibration | None) -> list[Array]:
    return [] if text is None else text.batches(rows_at_once=_ROWS_AT_ONCE)


def _core(model: Model | GPT4LMHeadModel) -> Model:
    return model if isinstance(model, Model) else model.inner()


def _check_model(name: str, model: Any) -> None:
    if not isinstance(model, Model | GPT4LMHeadModel):
        raise ValueError(
            f"{name}: expected a gptjax.Model or a GPT4LMHeadModel, got {type(model).__name__}; gptjax.load(path) and "
            "GPT4LMHeadModel.from_pretrained(path) give one"
        )


def _head_model(model: Model | GPT4LMHeadModel) -> GPT4LMHeadModel:
    if isinstance(model, GPT4LMHeadModel):
        return model
    tokenizer = None if model.tokenizer is None else GPT4Tokenizer(model.tokenizer)
    return GPT4LMHeadModel(model.config, model.params, tokenizer=tokenizer, lineage=model.lineage)


def _made(
    model: AnyModel, cfg: ModelConfig, params: Params, entry: dict[str, Any], text: Calibration | None
) -> AnyModel:
    source = {"params_sha256": saving.fingerprint(model.config, model.params)}
    entry = entry | {"calibration": None if text is None else text.facts(), "source": source}
    if isinstance(model, Model):
        meta = None if model.meta is None else dataclasses.replace(model.meta, model=cfg)
        return Model(cfg, params, model.tokenizer, meta, original=model, made=(*model.made, entry))
    lineage = (*model.lineage, entry)
    return GPT4LMHeadModel(cfg, params, tokenizer=model.tokenizer, lineage=lineage, original=model)
