"""Attention against its definition written out per query, and its fused kernels against the plain form."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import test_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptjax.kernels import attention as attention_lib
from gptjax.kernels import attention_fused
from gptjax.kernels.attention import attention
from gptjax.parallel import mesh


def _packed(batch, length):
    """Positions and segments of two documents and padding at the end of each row."""
    first = length // 3
    positions = np.concatenate([np.arange(first), np.arange(length - first)])
    segments = np.where(np.arange(length) < first, 1, 2)
    segments[length - 2 :] = 0
    return (jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch, length)) for x in (positions, segments))


def _operands(batch=2, length=12, kv_length=None, heads=4, kv_heads=2, head_dim=8, v_dim=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    kv_length = kv_length or length
    shapes = (length, heads, head_dim), (kv_length, kv_heads, head_dim), (kv_length, kv_heads, v_dim)
    return [jnp.asarray(rng.normal(size=(batch, *shape)), dtype) for shape in shapes]


def _by_hand(q, k, v, *, q_positions_BT, kv_positions_BS, q_segments_BT=None, kv_segments_BS=None, **rest):
    """One softmax a query, over the list of keys that it may attend."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b, t, n in itertools.product(*map(range, q.shape[:3])):
        head = n // (q.shape[2] // k.shape[2])
        seen = []
        for s in range(k.shape[1]):
            distance = int(q_positions_BT[b, t]) - int(kv_positions_BS[b, s])
            ok = kv_positions_BS[b, s] >= 0 and not (rest["causal"] and distance < 0)
            ok = ok and (rest["window"] is None or abs(distance) < rest["window"])
            if q_segments_BT is not None:
                ok = ok and q_segments_BT[b, t] == kv_segments_BS[b, s] > 0
            if ok:
                seen.append(s)
        if not seen:
            continue
        scores = k[b, seen, head] @ q[b, t, n] * rest["scale"]
        if rest.get("softcap"):
            scores = rest["softcap"] * np.tanh(scores / rest["softcap"])
        weights = np.exp(scores)
        sink = np.exp(float(rest["sinks_N"][n])) if rest.get("sinks_N") is not None else 0.0
        out[b, t, n] = weights @ v[b, seen, head] / (weights.sum() + sink)
    return out


_CASES = {
    "causal": dict(causal=True, window=None),
    "bidirectional": dict(causal=False, window=None),
    "window": dict(causal=True, window=3),
    "two-sided window": dict(causal=False, window=3),
    "softcap": dict(causal=True, window=None, softcap=1.5),
    "sinks": dict(causal=True, window=None, sinks_N=jnp.asarray([0.5, -1.0, 2.0, 0.0])),
}


@pytest.mark.parametrize("case", _CASES)
def test_packed_rows_match_the_definition(case):
    q, k, v = _operands(v_dim=6)
    positions, segments = _packed(2, 12)
    options = dict(
        q_positions_BT=positions, kv_positions_BS=positions, q_segments_BT=segments, kv_segments_BS=segments, scale=0.3
    )
    got = jax.jit(lambda q, k, v: attention(q, k, v, **options, **_CASES[case]))(q, k, v)
    np.testing.assert_allclose(got, _by_hand(q, k, v, **options, **_CASES[case]), rtol=1e-5, atol=1e-5)
    assert not np.asarray(got[:, -2:]).any()


@pytest.mark.parametrize("case", _CASES)
def test_the_form_for_other_formats_matches_the_definition(case):
    q, k, v = _operands()
    positions, segments = _packed(2, 12)
    rest = dict(scale=0.3, **_CASES[case])
    arrays = dict(q_positions_BT=positions, kv_positions_BS=positions, q_segments_BT=segments, kv_segments_BS=segments)
    with mesh.portable("plain"):
        got = attention(q, k, v, **arrays, **rest)
    np.testing.assert_allclose(got, _by_hand(q, k, v, **arrays, **rest), atol=1e-6)


