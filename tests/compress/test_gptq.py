"""GPTQ against its published algorithm, written here in numpy from the paper's steps."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compress import gptq, scales
from gptjax.compress.gptq import GPTQ
from gptjax.nn import quantized
from gptjax.nn.formats import WeightFormat

OUTPUTS, INPUTS = 12, 48


def problem(seed=0, *, rows=200, inputs=INPUTS, pruned=0.0):
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(inputs, inputs)) / np.sqrt(inputs) + np.eye(inputs)
    x = random.normal(size=(rows, inputs)) @ mixing * np.exp(random.normal(size=inputs))
    weights = random.standard_t(4, (OUTPUTS, inputs)).astype(np.float32)
    weights[random.random(weights.shape) < pruned] = 0
    return jnp.asarray(weights), jnp.asarray((x.T @ x).astype(np.float32))


def min_max(rows, format):
    """Scale and zero of rows `[O, g]`, each one group."""
    largest = 2**format.bits - 1
    if format.symmetric:
        scale = np.abs(rows).max(1) / (2 ** (format.bits - 1) - 1)
        zero = np.full(len(rows), 2 ** (format.bits - 1))
    else:
        low, high = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
        scale = (high - low) / largest
    scale = scale.astype(np.float16).astype(np.float64)
    if format.bits == 4 and not format.symmetric:  # 7 digits, see `quantized.stored_scale`
        mantissa, exponent = np.frexp(((high - low) / largest).astype(np.float32))
        scale = np.ldexp(np.floor(mantissa * 2**7 + 0.5) / 2**7, exponent).astype(np.float64)
    if not format.symmetric:
        zero = np.clip(np.round(-low / scale), 0, largest)
    return scale, zero


def reference(weights, hessian, format, *, order, damping=0.01):
    """Codes `[O, I]`, columns one at a time and every column after it updated at once."""
    W, H = np.array(weights, np.float64), np.array(hessian, np.float64)
    size, largest = format.group_size, 2**format.bits - 1
    groups = [min_max(W[:, i : i + size], format) for i in range(0, INPUTS, size)]
    diagonal = np.diag(H)
    perm = {
        "none": np.arange(INPUTS),
        "activation": np.argsort(-diagonal, kind="stable"),
        "group": np.concatenate([
            g * size + np.argsort(-diagonal[g * size : (g + 1) * size], kind="stable")
            for g in np.argsort(-diagonal.reshape(-1, size).sum(1), kind="stable")
        ]),
    }[order]  # fmt: skip
    W, H = W[:, perm], H[np.ix_(perm, perm)]
    H = H + damping * np.diag(H).mean() * np.eye(INPUTS)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    codes = np.zeros((OUTPUTS, INPUTS), int)
    for j in range(INPUTS):
        if order != "activation" and j % size == 0:
            groups[perm[j] // size] = min_max(W[:, j : j + size], format)
        scale, zero = groups[perm[j] // size]
        lowest = 1 if format.symmetric and format.bits == 8 else 0
        code = np.clip(np.round(W[:, j] / scale) + zero, lowest, largest)
        error = (W[:, j] - scale * (code - zero)) / U[j, j]
        W[:, j:] -= np.outer(error, U[j, j:])
        codes[:, perm[j]] = code
    return codes


def values(rounded, format):
    return quantized.decode(rounded.codes, rounded.scale, rounded.zero, format)


def loss(weights, rounded, hessian, format):
    error = np.asarray(values(rounded, format) - weights, np.float64)
    return float(np.sum(error @ np.asarray(hessian, np.float64) * error))


@pytest.mark.parametrize("order", ["none", "activation", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_those_of_the_published_algorithm(bits, symmetric, order):
    format = WeightFormat(dtype=f"int{bits}", group_size=16, symmetric=symmetric)
    weights, hessian = problem(bits)
    got = gptq.round_rows(weights, hessian, format=format, config=GPTQ(order=order, scales="reach"))
    wanted = reference(weights, hessian, format, order=order)
    if bits < 8:
        assert np.array_equal(got.codes, wanted)
    else:  # so fine that float32 rounds some the other way
        assert np.abs(got.codes - wanted).max() <= 1 and np.mean(np.asarray(got.codes) == wanted) > 0.98
    assert float(got.damping) == pytest.approx(0.01)


@pytest.mark.parametrize("dtype", ["int2", "int3", "int4", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("group_size", [None, 8, 24])
def test_the_output_is_nearer_than_by_rounding_to_nearest(dtype, group_size):
    format = WeightFormat(dtype=dtype, group_size=group_size, symmetric=True)
    weights, hessian = problem(1)
    scale, zero = quantized.group_scale(weights, format)
    nearest = gptq.Rounded(quantized.encode(weights, scale, zero, format), scale, zero, 0.0)
    got = {
        order: loss(
            weights, gptq.round_rows(weights, hessian, format=format, config=GPTQ(order=order)), hessian, format
        )
        for order in ("none", "activation", "group")
    }
    assert max(got.values()) < 0.8 * loss(weights, nearest, hessian, format)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["none", "activation", "group"])
def test_pruned_weights_stay_exactly_zero(symmetric, order):
    format = WeightFormat(dtype="int4", group_size=16, symmetric=symmetric)
    weights, hessian = problem(2, pruned=0.5)
    got = np.asarray(values(gptq.round_rows(weights, hessian, format=format, config=GPTQ(order=order)), format))
    assert np.all(got[np.asarray(weights) == 0] == 0) and np.count_nonzero(got) > 0.3 * got.size
    # What was rounded to 0 is the least error that its neighbours make good.
    masked = jnp.where(weights == 0, 0, quantized.dequantize_rows(nearest_leaf(weights, format)))
    error = np.asarray(masked - weights, np.float64)
    got_error = np.asarray(got - weights, np.float64)
    assert np.sum(got_error @ hessian * got_error) < np.sum(error @ hessian * error)


def nearest_leaf(rows, format):
    scale, zero = quantized.group_scale(rows, format)
    codes = quantized.encode(rows, scale, zero, format)
    return quantized.pack(codes, scale, zero, format=format, layout=quantized.Layout((INPUTS,), (OUTPUTS,)))


def test_a_singular_hessian_is_damped_more_and_that_is_told():
    format = WeightFormat(dtype="int4", group_size=16, symmetric=False)
    weights, hessian = problem(3, rows=5)
    got = gptq.round_rows(weights, hessian, format=format, config=GPTQ(damping=0.0))
    assert 0 < float(got.damping) <= 0.1 and np.isfinite(values(got, format)).all()


def test_inputs_never_seen_are_rounded_to_nearest():
    format = WeightFormat(dtype="int4", group_size=16, symmetric=False)
    weights, hessian = problem(4)
    hessian = hessian.at[16:32].set(0).at[:, 16:32].set(0)
    for seen, config in [(hessian, GPTQ(scales="reach")), (0 * hessian, GPTQ(scales="reach"))]:
        got = gptq.round_rows(weights, seen, format=format, config=config)
        nearest = quantized.unpack(nearest_leaf(weights, format))
        unseen = np.asarray(jnp.diagonal(seen) == 0)
        assert np.array_equal(np.asarray(got.codes)[:, unseen], np.asarray(nearest)[:, unseen])


def test_experts_are_rounded_as_each_alone():
    format = WeightFormat(dtype="int4", group_size=16)
    pairs = [problem(seed) for seed in range(3)]
    weights, hessian = (jnp.stack(part) for part in zip(*pairs, strict=True))
    got = gptq.round_rows(weights, hessian, format=format, config=GPTQ())
    for i, (own, own_hessian) in enumerate(pairs):
        alone = gptq.round_rows(own, own_hessian, format=format, config=GPTQ())
        assert np.mean(np.asarray(alone.codes) == np.asarray(got.codes[i])) > 0.995  # batched products round otherwise


@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_scales_are_the_best_of_those_tried(symmetric):
    format = WeightFormat(dtype="int3", group_size=8, symmetric=symmetric)
    weights, hessian = problem(5)
    cost = scales.by_hessian(hessian, format)
    scale, zero = scales.searched(weights, format, cost)
    H = np.asarray(hessian, np.float64)

    def costs(scale, zero):
        codes = quantized.encode(weights, scale, zero, format)
        error = np.asarray(quantized.decode(codes, scale, zero, format) - weights, np.float64).reshape(OUTPUTS, -1, 8)
        blocks = [H[g * 8 : g * 8 + 8, g * 8 : g * 8 + 8] for g in range(INPUTS // 8)]
        return np.stack([np.sum(error[:, g] @ block * error[:, g], -1) for g, block in enumerate(blocks)], 1)

    found, plain = costs(scale, zero), costs(*quantized.group_scale(weights, format))
    codes = quantized.encode(weights, scale, zero, format)
    np.testing.assert_allclose(cost(quantized.decode(codes, scale, zero, format) - weights), found, rtol=1e-3)
    assert np.all(found <= plain * (1 + 1e-4)) and found.sum() < 0.9 * plain.sum()


def test_damping_is_a_part_of_the_diagonal():
    with pytest.raises(ValueError, match="damping=1.5: expected 0 to below 1"):
        GPTQ(damping=1.5)


def test_rows_aim_at_the_outputs_of_other_inputs_by_least_squares():
    random = np.random.default_rng(9)
    x0 = random.normal(size=(300, INPUTS))
    x = x0 + 0.3 * random.normal(size=x0.shape)
    weights = problem(9, pruned=0.2)[0]
    hessian, drift = ((a.T @ x).astype(np.float32) for a in (x, x0 - x))
    best = np.linalg.lstsq(x, x0 @ np.asarray(weights, np.float64).T, rcond=None)[0].T
    for strength in (0.5, 1.0):
        got = gptq.aimed(weights, jnp.asarray(hessian), jnp.asarray(drift), strength=strength, damping=1e-4)
        wanted = np.where(np.asarray(weights) == 0, 0, weights + strength * (best - weights))
        np.testing.assert_allclose(got, wanted, atol=2e-3)


def test_rows_aim_with_more_damping_where_a_hessian_has_no_factor():
    hessian = np.diag(np.full(INPUTS, 1.0, np.float32))
    hessian[0, 1] = hessian[1, 0] = 1.005  # by rounding not positive
    drift = 0.1 * np.eye(INPUTS, dtype=np.float32)
    weights = problem(9)[0]
    got = gptq.aimed(weights, jnp.asarray(hessian), jnp.asarray(drift), strength=1.0, damping=1e-4)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[:, 2:], 1.1 * np.asarray(weights)[:, 2:], rtol=0.02)
