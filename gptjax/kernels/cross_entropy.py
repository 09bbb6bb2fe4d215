"""Cross-entropy over a large vocabulary without keeping the logits.

`chunked_loss` walks over the sequence, and where the loss is differentiated it computes the
gradients of each chunk right after its logits: a scalar sum has a known cotangent up to one
factor, so nothing of size `[B, T, V]` outlives its chunk and the head product is not
recomputed. Source: Liger Kernel (arXiv:2410.10989), section 3.2, fused linear cross-entropy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.kernels import rows
from gptjax.parallel.mesh import platform
from gptjax.types import Array


class TokenLoss(NamedTuple):
    """Per-token results of `softmax_nll`, each of the targets' shape and float32.

    Attributes:
      nll: `log_z - logits[target]`.
      log_z: log of the sum of exponentials.
      correct: 1 where the target is the (first) highest logit.
    """

    nll: Array
    log_z: Array
    correct: Array


def softmax_nll(logits: Array, targets: Array) -> TokenLoss:
    """Negative log-likelihood of `targets [...]` under `softmax(logits [..., V])`."""
    nll, log_z, correct = _softmax_nll(logits.astype(jnp.float32), targets)
    return TokenLoss(nll, log_z, jax.lax.stop_gradient(correct))


def chunked_loss(
    logits_fn: Callable[[Any, Array], Array],
    loss_fn: Callable[[Array, Any], tuple[Array, Any]],
    hidden_BTD: Array,
    head_params: Any,
    extras: Any,
    *,
    num_chunks: int,
) -> tuple[Array, Any]:
    """Sums a loss over positions, with the logits of one chunk of positions at a time.

    Chunk j holds the positions that are j modulo `num_chunks`, so a sequence axis that is
    sharded over a mesh stays evenly sharded in every chunk.

    Args:
      logits_fn: `(head_params, hidden [B, T / num_chunks, D]) -> logits`.
      loss_fn: `(logits, extras of the chunk) -> (loss sum, pytree of metric sums)`.
      hidden_BTD: the transformer's output.
      head_params: any pytree; gradients flow to its floating-point leaves.
      extras: pytree of `[B, T, ...]` arrays such as targets and loss mask; no gradient.
      num_chunks: divides T.

    Returns:
      The loss sum, differentiable once in `hidden_BTD` and `head_params`, and the summed
      metrics, which carry no gradient.

    Raises:
      ValueError: if `num_chunks` does not divide T.
    """
    length = hidden_BTD.shape[1]
    if num_chunks < 1 or length % num_chunks:
        raise ValueError(f"num_chunks={num_chunks}: expected a divisor of the sequence length {length}")
    loss_sum, metrics = _chunked_loss(logits_fn, loss_fn, num_chunks, hidden_BTD, head_params, extras)
    return loss_sum, jax.lax.stop_gradient(metrics)


def chunked_map(fn: Callable[[Array], Any], hidden_BTD: Array, *, num_chunks: int) -> Any:
    """A function of positions on one chunk of them at a time, cut as `chunked_loss` cuts; not to be differentiated.

    Args:
      fn: `[B, T / num_chunks, D] -> ` a tree of `[B, T / num_chunks, ...]`.
    """
    if num_chunks == 1:
        return fn(hidden_BTD)
    return jax.tree.map(_join, jax.lax.map(fn, split(hidden_BTD, num_chunks=num_chunks)))


def pick_num_chunks(*, num_rows: int, seq_len: int, vocab_size: int, max_bytes: int | None = None) -> int:
    """The fewest chunks of a sequence whose float32 logits fit in `max_bytes`.

    Args:
      num_rows: sequences of the batch that one device has.
      seq_len: positions of each.
      vocab_size: the part of the vocabulary that one device has.
      max_bytes: what the logits of one chunk may take on a device; None is 256 MiB, and on CPU what its
        caches can hold, but for 256 positions at least, which an efficient product needs.
    """
    if max_bytes is None:
        max_bytes = max(2**23, 256 * 4 * vocab_size) if platform() == "cpu" else 2**28
    per_position = 4 * num_rows * vocab_size
    fits = (n for n in range(1, seq_len + 1) if seq_len % n == 0 and per_position * (seq_len // n) <= max_bytes)
    return next(fits, seq_len)


@jax.custom_vjp
def _softmax_nll(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    return _softmax_nll_forward(logits, targets)[0]


def _softmax_nll_forward(logits: Array, targets: Array) -> tuple[Any, Any]:
    peak = rows.row_max(logits)
    target_logit, total, kept = jax.lax.platform_dependent(
        logits, targets, peak, cpu=_sums_by_products, default=_sums_by_reductions
    )
    log_z = peak + jnp.log(total)
    correct = rows.is_first_highest(logits, targets, target_logit, peak)
    return (log_z - target_logit, log_z, correct.astype(jnp.float32)), (kept, targets, peak, total)


def _sums_by_reductions(logits: Array, targets: Array, peak: Array) -> tuple[Array, Array, Array]:
    """The target's logit, the sum of `exp(logits - peak)`, and what the backward pass reads: the logits.

    A masked sum instead of a gather: it fuses with the other sum, and a sharded vocabulary needs
    no communication of logits.
    """
    target_logit = jnp.sum(jnp.where(_one_hot(logits, targets), logits, 0.0), axis=-1)
    return target_logit, jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1), logits


def _sums_by_products(logits: Array, targets: Array, peak: Array) -> tuple[Array, Array, Array]:
    """The same where reductions do not fuse, as on CPU; the exponentials are there already, so they are kept."""
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    weights = jnp.exp(logits - peak[..., None])
    return target_logit, rows.row_sum(weights), weights


def _softmax_nll_backward(residuals: Any, cotangents: Any) -> tuple[Array, Any]:
    kept, targets, peak, total = residuals
    d_nll, d_log_z, _ = cotangents
    weights = jax.lax.platform_dependent(
        kept, peak, cpu=lambda kept, peak: kept, default=lambda kept, peak: jnp.exp(kept - peak[..., None])
    )
    d_logits = weights * ((d_nll + d_log_z) / total)[..., None]
    d_logits = d_logits - jnp.where(_one_hot(weights, targets), d_nll[..., None], 0.0)
    return d_logits, np.zeros(targets.shape, jax.dtypes.float0)


_softmax_nll.defvjp(_softmax_nll_forward, _softmax_nll_backward)


def _one_hot(logits: Array, targets: Array) -> Array:
    vocab = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return vocab == targets[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked_loss(logits_fn, loss_fn, num_chunks, hidden_BTD, head_params, extras):
    def run(hidden, extra):
        return loss_fn(logits_fn(head_params, hidden), extra)

    if num_chunks == 1:
        return run(hidden_BTD, extras)

    def body(carry, chunk):
        return jax.tree.map(jnp.add, carry, run(*chunk)), None

    chunks = jax.tree.map(functools.partial(split, num_chunks=num_chunks), (hidden_BTD, extras))
    zeros = _zeros_like(jax.eval_shape(run, *jax.tree.map(lambda x: x[0], chunks)))
    return jax.lax.scan(body, zeros, chunks)[0]


def _chunked_loss_forward(logits_fn, loss_fn, num_chunks, hidden_BTD, head_params, extras):
    leaves, treedef = jax.tree.flatten(head_params)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def run(trained, hidden, extra):
        trained = iter(trained)
        merged = [next(trained) if f else leaf for f, leaf in zip(is_float, leaves, strict=True)]
        return loss_fn(logits_fn(jax.tree.unflatten(treedef, merged), hidden), extra)

    def run_with_gradients(hidden, extra):
        loss, vjp_fn, metrics = jax.vjp(functools.partial(run, extra=extra), trained, hidden, has_aux=True)
        d_trained, d_hidden = vjp_fn(jnp.ones_like(loss))
        return (loss, metrics, d_trained), d_hidden

    def body(carry, chunk):
        sums, d_hidden = run_with_gradients(*chunk)
        return jax.tree.map(jnp.add, carry, sums), d_hidden

    trained = [leaf for f, leaf in zip(is_float, leaves, strict=True) if f]
    if num_chunks == 1:
        (loss, metrics, d_trained), d_hidden = run_with_gradients(hidden_BTD, extras)
    else:
        chunks = jax.tree.map(functools.partial(split, num_chunks=num_chunks), (hidden_BTD, extras))
        shapes = jax.eval_shape(run_with_gradients, *jax.tree.map(lambda x: x[0], chunks))[0]
        (loss, metrics, d_trained), d_hidden = jax.lax.scan(body, _zeros_like(shapes), chunks)
        d_hidden = _join(d_hidden)
    d_trained = iter(d_trained)
    d_leaves = [next(d_trained) if f else _no_gradient(leaf) for f, leaf in zip(is_float, leaves, strict=True)]
    return (loss, metrics), (d_hidden, jax.tree.unflatten(treedef, d_leaves), extras)


def _chunked_loss_backward(logits_fn, loss_fn, num_chunks, residuals, cotangents):
    d_hidden, d_head, extras = residuals
    d_loss = cotangents[0]

    def scale(gradient):
        return gradient if gradient.dtype == jax.dtypes.float0 else (gradient * d_loss).astype(gradient.dtype)

    return scale(d_hidden), jax.tree.map(scale, d_head), jax.tree.map(_no_gradient, extras)


_chunked_loss.defvjp(_chunked_loss_forward, _chunked_loss_backward)


def split(x: Array, *, num_chunks: int) -> Array:
    """`[B, T, ...]` to `[C, B, T / C, ...]`, as `chunked_loss` cuts."""
    x = x.reshape(x.shape[0], x.shape[1] // num_chunks, num_chunks, *x.shape[2:])
    return jnp.moveaxis(x, 2, 0)


def _join(x: Array) -> Array:
    """Inverse of `split`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _zeros_like(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _no_gradient(x: Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)
