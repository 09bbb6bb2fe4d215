"""Fused attention kernels of accelerators, and when they can be used.

TPU: splash attention (Pallas), which skips hidden blocks. GPU: cuDNN's flash attention. Both
are exact; neither keeps the scores. What they cannot do is left to the plain form, which is
logged once with the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from gptjax.parallel import rules
from gptjax.types import Array

FusedFn = Callable[[Array, Array, Array, Array | None, Callable[[], Array]], Array]
"""`(q_BTNH, k_BSKH, v_BSKH, segments_BT or None, make mask_BTS) -> o_BTNH`."""

_LANES = 128
_MAX_BLOCK = 512
_CUDNN_MAX_HEAD_DIM = 128


@dataclass(frozen=True)
class Request:
    """What `kernels.attention` was asked for besides the arrays; `in_order` is its promise."""

    in_order: bool
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    sinks_N: Array | None


def pick(platform: str, request: Request, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array) -> FusedFn | None:
    """The platform's kernel, or None where there is none for this request."""
    if platform == "tpu":
        reason, fused = _splash_obstacle(request, q_BTNH, k_BSKH), functools.partial(splash, request)
    elif platform == "gpu":
        reason, fused = _cudnn_obstacle(request, q_BTNH, k_BSKH, v_BSKH), functools.partial(_cudnn, request)
    else:
        return None
    if reason is None:
        return fused
    # A cached step with one query has nothing to fuse: the plain form is its best one.
    if q_BTNH.shape[1] > 1:
        _log_once(f"attention on {platform} takes the plain form: {reason}")
    return None


def splash(
    request: Request,
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segments_BT: Array | None,
    make_mask: Callable[[], Array],
    *,
    interpret: bool = False,
) -> Array:
    """Splash attention of self-attention in order; `interpret` runs it anywhere, slowly."""
    del make_mask
    if segments_BT is None:
        segments_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)
    local = functools.partial(_splash_local, request, interpret)
    sinks_N = request.sinks_N
    mesh = rules.current_mesh()
    if mesh is not None:
        heads = rules.spec("act_batch", None, "act_heads", None)
        kv_heads = rules.spec("act_batch", None, "act_kv_heads", None)
        sinks = rules.spec("act_heads") if sinks_N is not None else rules.spec()
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(heads, kv_heads, kv_heads, rules.spec("act_batch", None), sinks),
            out_specs=heads,
            check_vma=False,
        )
    return local(q_BTNH, k_BSKH, v_BSKH, segments_BT, sinks_N)


def _splash_local(
    request: Request, interpret: bool, q_BTNH: Array, k: Array, v: Array, segments_BT: Array, sinks_N: Array | None
) -> Array:
    # Imported here: Pallas takes a second to load, which other platforms need not wait for.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib

    length, num_heads = q_BTNH.shape[1:3]
    shape = (length, length)
    mask: Any
    if request.window is not None:
        reach = request.window - 1
        mask = splash_lib.LocalMask(shape, (reach, 0 if request.causal else reach), offset=0)
    else:
        mask = splash_lib.CausalMask(shape) if request.causal else splash_lib.FullMask(shape)
    block = next(size for size in (_MAX_BLOCK, 256, _LANES) if length % size == 0)
    kernel = splash_lib.make_splash_mha(
        splash_lib.MultiHeadMask([mask] * num_heads),
        block_sizes=kernel_lib.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        attn_logits_soft_cap=request.softcap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def row(q_TNH: Array, k_TKH: Array, v_TKH: Array, segments_T: Array) -> Array:
        operands = (jnp.swapaxes(x, 0, 1) for x in (q_TNH * request.scale, k_TKH, v_TKH))
        o_NTH = kernel(*operands, splash_lib.SegmentIds(segments_T, segments_T), sinks=sinks_N)
        return jnp.swapaxes(o_NTH, 0, 1)

    o_BTNH = jax.vmap(row)(q_BTNH, k, v, segments_BT).astype(q_BTNH.dtype)
    # Padding has segment 0 and so attends padding.
    return jnp.where((segments_BT > 0)[:, :, None, None], o_BTNH, 0)


def _splash_obstacle(request: Request, q_BTNH: Array, k_BSKH: Array) -> str | None:
    if not request.in_order:
        return "queries and keys are not the same tokens in order (a cache)"
    length, num_heads, head_dim = q_BTNH.shape[1:]
    if length % _LANES:
        return f"length {length} is not a multiple of {_LANES}"
    if head_dim % 64:
        return f"head_dim {head_dim} is not a multiple of 64"
    mesh = rules.current_mesh()
    if mesh is None:
        return None
    if rules.axis_size(mesh, "act_length") > 1:
        return "the sequence is split over the mesh"
    parts = {
        "batch": (q_BTNH.shape[0], rules.axis_size(mesh, "act_batch")),
        "query heads": (num_heads, rules.axis_size(mesh, "act_heads")),
        "key/value heads": (k_BSKH.shape[2], rules.axis_size(mesh, "act_kv_heads")),
    }
    for name, (size, num_parts) in parts.items():
        if size % num_parts:
            return f"{size} {name} do not split over {num_parts} devices"
    return None


def _cudnn(
    request: Request, q_BTNH: Array, k: Array, v: Array, segments_BT: Array | None, make_mask: Callable[[], Array]
) -> Array:
    if request.in_order and request.causal and segments_BT is None and request.window is None:
        return jax.nn.dot_product_attention(q_BTNH, k, v, scale=request.scale, is_causal=True, implementation="cudnn")
    mask_BTS = make_mask()
    o_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k, v, mask=mask_BTS[:, None], scale=request.scale, implementation="cudnn"
    )
    # cuDNN averages all values where everything is hidden.
    return jnp.where(mask_BTS.any(axis=-1)[:, :, None, None], o_BTNH, 0)


def _cudnn_obstacle(request: Request, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array) -> str | None:
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN has no {q_BTNH.dtype}"
    if request.softcap is not None or request.sinks_N is not None:
        return "cuDNN has neither soft-caps nor sinks"
    length, head_dim = q_BTNH.shape[1], q_BTNH.shape[3]
    if length == 1:
        return "one query"
    if head_dim % 8 or head_dim > _CUDNN_MAX_HEAD_DIM or head_dim != v_BSKH.shape[3]:
        return f"head sizes {head_dim} and {v_BSKH.shape[3]} are not equal multiples of 8 up to {_CUDNN_MAX_HEAD_DIM}"
    if length % 2 or k_BSKH.shape[1] % 2:
        return f"odd lengths {length}, {k_BSKH.shape[1]}"
    return None


@functools.cache
def _log_once(message: str) -> None:
    logging.info("%s", message)
