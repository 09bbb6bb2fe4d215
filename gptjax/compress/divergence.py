"""How far a student's distribution over the vocabulary is from its teacher's, position by position.

With `p` the teacher's and `q` the student's probabilities, both at temperature `T`,

    forward_kl   KL(p || q)
    reverse_kl   KL(q || p)
    jsd          beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q

and each is multiplied by `T^2`, which keeps its gradient as strong beside the data loss as at `T = 1`.
Where only the `K` likeliest tokens of the teacher are known, all the others are one more outcome, so that
both remain distributions and the divergence is still zero only where they agree on those.

Source: Hinton et al. 2015 (arXiv:1503.02531), section 2, for the temperature; Agarwal et al. 2023 (GKD,
arXiv:2306.13649), section 2, for the divergences.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp

from gptjax.types import Array

Kind = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """Which one; see above.

    Attributes:
      temperature: divides the logits of both.
      beta: of `jsd`: near 0 it behaves as forward KL, near 1 as reverse KL.
    """

    kind: Kind = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"loss={self.kind!r}: expected one of {', '.join(get_args(Kind))}")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: expected above 0 and finite")
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta={self.beta}: expected above 0 and below 1; the ends are loss='forward_kl' and 'reverse_kl'"
            )


@flax.struct.dataclass
class TopK:
    """The likeliest tokens of a distribution, the likeliest first.

    Attributes:
      ids: int32 `[..., K]`.
      log_probs: float32 `[..., K + 1]`; the last is of all other tokens together.
    """

    ids: Array
    log_probs: Array


def between(divergence: Divergence, teacher_logits: Array, student_logits: Array) -> Array:
    """The divergence over whole vocabularies, `[..., V]` twice to float32 `[...]`.

    Gradients flow to the student alone.
    """
    log_p = jax.lax.stop_gradient(_log_probs(divergence, teacher_logits))
    return _of_log_probs(divergence, log_p, _log_probs(divergence, student_logits))


def between_top_k(divergence: Divergence, teacher: TopK, student_logits: Array) -> Array:
    """The divergence over the teacher's `K` tokens and the rest as one, to float32 `[...]`."""
    log_q = _bucketed(_log_probs(divergence, student_logits), teacher.ids)
    return _of_log_probs(divergence, jax.lax.stop_gradient(teacher.log_probs), log_q)


def top_k(divergence: Divergence, logits: Array, k: int) -> TopK:
    """The `k` likeliest tokens of `softmax(logits [..., V] / T)`.

    Raises:
      ValueError: unless a token is left over for the rest.
    """
    if not 0 < k < logits.shape[-1]:
        raise ValueError(
            f"top_k={k}: expected above 0 and below the vocabulary's {logits.shape[-1]}; 0 in a config is all of it"
        )
    log_probs = _log_probs(divergence, logits)
    ids = jax.lax.top_k(log_probs, k)[1]
    return TopK(ids, _bucketed(log_probs, ids))


def _log_probs(divergence: Divergence, logits: Array) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32) / divergence.temperature, axis=-1)


def _bucketed(log_probs: Array, ids: Array) -> Array:
    """`[..., V] -> [..., K + 1]`; the rest is summed over, as one less the others would be rounding alone."""
    chosen = jnp.take_along_axis(log_probs, ids, axis=-1)
    others = jnp.put_along_axis(log_probs, ids, -jnp.inf, axis=-1, inplace=False)
    return jnp.concatenate([chosen, jax.nn.logsumexp(others, axis=-1, keepdims=True)], axis=-1)


def _of_log_probs(divergence: Divergence, log_p: Array, log_q: Array) -> Array:
    match divergence.kind:
        case "forward_kl":
            value = _kl(log_p, log_q)
        case "reverse_kl":
            value = _kl(log_q, log_p)
        case "jsd":
            beta = divergence.beta
            log_m = jnp.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
            value = beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)
    return divergence.temperature**2 * value


def _kl(log_a: Array, log_b: Array) -> Array:
    return jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)
