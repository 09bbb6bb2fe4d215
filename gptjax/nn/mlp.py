"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.kernels.activations import gelu_tanh, swiglu
from gptjax.nn.config import GATED_ACTIVATIONS, MLPConfig
from gptjax.nn.linear import Linear
from gptjax.parallel.rules import constrain
from gptjax.types import Array

_POINTWISE: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}
_GATED: dict[str, Callable[[Array, Array], Array]] = {
    "swiglu": swiglu,
    "geglu": lambda gate, up: _POINTWISE["gelu"](gate) * up,
    "geglu_tanh": lambda gate, up: gelu_tanh(gate) * up,
    "reglu": lambda gate, up: jax.nn.relu(gate) * up,
}
# gpt-oss (model card, section 2.2): gate and up are clamped, the sigmoid is sharpened and up shifted.
_CLAMP, _SHARPNESS = 7.0, 1.702


def activate(activation: str, up: Array, gate: Array | None) -> Array:
    """The hidden activation; `gate` is given for gated activations and only for them.

    `swiglu`: `silu(gate) * up`, and likewise `geglu`, `reglu` (Shazeer 2020, arXiv:2002.05202);
    `relu2`: `relu(up) ** 2` (So et al. 2021, arXiv:2109.08668).
    """
    if activation not in GATED_ACTIVATIONS:
        return _POINTWISE[activation](up)
    assert gate is not None, f"{activation} needs a gate"
    if activation == "swiglu_clamped":
        gate, up = jnp.minimum(gate, _CLAMP), jnp.clip(up, -_CLAMP, _CLAMP)
        return gate * jax.nn.sigmoid(_SHARPNESS * gate) * (up + 1)
    return _GATED[activation](gate, up)


class MLP(nn.Module):
    """`x_BTD -> y_BTD`: up (and gate) projection, activation, down projection.

    Attributes:
      out_scale: gain of the down projection's initial values.
    """

    cfg: MLPConfig
    out_scale: float

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        cfg, d_model = self.cfg, x_BTD.shape[-1]

        def project(name: str) -> Array:
            linear = Linear(
                spec="BTD,DF->BTF", shape=(d_model, cfg.d_ff), axes=("embed", "mlp"), bias=cfg.bias, name=name
            )
            return constrain(linear(x_BTD), "act_batch", "act_length", "act_mlp")

        gate = project("gate") if cfg.activation in GATED_ACTIVATIONS else None
        hidden_BTF = activate(cfg.activation, project("up"), gate)
        down = Linear(
            spec="BTF,FD->BTD",
            shape=(cfg.d_ff, d_model),
            axes=("mlp", "embed"),
            bias=cfg.bias,
            scale=self.out_scale,
            name="down",
        )
        return down(hidden_BTF)
