"""A model's kernels in few bits, by any method: what is to be stored how, carried out, and told leaf by leaf."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.compress import calibrate, gptq, scales, scaling
from gptjax.compress.calibrate import Inputs, Site
from gptjax.compress.gptq import GPTQ
from gptjax.nn import cost, quant_spec, quantized, storage, transformer
from gptjax.nn.config import ModelConfig, uses_others_kv
from gptjax.nn.formats import KernelRule, QuantConfig, WeightFormat
from gptjax.nn.quant_spec import EMBEDDINGS, with_cache
from gptjax.nn.quantized import QuantizedArray
from gptjax.parallel import rules as mesh_rules
from gptjax.types import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How kernels come to their codes.

    Attributes:
      rounding: `nearest`; `clip`, to nearest with groups' ranges searched for; `gptq`.
      scaling: of inputs, before kernels are rounded.
      propagate: how far a kernel also makes good what its inputs lost before it, 0 to 1; see `gptq.aimed`.
    """

    rounding: Literal["nearest", "clip", "gptq"]
    scaling: Literal["none", "awq", "smoothquant"] = "none"
    gptq: GPTQ = GPTQ()
    sequence: calibrate.Sequence_ = "stage"
    propagate: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.propagate <= 1.0:
            raise ValueError(f"propagate={self.propagate}: expected 0 to 1")
        if self.propagate and self.sequence == "none":
            raise ValueError(
                "propagate makes errors of the kernels before good, and sequence=none looks at none of them"
            )

    @property
    def is_calibrated(self) -> bool:
        return self.rounding != "nearest" or self.scaling != "none"


METHODS = {
    "rtn": Method(rounding="nearest"),
    "smoothquant": Method(rounding="nearest", scaling="smoothquant"),
    "awq": Method(rounding="clip", scaling="awq"),
    "gptq": Method(rounding="gptq", propagate=0.5),
}


class Leaf(NamedTuple):
    """What became of one parameter of the model.

    Attributes:
      treatment: its format and how it got there, or `left`.
      why: it was left; empty where it was not.
      error: squared error of the outputs on the calibration text, as a part of their square, the mean of all layers;
        None where it was not measured.
    """

    path: str
    treatment: str
    why: str
    bytes_before: int
    bytes_after: int
    error: float | None


class Result(NamedTuple):
    """A model in few bits.

    Attributes:
      notes: what went otherwise than asked.
    """

    model: ModelConfig
    params: Params
    leaves: tuple[Leaf, ...]
    notes: tuple[str, ...]


def check(cfg: ModelConfig, quant: QuantConfig, *, method: Method) -> None:
    """Whether a model can be stored so, before anything is read or computed.

    Raises:
      ValueError: naming what stands in the way.
    """
    if not quant.rules:
        with_cache(cfg, quant.kv_cache)  # which checks
        return
    if cfg.quant is not None and cfg.quant.rules:
        _check_trained(cfg, cfg.quant, quant, method)
    storage.check(quant, transformer.layouts(cfg))
    shapes = transformer.abstract_params(dataclasses.replace(cfg, quant=quant))
    if not any(map(quantized.is_quantized, jax.tree.leaves(shapes, is_leaf=quantized.is_quantized))):
        raise ValueError(f"no kernel is left to be stored in few bits by {_said(quant.rules)}")
    if method.scaling != "none" and any(map(uses_others_kv, cfg.blocks)):
        raise ValueError(f"scaling={method.scaling}: values that several layers use cannot be scaled; use rtn or gptq")
    if method.scaling != "none" and cfg.low_rank:
        raise ValueError(f"scaling={method.scaling}: kernels in two factors cannot be scaled; use rtn or gptq")
    if method.scaling == "smoothquant" and all(rule.activations == "none" for rule in quant.rules):
        raise ValueError("smoothquant makes activations easier to round, and none are; give activations=int8")


