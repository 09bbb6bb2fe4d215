"""Where a factor on each input of a kernel can be moved to what makes that input, without changing the model.

The inputs `x` of some kernels become `x / t` and the kernels' rows `w * t`, so that `x w'` stays. Something must divide
`x` for nothing: the scale of a norm before them, or the outputs of the kernel that makes them, where between the two
nothing but sums and positive factors happens to each input alone:

    norm -> query, key, value; gate and up of a feed-forward layer or of all experts, beside the router; latents
    value -> out    attention takes weighted means; with grouped queries, heads of one value head share a factor
    up -> down      `act(gate) * up`, and relu without a gate; other activations bend `up`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from gptjax.compress.calibrate import at, replaced
from gptjax.nn.config import BlockConfig, MLAConfig, MoEConfig, NormConfig
from gptjax.types import Array, Params

_LINEAR_IN_UP = frozenset({"swiglu", "geglu", "geglu_tanh", "reglu", "relu"})


class Fold(NamedTuple):
    """One place.

    Attributes:
      kind: what divides: a norm's scale, or a kernel's outputs.
      maker: its path in a layer's parameters.
      readers: the kernels that are multiplied with the inputs.
      also: kernels in float beside them, such as a router's.
      repeats: inputs that share a factor, in `[heads, repeats, head_dim]`; grouped queries do.
      head_dim: inputs of a head; 0 where there are none.
    """

    kind: Literal["norm", "kernel"]
    maker: str
    readers: tuple[str, ...]
    also: tuple[str, ...] = ()
    repeats: int = 1
    head_dim: int = 0

    @property
    def lead(self) -> int:
        """Dimensions of a factor before its inputs: experts have their own behind their up kernels."""
        return 1 if "experts_" in self.maker else 0

    def pooled(self, values: Array, *, by: Any) -> Array:
        """Values of each input `[*lead, inputs]` as one for those that share a factor; `by` is such as `jnp.mean`."""
        if self.repeats == 1:
            return values
        heads = values.reshape(*values.shape[:-1], -1, self.repeats, self.head_dim)
        return by(heads, axis=-2).reshape(*values.shape[:-1], -1)

    def spread(self, factor: Array) -> Array:
        """The factor of each input from those that `pooled` has."""
        if self.repeats == 1:
            return factor
        heads = jnp.repeat(factor.reshape(*factor.shape[:-1], -1, 1, self.head_dim), self.repeats, axis=-2)
        return heads.reshape(*factor.shape[:-1], -1)


def folds(block: BlockConfig) -> list[Fold]:
    """The places of a layer, in the order of execution."""
    found: list[Fold] = []
    attention, is_normed = block.attention, block.norm_placement != "post"
    if isinstance(attention, MLAConfig):
        query = "attention/query" if attention.q_latent is None else "attention/query_down"
        if is_normed:
            found.append(Fold("norm", "attention_norm", (query, "attention/kv_down")))
        if attention.q_latent is not None:
            found.append(Fold("norm", "attention/query_norm", ("attention/query_up",)))
        found.append(Fold("norm", "attention/kv_norm", ("attention/key_up", "attention/value_up")))
        found.append(Fold("kernel", "attention/value_up", ("attention/out",)))
    else:
        if is_normed:
            readers = ("attention/query", "attention/key", "attention/value")
            found.append(Fold("norm", "attention_norm", readers))
        repeats = attention.num_heads // attention.num_kv_heads
        found.append(
            Fold("kernel", "attention/value", ("attention/out",), repeats=repeats, head_dim=attention.head_dim)
        )
    return found + _feed_forward(block)


def _feed_forward(block: BlockConfig) -> list[Fold]:
    mlp = block.mlp
    is_gated = "glu" in mlp.activation
    names = ("gate", "up") if is_gated else ("up",)
    if isinstance(mlp, MoEConfig):
        layers = ["moe/experts_", *(["moe/shared/"] if mlp.shared_d_ff else [])]
    else:
        layers = ["mlp/"]
    readers = tuple(f"{layer}{name}" for layer in layers for name in names)
    found = []
    if block.norm_placement != "post":
        found.append(Fold("norm", "mlp_norm", readers, ("moe/router",) if isinstance(mlp, MoEConfig) else ()))
    if mlp.activation in _LINEAR_IN_UP:
        found += [Fold("kernel", f"{layer}up", (f"{layer}down",)) for layer in layers]
    return found


def fold(block: BlockConfig, weights: Params, place: Fold, factor: Array) -> Params:
    """The layer with `x / factor` and `w * factor` at a place; what it computes stays.

    Args:
      factor: positive, `[*lead, inputs]` as `Fold.pooled` gives them; experts have their own behind their up kernels.
    """
    if place.kind == "norm":
        weights = replaced(weights, place.maker, _divided_norm(_norm(block, place), at(weights, place.maker), factor))
    else:
        weights = replaced(weights, place.maker, _divided_outputs(at(weights, place.maker), factor))
    spread = place.spread(factor)
    for path in (*place.readers, *place.also):
        kernel = at(weights, path)["kernel"]
        weights = replaced(weights, path, {**at(weights, path), "kernel": _times_inputs(kernel, spread, path)})
    return weights


def rows(weights: Params, path: str, num_inputs: int) -> Array:
    """The rows `[*lead, outputs, inputs]` of a layer's kernel in float32; experts lead."""
    kernel = at(weights, path)["kernel"].astype(jnp.float32)
    lead = kernel.shape[: 1 if "experts_" in path else 0]
    return jnp.swapaxes(kernel.reshape(*lead, num_inputs, -1), -1, -2)