@pytest.mark.parametrize("length", [1, 3])
def test_cached_keys_match_the_definition(length):
    q, k, v = _operands(length=length, kv_length=10)
    kv_positions = jnp.asarray([[8, 9, 2, 3, 4, 5, 6, 7, -1, -1], [0, 1, 2, -1, -1, -1, -1, -1, -1, -1]], jnp.int32)
    q_positions = jnp.asarray([[9], [2]], jnp.int32) + jnp.arange(length) - (length - 1)
    options = dict(q_positions_BT=q_positions, kv_positions_BS=kv_positions, scale=0.3, causal=True, window=None)
    got = attention(q, k, v, **options)
    np.testing.assert_allclose(got, _by_hand(q, k, v, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["bidirectional", "window", "sinks"])
def test_chunks_change_nothing(case, monkeypatch):
    q, k, v = _operands(length=16)
    positions, segments = _packed(2, 16)

    def run(chunk):
        monkeypatch.setattr(attention_lib, "_MIN_CHUNK", chunk)

        def loss(q, k, v):
            o = attention(
                q, k, v, q_positions_BT=positions, kv_positions_BS=positions, q_segments_BT=segments,
                kv_segments_BS=segments, scale=0.3, **_CASES[case],
            )  # fmt: skip
            return jnp.sum(jnp.sin(o)), o

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    assert len(attention_lib._chunks(16, in_order=True, window=None)) == 1
    whole = run(16)
    parts = run(2)
    assert len(attention_lib._chunks(16, in_order=True, window=None)) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)


