"""Mixture-of-experts layers: routing, balancing, and the experts' projections."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.kernels import rows
from gptjax.nn import dispatch
from gptjax.nn.config import GATED_ACTIVATIONS, MLPConfig, MoEConfig
from gptjax.nn.init import declare
from gptjax.nn.linear import Kernel, Linear
from gptjax.nn.mlp import MLP
from gptjax.types import Array

_MASKED = float(jnp.finfo(jnp.float32).min)


class MoE(nn.Module):
    """`x_BTD -> (y_BTD, aux)`.

    `aux` holds sums over the tokens of `valid_BT`, so that it adds up over layers, microbatches
    and shards: `loss`, `router_entropy` (nats), `tokens`, `dropped` (assignments over capacity)
    and `load` `[E]` (assignments of each expert).

    Attributes:
      out_scale: gain of the down projections' initial values.
    """

    cfg: MoEConfig
    out_scale: float

    @nn.compact
    def __call__(self, x_BTD: Array, valid_BT: Array) -> tuple[Array, dict[str, Array]]:
        cfg, d_model = self.cfg, x_BTD.shape[-1]
        router = Linear(
            (d_model, cfg.num_experts), ("embed", None), bias=cfg.router_bias, spec="BTD,DE->BTE", name="router"
        )
        # Scores decide by small differences, so the router stays in float32.
        logits_BTE = router(x_BTD.astype(jnp.float32))
        balance_E = None
        if cfg.balancing == "bias":
            balance_E = self.param("balance_bias", declare((cfg.num_experts,), (None,)))
        index_BTA, weight_BTA, probs_BTE = route(cfg, logits_BTE, balance_E)
        y_BTD = dispatch.apply_experts(cfg, x_BTD, index_BTA, weight_BTA, self._experts(d_model))
        if cfg.shared_d_ff:
            shared = MLPConfig(d_ff=cfg.shared_d_ff, activation=cfg.activation, bias=cfg.bias)
            y_BTD = y_BTD + MLP(shared, self.out_scale, name="shared")(x_BTD)
        return y_BTD, auxiliary(cfg, logits_BTE, probs_BTE, index_BTA, valid_BT, balance_E)

    def _experts(self, d_model: int) -> dispatch.Weights:
        cfg = self.cfg
        names = ("gate", "up") if cfg.activation in GATED_ACTIVATIONS else ("up",)
        up_shape, up_axes = (cfg.num_experts, d_model, cfg.d_ff), ("experts", "embed", "mlp")
        experts = {
            name: Kernel(up_shape, up_axes, in_dims=(1,), batch_dims=1, bias=cfg.bias, name=f"experts_{name}")()
            for name in names
        }
        experts["down"] = Kernel(
            (cfg.num_experts, cfg.d_ff, d_model),
            ("experts", "mlp", "embed"),
            in_dims=(1,),
            batch_dims=1,
            bias=cfg.bias,
            scale=self.out_scale,
            name="experts_down",
        )()
        return experts


def route(cfg: MoEConfig, logits_BTE: Array, balance_E: Array | None) -> tuple[Array, Array, Array]:
    """Chooses experts.

    Returns:
      `(index_BTA, weight_BTA, probs_BTE)`: the chosen experts in order of score, their weights,
      and the router's distribution over all experts.
    """
    if cfg.router == "softmax":
        scores_BTE = probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    else:
        scores_BTE = jax.nn.sigmoid(logits_BTE)
        probs_BTE = scores_BTE / (scores_BTE.sum(-1, keepdims=True) + 1e-20)
    choice_BTE = scores_BTE if balance_E is None else scores_BTE + balance_E
    choice_BTE = jax.lax.stop_gradient(_limit_groups(cfg, choice_BTE))
    _, index_BTA = rows.top_k(choice_BTE, cfg.num_experts_per_token)
    weight_BTA = jnp.take_along_axis(scores_BTE, index_BTA, axis=-1)
    if cfg.normalize:
        weight_BTA = weight_BTA / (weight_BTA.sum(-1, keepdims=True) + 1e-20)
    return index_BTA, weight_BTA * cfg.routed_scale, probs_BTE


def _limit_groups(cfg: MoEConfig, choice_BTE: Array) -> Array:
    """Masks all but the best groups: by the sum of a group's two best experts where scores are
    sigmoids (DeepSeek-V3, section 2.1.2), by its best expert where they are a softmax (V2).
    """
    if cfg.groups_per_token == cfg.num_groups:
        return choice_BTE
    grouped = choice_BTE.reshape(*choice_BTE.shape[:-1], cfg.num_groups, -1)
    best = 2 if cfg.router == "sigmoid" and grouped.shape[-1] > 1 else 1
    group_score = rows.top_k(grouped, best)[0].sum(-1)
    _, kept = rows.top_k(group_score, cfg.groups_per_token)
    eligible = jax.nn.one_hot(kept, cfg.num_groups, dtype=jnp.bool_).any(-2)
    return jnp.where(eligible[..., None], grouped, _MASKED).reshape(choice_BTE.shape)


def auxiliary(
    cfg: MoEConfig, logits_BTE: Array, probs_BTE: Array, index_BTA: Array, valid_BT: Array, balance_E: Array | None
) -> dict[str, Array]:
    """Balancing losses and statistics of one layer, as described at `MoE`.

    The load-balancing loss of a row of n tokens is `n * sum_e f_e P_e` with
    `f_e = E / (A n) * count_e` and `P_e` the mean probability (Switch, eq. 4, for A experts a
    token). Taking it row by row, as DeepSeek-V3 does, keeps it a sum over rows: accumulation
    and sharding do not change it. It is 1 a token when the load is even.
    """
    valid_BT1 = valid_BT[..., None].astype(jnp.float32)
    chosen_BTE = jax.nn.one_hot(index_BTA, cfg.num_experts, dtype=jnp.float32).sum(-2) * valid_BT1
    load_BE, tokens_B = chosen_BTE.sum(1), valid_BT1.sum((1, 2))
    load_E, tokens = load_BE.sum(0), tokens_B.sum()
    loss = jnp.zeros((), jnp.float32)
    if cfg.balancing == "aux_loss":
        per_token = cfg.num_experts / (cfg.num_experts_per_token * jnp.maximum(tokens_B, 1.0))
        loss += cfg.balance_rate * jnp.sum(load_BE * (probs_BTE * valid_BT1).sum(1) * per_token[:, None])
    elif balance_E is not None:
        # Worth zero, with the violation of an even load as the gradient of the bias: the optimizer
        # steps against its sign (arXiv:2408.15664, algorithm 1).
        violation_E = load_E - load_E.mean()
        loss += jnp.sum(jax.lax.stop_gradient(violation_E) * (balance_E - jax.lax.stop_gradient(balance_E)))
    if cfg.z_loss:
        log_z_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
        loss += cfg.z_loss * jnp.sum(jnp.square(log_z_BT) * valid_BT)
    dropped = jnp.zeros((), jnp.float32)
    if cfg.capacity_factor is not None:
        over = dispatch.slots(index_BTA, cfg.num_experts) >= dispatch.capacity(cfg, index_BTA.shape[1])
        dropped = jnp.sum(over * valid_BT1)
    entropy_BT = -jnp.sum(jax.scipy.special.xlogy(probs_BTE, probs_BTE), axis=-1)
    return {
        "loss": loss,
        "router_entropy": jnp.sum(entropy_BT * valid_BT),
        "tokens": tokens,
        "dropped": dropped,
        "load": load_E,
    }