def _check_trained(cfg: ModelConfig, own: QuantConfig, quant: QuantConfig, method: Method) -> None:
    """Training for few bits is ended by storing what it rounded to."""
    if own.stage == "stored":
        raise ValueError(
            f"this model is in few bits already ({_said(own.rules)}); start from the checkpoint in floats, or change "
            "its cache alone (weights=none)"
        )
    for path in transformer.layouts(cfg):
        trained, wanted = storage.rule_for(own, path), storage.rule_for(quant, path)
        if (trained and (trained.weights, trained.activations)) != (wanted and (wanted.weights, wanted.activations)):
            raise ValueError(
                f"{path}: this model was trained for few bits by its own rules ({_said(own.rules)}), which are not "
                f"those asked for ({_said(quant.rules)}); store it in the format that it was trained for"
            )
    if method.is_calibrated:
        raise ValueError(
            f"{_names(method)}: this model was trained with kernels rounded to nearest; store them so, by method=rtn"
        )


def quantize(
    cfg: ModelConfig,
    params: Params,
    quant: QuantConfig,
    *,
    method: Method,
    batches: Sequence[Array] = (),
    told: Callable[[int], None] = lambda layer: None,
) -> Result:
    """Stores kernels in few bits, and says so of keys and values.

    Args:
      cfg: of floats, or of a model that was trained for these rules; of any kernels where there are no rules.
      quant: without rules kernels stay as they are.
      params: floats; untouched.
      batches: calibration tokens `[B, T]` each, of one shape; none for a method that does not look at any.
      told: called with the number of layers that are done.

    Raises:
      ValueError: from `check`; for parameters or inputs of kernels that are not finite.
    """
    check(cfg, quant, method=method)
    if not quant.rules:
        leaves = _leaves(quant, params, params, _Treated(quant, method, {}, {}, []))
        model = with_cache(cfg, quant.kv_cache)
        return Result(model, params, leaves, tuple(_cache_notes(cfg, model)))
    _check_finite(params)
    if method.is_calibrated and not batches:
        raise ValueError(f"{method.rounding} rounding with scaling={method.scaling} needs calibration text; got none")
    model = dataclasses.replace(cfg, quant=quant)
    treated = _Treated(quant, method, {}, {}, [])
    done = params
    if method.is_calibrated:
        prepare = _prepare(quant, method)
        done = calibrate.walk(
            with_cache(cfg, quant.kv_cache),
            params,
            batches,
            treated.treat,
            sequence=method.sequence,
            prepare=prepare,
            against="original" if method.propagate else "none",
            told=told,
        )
    done = storage.store(quant, done, transformer.layouts(cfg))
    wanted: Any = transformer.abstract_params(model)
    assert jax.tree.structure(done) == jax.tree.structure(wanted), "every rule is met"  # type: ignore[operator]
    return Result(model, done, _leaves(quant, params, done, treated), (*treated.notes, *_cache_notes(cfg, model)))


class _Treated(NamedTuple):
    """What `calibrate.walk` calls, with a record of what it did."""

    quant: QuantConfig
    method: Method
    how: dict[str, str]
    errors: dict[str, list[float]]
    notes: list[str]

    def treat(self, site: Site, kernel: Array, inputs: Inputs) -> Array | QuantizedArray:
        rule = storage.rule_for(self.quant, site.path)
        if rule is None or rule.weights is None:
            return kernel
        format, method = rule.weights, self.method
        rows = site.layout.to_rows(kernel.astype(jnp.float32))
        lead = inputs.hessian.shape[:-2]
        flat = rows.reshape(*lead, -1, rows.shape[-1])
        flat, hessian, drift = mesh_rules.on_each_device((flat, inputs.hessian, inputs.drift))
        if drift is not None:
            flat = gptq.aimed(flat, hessian, drift, strength=method.propagate, damping=method.gptq.damping)
        if method.rounding == "gptq":
            codes, scale, zero, damping = gptq.round_rows(flat, hessian, format=format, config=method.gptq)
            self._note_damping(site, float(damping.max()))
        else:
            if method.rounding == "clip":
                scale, zero = scales.clipped(flat, hessian, format=format)
            else:
                scale, zero = quantized.group_scale(flat, format)
            codes = quantized.encode(flat, scale, zero, format)
        self._record(site, _relative_error(flat, codes, scale, zero, hessian, format), inputs)
        outs = rows.shape[:-1]
        scale, zero = jax.tree.map(lambda part: part.reshape(*outs, -1), (scale, zero))
        codes = codes.reshape(rows.shape)
        return quantized.pack(codes, scale, zero, format=format, layout=site.layout, activations=rule.activations)

    def _record(self, site: Site, error: Array, inputs: Inputs) -> None:
        # Experts have other rows in the model as it was, so their outputs there say nothing.
        aimed = ", not aimed at the original's outputs" if self.method.propagate and inputs.drift is None else ""
        self.how[site.path] = _names(self.method) + aimed
        self.errors.setdefault(site.path, []).append(float(error))
        unseen = int((inputs.count == 0).sum())
        if unseen:
            self.notes.append(f"{site.path}, layer {site.layer}: {unseen} experts had no token; rounded to nearest")

    def _note_damping(self, site: Site, damping: float) -> None:
        if damping > 1.001 * self.method.gptq.damping:
            self.notes.append(
                f"{site.path}, layer {site.layer}: the Hessian is singular (too few calibration tokens?); damped by "
                f"{damping:g} instead of {self.method.gptq.damping:g}"
            )