def _line_by_line(q, k, v, mask, *, scale, softcap=None, sinks_N=None):
    """The formula in jnp, for JAX to differentiate."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * scale
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    weights = jnp.where(mask[:, None], jnp.exp(scores), 0.0)
    total = weights.sum(-1, keepdims=True)
    total = total if sinks_N is None else total + jnp.exp(sinks_N)[:, None, None]
    return jnp.einsum("BNTS,BSNH->BTNH", weights / jnp.where(total > 0, total, 1.0), v)


@pytest.mark.parametrize("case", _CASES)
def test_gradients_match_automatic_differentiation(case):
    q, k, v = _operands(v_dim=6)
    positions, segments = _packed(2, 12)
    options = dict(_CASES[case])
    sinks = options.pop("sinks_N", None)
    where = dict(q_segments_BT=segments, kv_segments_BS=segments, causal=options["causal"], window=options["window"])
    mask = attention_lib.allowed(positions, positions, **where)
    softcap = options.get("softcap")

    def gradients(fn):
        wanted = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
        loss = jax.value_and_grad(lambda *operands: jnp.sum(jnp.sin(fn(*operands))), wanted)
        return jax.jit(loss)(q, k, v, sinks)

    got = gradients(
        lambda q, k, v, sinks: attention(
            q, k, v, q_positions_BT=positions, kv_positions_BS=positions, scale=0.3, softcap=softcap, sinks_N=sinks,
            **where,
        )
    )  # fmt: skip
    want = gradients(lambda q, k, v, sinks: _line_by_line(q, k, v, mask, scale=0.3, softcap=softcap, sinks_N=sinks))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, want)


def test_gradients_match_finite_differences():
    q, k, v = _operands(batch=1, length=4, heads=2, kv_heads=1, head_dim=3, v_dim=3)
    positions = jnp.arange(4)[None]

    def fn(q, k, v, sinks):
        return attention(
            q, k, v, q_positions_BT=positions, kv_positions_BS=positions, causal=True, window=3, scale=0.5,
            softcap=4.0, sinks_N=sinks,
        )  # fmt: skip

    test_util.check_grads(
        jax.jit(fn), (q, k, v, jnp.asarray([0.1, -0.2])), order=1, modes=["rev"], rtol=2e-2, atol=2e-2
    )


def test_hidden_rows_have_zero_gradients():
    q, k, v = _operands()
    positions, _ = _packed(2, 12)
    nothing = jnp.zeros((2, 12), jnp.int32)

    def loss(q, k, v):
        return attention(
            q, k, v, q_positions_BT=positions, kv_positions_BS=positions, q_segments_BT=nothing,
            kv_segments_BS=nothing, causal=True, window=None, scale=1.0,
        ).sum()  # fmt: skip

    assert all(not np.asarray(g).any() for g in jax.grad(loss, (0, 1, 2))(q, k, v))


def test_bfloat16_is_close():
    options = dict(causal=True, window=None, scale=0.3)
    q, k, v = _operands(dtype=jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    options |= dict(q_positions_BT=positions, kv_positions_BS=positions)
    got = attention(q, k, v, **options)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), _by_hand(q, k, v, **options), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("axes", ["data", "context"])
def test_sharded_matches(axes, monkeypatch):
    monkeypatch.setattr(attention_lib, "_MIN_CHUNK", 2)
    q, k, v = _operands(batch=4, length=8)
    positions = jnp.broadcast_to(jnp.arange(8), (4, 8))
    run = jax.jit(
        lambda q, k, v, p: attention(q, k, v, q_positions_BT=p, kv_positions_BS=p, causal=True, window=None, scale=0.3)
    )
    want = run(q, k, v, positions)
    names = ("data", "fsdp", "expert", "context", "tensor")
    mesh = jax.make_mesh(tuple(4 if name == axes else 1 for name in names), names, axis_types=(AxisType.Auto,) * 5)
    spec = PartitionSpec("data", "context")
    with jax.set_mesh(mesh):
        got = run(*(jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v, positions)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def _request(**options):
    return attention_fused.Request(
        **(dict(in_order=True, causal=True, window=None, scale=0.1, softcap=None, sinks_N=None) | options)
    )


@pytest.mark.parametrize("case", ["window", "sinks"])
def test_splash_matches_the_plain_form(case):
    q, k, v = _operands(batch=1, length=256, heads=2, kv_heads=1, head_dim=64, v_dim=64)
    positions, segments = _packed(1, 256)
    options = dict(_CASES[case], scale=0.1)
    if case == "sinks":
        options["sinks_N"] = jnp.asarray([0.5, -1.0])
    request = _request(**options)

    def run(fn):
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(jnp.sin(fn(q, k, v))), (0, 1, 2)))(q, k, v)

    got = run(lambda q, k, v: attention_fused.splash(request, q, k, v, segments, lambda: None, interpret=True))
    want = run(
        lambda q, k, v: attention(
            q, k, v, q_positions_BT=positions, kv_positions_BS=positions, q_segments_BT=segments,
            kv_segments_BS=segments, **options,
        )
    )  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), got, want)


def test_tpu_lowering_has_the_splash_kernel(monkeypatch):
    monkeypatch.setattr(attention_lib, "platform", lambda: "tpu")
    q, k, v = _operands(batch=2, length=256, heads=4, kv_heads=2, head_dim=128, v_dim=128, dtype=jnp.bfloat16)
    positions, segments = _packed(2, 256)

    def loss(q, k, v):
        return attention(
            q, k, v, q_positions_BT=positions, kv_positions_BS=positions, q_segments_BT=segments,
            kv_segments_BS=segments, causal=True, window=100, scale=0.1,
        ).astype(jnp.float32).sum()  # fmt: skip

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3


def test_unfit_requests_take_the_plain_form_and_say_why(monkeypatch):
    said = []
    monkeypatch.setattr(attention_fused, "_log_once", said.append)
    q, k, v = _operands(length=100, head_dim=64, v_dim=64)
    pick = functools.partial(attention_fused.pick)
    assert pick("tpu", _request(), q, k, v) is None and "length 100" in said[-1]
    assert pick("tpu", _request(in_order=False), q, k, v) is None and "cache" in said[-1]
    assert pick("gpu", _request(), q, k, v) is None and "float32" in said[-1]
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    assert pick("gpu", _request(softcap=2.0), *half) is None and "soft-caps" in said[-1]
    assert pick("gpu", _request(), *half) is not None
    assert pick("cpu", _request(), *half) is None and len(said) == 4