def all_but(values: Array, lead: int, *, by: Any, keep: int = 1) -> Array:
    """Reduces dimensions between the first `lead` and the last `keep`: those of experts that share a factor."""
    return by(values, axis=tuple(range(lead, values.ndim - keep)))


def _norm(block: BlockConfig, place: Fold) -> NormConfig:
    if place.maker.startswith("attention/"):
        assert isinstance(block.attention, MLAConfig), "only latents have norms within attention that feed kernels"
        return block.attention.norm
    return block.norm


def _divided_norm(cfg: NormConfig, weights: Mapping[str, Array], factor_D: Array) -> Params:
    scale = weights["scale"].astype(jnp.float32)
    scale = (1.0 + scale) / factor_D - 1.0 if cfg.zero_centered else scale / factor_D
    divided = {"scale": scale}
    return divided | ({"bias": weights["bias"] / factor_D} if "bias" in weights else {})


def _divided_outputs(weights: Mapping[str, Array], factor: Array) -> Params:
    """Of a kernel `[*lead, inputs, *out]` and its bias `[*lead, *out]`; a factor is `[*lead, outputs]`."""
    kernel = weights["kernel"].astype(jnp.float32)
    lead = factor.ndim - 1
    out = kernel.shape[lead + 1 :]
    divided = {"kernel": kernel / factor.reshape(*factor.shape[:-1], 1, *out)}
    return divided | ({"bias": weights["bias"] / factor.reshape(*factor.shape[:-1], *out)} if "bias" in weights else {})


def _times_inputs(kernel: Array, factor: Array, path: str) -> Array:
    """A kernel `[*lead, *in, *out]` with its inputs multiplied."""
    lead = 1 if "experts_" in path else 0
    ins, size = 0, 1
    while size < factor.shape[-1]:
        size *= kernel.shape[lead + ins]
        ins += 1
    assert size == factor.shape[-1], f"{path}: {kernel.shape} has no {factor.shape[-1]} inputs"
    shape = kernel.shape[lead : lead + ins] + (1,) * (kernel.ndim - lead - ins)
    return kernel.astype(jnp.float32) * factor.reshape(*factor.shape[:-1], *shape)