def _prepare(quant: QuantConfig, method: Method) -> calibrate.Prepare | None:
    if method.scaling == "none":
        return None
    return scaling.prepare(next(rule for rule in quant.rules if rule.weights is not None), method.scaling)


@functools.partial(jax.jit, static_argnames="format")
def _relative_error(
    rows: Array, codes: Array, scale: Array, zero: Array | None, hessian: Array, format: WeightFormat
) -> Array:
    error = quantized.decode(codes, scale, zero, format) - rows
    total = scaling.output_error(rows, hessian).sum()
    return scaling.output_error(error, hessian).sum() / jnp.where(total == 0, 1, total)


def _cache_notes(before: ModelConfig, after: ModelConfig) -> Iterator[str]:
    if before.kv_cache != after.kv_cache:
        old, new = (cost.cache_bytes_per_token(cfg) for cfg in (before, after))
        yield f"keys and values, {quant_spec.said(after.kv_cache)}: {old:,} -> {new:,} bytes a token"


def _check_finite(params: Params) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not bool(jnp.isfinite(leaf).all()):
            raise ValueError(f"{storage.name(path)}: has values that are not finite numbers; use another checkpoint")


def _leaves(quant: QuantConfig, before: Params, after: Params, treated: _Treated) -> tuple[Leaf, ...]:
    leaves = jax.tree_util.tree_leaves_with_path(before, is_leaf=quantized.is_quantized)
    old = {storage.name(path): leaf for path, leaf in leaves}
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(after, is_leaf=quantized.is_quantized):
        name = storage.name(path)
        old_bytes, new_bytes = (sum(array.nbytes for array in jax.tree.leaves(part)) for part in (old[name], leaf))
        if not quantized.is_quantized(leaf) or quantized.is_quantized(old[name]):
            why = _why(quant, name) if quant.rules else "only the cache was asked for"
            found.append(Leaf(name, "left", why, old_bytes, new_bytes, None))
            continue
        errors = treated.errors.get(name)
        error = None if errors is None else sum(errors) / len(errors)
        how = f"{_format(leaf.format)}, {treated.how.get(name, 'nearest')}"
        found.append(Leaf(name, how, "", old_bytes, new_bytes, error))
    return tuple(found)


def _why(quant: QuantConfig, path: str) -> str:
    """A parameter was left as it is."""
    if not re.search(r"(/kernel(/reduce|/expand)?|embed/tokens)$", path):
        return f"{path.rpartition('/')[2]}: not a kernel"
    matching = [rule for rule in quant.rules if re.search(rule.pattern, path)]
    if matching:
        return f"asked to, by {matching[0].pattern!r}"
    if "router" in path:
        return "router: decides by small differences"
    return "token table or head: no format was asked for it" if re.search(EMBEDDINGS, path) else "no rule names it"


def _names(method: Method) -> str:
    return method.rounding if method.scaling == "none" else f"{method.rounding} after {method.scaling}"


def _format(format: WeightFormat) -> str:
    group = "rows" if format.group_size is None else f"groups of {format.group_size}"
    return f"{format.dtype} {group}{'' if format.symmetric else ' with zero points'}"


def _said(rules: tuple[KernelRule, ...]) -> str:
    return ", ".join(f"{rule.pattern}: {_format(rule.weights) if rule.weights else 'float'}" for rule in rules)
