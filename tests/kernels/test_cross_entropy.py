"""Chunked cross-entropy against the formula on whole logits: values, gradients, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import test_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gptjax.kernels import cross_entropy, rows
from gptjax.kernels.cross_entropy import chunked_loss, pick_num_chunks, softmax_nll

B, T, D, V = 4, 8, 6, 10


def _operands():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    head = {"kernel": jnp.asarray(rng.normal(size=(V, D)), jnp.float32), "shift": jnp.arange(V, dtype=jnp.int32)}
    extras = {
        "targets": jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        "mask": jnp.asarray(rng.integers(0, 2, (B, T)), jnp.float32),
    }
    return hidden, head, extras


def _logits(head, hidden):
    return jnp.einsum("BTD,VD->BTV", hidden, head["kernel"]) + 0.1 * head["shift"]


def _loss(logits, extras):
    token = softmax_nll(logits, extras["targets"])
    loss = jnp.sum(extras["mask"] * (token.nll + 0.1 * token.log_z**2))
    return loss, {"correct": jnp.sum(extras["mask"] * token.correct)}


def _whole(hidden, kernel, head, extras):
    logits = _logits(head | {"kernel": kernel}, hidden)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, extras["targets"][..., None], -1)[..., 0]
    correct = jnp.sum(extras["mask"] * (logits.argmax(-1) == extras["targets"]))
    return jnp.sum(extras["mask"] * (nll + 0.1 * log_z**2)), {"correct": correct}


def _chunked(num_chunks):
    def loss(hidden, kernel, head, extras):
        return chunked_loss(_logits, _loss, hidden, head | {"kernel": kernel}, extras, num_chunks=num_chunks)

    return loss


def _gradients(loss, hidden, head, extras):
    fn = jax.value_and_grad(loss, (0, 1), has_aux=True)
    return jax.jit(fn)(hidden, head["kernel"], head, extras)


def _assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("num_chunks", [1, 2, 8])
def test_matches_whole_logits(num_chunks):
    hidden, head, extras = _operands()
    want = _gradients(_whole, hidden, head, extras)
    _assert_close(_gradients(_chunked(num_chunks), hidden, head, extras), want)
    _assert_close(_chunked(num_chunks)(hidden, head["kernel"], head, extras), want[0])


def test_scales_with_the_cotangent_inside_remat_and_scan():
    hidden, head, extras = _operands()

    def grad(loss):
        def outer(kernel):
            def body(carry, scale):
                return carry + 3.0 * jax.checkpoint(loss)(scale * hidden, kernel, head, extras)[0], None

            return jax.lax.scan(body, 0.0, jnp.asarray([1.0, 2.0]))[0]

        return jax.jit(jax.value_and_grad(outer))(head["kernel"])

    got, want = grad(_chunked(4)), grad(_whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_metrics_and_extras_carry_no_gradient():
    hidden, head, extras = _operands()

    def metric(hidden, mask):
        return chunked_loss(_logits, _loss, hidden, head, extras | {"mask": mask}, num_chunks=2)[1]["correct"]

    def loss(mask):
        return chunked_loss(_logits, _loss, hidden, head, extras | {"mask": mask}, num_chunks=2)[0]

    assert not np.asarray(jax.grad(metric)(hidden, extras["mask"])).any()
    assert not np.asarray(jax.grad(loss)(extras["mask"])).any()


def test_whole_logits_are_never_made():
    hidden, head, extras = _operands()

    def text(loss):
        fn = jax.value_and_grad(loss, (0, 1), has_aux=True)
        return str(jax.make_jaxpr(fn)(hidden, head["kernel"], head, extras))

    whole = f"f32[{B},{T},{V}]"
    assert whole in text(_whole)
    assert whole not in text(_chunked(2))


@pytest.mark.parametrize(
    "spec", [PartitionSpec("data"), PartitionSpec("data", "context"), PartitionSpec(None, "context")], ids=str
)
def test_sharded_matches_and_chunks_stay_sharded(spec):
    hidden, head, extras = _operands()
    want = _gradients(_chunked(1), hidden, head, extras)
    mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    hidden, extras = jax.device_put((hidden, extras), NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        got = _gradients(_chunked(2), hidden, head, extras)
        fn = jax.jit(lambda *args: _chunked(2)(*args)[0])
        text = fn.lower(hidden, head["kernel"], head, extras).compile().as_text()
    _assert_close(got, want)
    assert "all-gather" not in text and "all-to-all" not in text


def test_vocabulary_split_over_devices_matches():
    hidden, head, extras = _operands()
    want = _gradients(_chunked(1), hidden, head, extras)
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    head["kernel"] = jax.device_put(head["kernel"], NamedSharding(mesh, PartitionSpec("tensor")))
    with jax.set_mesh(mesh):
        _assert_close(_gradients(_chunked(2), hidden, head, extras), want)


def test_softmax_nll_by_finite_differences_and_extreme_logits():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, V)), jnp.float32)
    targets = jnp.asarray([0, 4, 9])
    test_util.check_grads(
        lambda x: softmax_nll(x, targets)[:2], (logits,), order=1, modes=["rev"], rtol=2e-2, atol=2e-2
    )
    wide = jnp.asarray([[1e4, -1e4, 0.0]])
    nll, gradient = jax.value_and_grad(lambda x: softmax_nll(x, jnp.asarray([1])).nll.sum())(wide)
    assert float(nll) == 2e4
    np.testing.assert_allclose(gradient, [[1.0, -1.0, 0.0]])


@pytest.mark.parametrize("size", [1, 16, 17, 65, 1000])
def test_row_maximum_of_any_width(size):
    x = jnp.asarray(np.random.default_rng(size).normal(size=(3, 2, size)), jnp.float32)
    np.testing.assert_array_equal(rows.row_max(x), x.max(-1))
    assert np.isnan(rows.row_max(x.at[1, 0, size // 2].set(jnp.nan))[1, 0])
    np.testing.assert_allclose(rows.row_sum(x), x.sum(-1), rtol=1e-5, atol=1e-5)


def test_the_first_of_a_tie_is_correct():
    logits = jnp.asarray([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    np.testing.assert_array_equal(softmax_nll(logits, jnp.asarray([0, 1, 0, 1])).correct, [1.0, 0.0, 1.0, 0.0])


def test_both_ways_to_sum_agree():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, V)), jnp.float32)
    targets = jnp.asarray([[0, 4, 9], [1, 1, 2]])
    arguments = logits, targets, logits.max(-1)
    _assert_close(cross_entropy._sums_by_products(*arguments)[:2], cross_entropy._sums_by_reductions(*arguments)[:2])


def test_bfloat16_logits_keep_their_dtype():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, V)), jnp.bfloat16)
    targets = jnp.asarray([0, 4, 9])
    gradient = jax.grad(lambda x: softmax_nll(x, targets).nll.sum())(logits)
    assert gradient.dtype == jnp.bfloat16
    want = jax.nn.softmax(logits.astype(jnp.float32)) - jax.nn.one_hot(targets, V)
    np.testing.assert_allclose(gradient.astype(jnp.float32), want, atol=1e-2)


def test_number_of_chunks():
    assert pick_num_chunks(num_rows=2, seq_len=8, vocab_size=10, max_bytes=640) == 1
    assert pick_num_chunks(num_rows=2, seq_len=8, vocab_size=10, max_bytes=639) == 2
    assert pick_num_chunks(num_rows=2, seq_len=6, vocab_size=10, max_bytes=100) == 6
    assert pick_num_chunks(num_rows=2, seq_len=6, vocab_size=10, max_bytes=1) == 6
    hidden, head, extras = _operands()
    with pytest.raises(ValueError, match="num_chunks=3: expected a divisor of the sequence length 8"):
        chunked_loss(_logits, _loss, hidden, head, extras, num_chunks=3)


def test_cotangents_of_integer_leaves_are_accepted():
    hidden, head, extras = _operands()
    _, vjp = jax.vjp(
        lambda head: cross_entropy.chunked_loss(_logits, _loss, hidden, head, extras, num_chunks=2)[0], head
    )
    (gradient,) = vjp(jnp.ones(()))
    assert gradient["shift"].dtype == jax.dtypes.float0 and gradient["kernel"].shape == (V, D)
