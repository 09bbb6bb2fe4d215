"""The divergences against their definitions, written out in float64, and against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compress import divergence as lib
from gptjax.compress.divergence import Divergence

KINDS = ("forward_kl", "reverse_kl", "jsd")
VOCAB = 11


def logits(seed, scale=2.0):
    return np.random.default_rng(seed).normal(size=(3, 5, VOCAB), scale=scale).astype(np.float32)


TEACHER, STUDENT = logits(0), logits(1)


def softmax(x):
    weights = np.exp(np.float64(x) - np.max(x, -1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def by_hand(divergence, p, q):
    def kl(a, b):
        return (a * (np.log(a) - np.log(b))).sum(-1)

    beta = divergence.beta
    m = beta * p + (1 - beta) * q
    value = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}
    return divergence.temperature**2 * value[divergence.kind]


def buckets(p, ids):
    chosen = np.take_along_axis(p, ids, -1)
    return np.concatenate([chosen, 1 - chosen.sum(-1, keepdims=True)], -1)


def top_k_loss(divergence, k, student, teacher=TEACHER):
    return lib.between_top_k(divergence, lib.top_k(divergence, jnp.asarray(teacher), k), jnp.asarray(student))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_each_is_its_formula(kind, temperature):
    divergence = Divergence(kind=kind, temperature=temperature, beta=0.3)
    p, q = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    np.testing.assert_allclose(lib.between(divergence, TEACHER, STUDENT), by_hand(divergence, p, q), rtol=1e-5)
    ids = np.argsort(-TEACHER, -1)[..., :4]
    found = lib.top_k(divergence, jnp.asarray(TEACHER), 4)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(np.exp(found.log_probs), buckets(p, ids), rtol=1e-5)
    expected = by_hand(divergence, buckets(p, ids), buckets(q, ids))
    np.testing.assert_allclose(top_k_loss(divergence, 4, STUDENT), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [None, 1, 4, VOCAB - 1])
def test_gradients_are_finite_differences(kind, k):
    divergence = Divergence(kind=kind, temperature=1.7, beta=0.3)

    def loss(student):
        values = lib.between(divergence, TEACHER, student) if k is None else top_k_loss(divergence, k, student)
        return values.sum()

    got = jax.grad(loss)(jnp.asarray(STUDENT))
    direction = np.random.default_rng(2).normal(size=STUDENT.shape).astype(np.float32)

    def reference(eps):
        q = softmax((STUDENT + np.float64(eps) * direction) / 1.7)
        p = softmax(TEACHER / 1.7)
        if k is not None:
            ids = np.argsort(-TEACHER, -1)[..., :k]
            p, q = buckets(p, ids), buckets(q, ids)
        return by_hand(divergence, p, q).sum()

    np.testing.assert_allclose((got * direction).sum(), (reference(1e-4) - reference(-1e-4)) / 2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_are_at_no_distance_and_pull_nowhere(kind):
    divergence = Divergence(kind=kind, temperature=2.0)
    for value in (lib.between(divergence, TEACHER, TEACHER), top_k_loss(divergence, 3, TEACHER)):
        if kind == "jsd":  # of which the mixture is rounded
            np.testing.assert_allclose(value, 0.0, atol=1e-6)
        else:
            np.testing.assert_array_equal(value, 0.0)
    gradient = jax.grad(lambda s: lib.between(divergence, TEACHER, s).sum())(jnp.asarray(TEACHER))
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_the_teacher_gets_no_gradient():
    gradient = jax.grad(lambda t: lib.between(Divergence(), t, STUDENT).sum())(jnp.asarray(TEACHER))
    np.testing.assert_array_equal(gradient, 0.0)


def test_jsd_goes_over_into_both_kls():
    teacher, student = TEACHER / 4, STUDENT / 4  # near to each other, as the limit takes its time where they are not
    forward, reverse = (by_hand(Divergence(kind=kind), softmax(teacher), softmax(student)) for kind in KINDS[:2])
    for beta, expected in ((0.01, forward), (0.99, reverse)):
        found = lib.between(Divergence(kind="jsd", beta=beta), teacher, student) / min(beta, 1 - beta)
        np.testing.assert_allclose(found, expected, rtol=0.05)
    assert np.abs(forward / reverse - 1).max() > 0.1


def test_a_high_temperature_compares_logits():
    """Hinton et al. 2015, equation 4: T^2 times the gradient tends to (s - t) / V for logits of mean zero."""
    teacher, student = (x - x.mean(-1, keepdims=True) for x in (TEACHER, STUDENT))
    hot = Divergence(temperature=100.0)
    gradient = jax.grad(lambda s: lib.between(hot, teacher, s).sum())(jnp.asarray(student))
    np.testing.assert_allclose(gradient, (student - teacher) / VOCAB, atol=0.02)


def test_peaked_distributions_stay_finite():
    peaked = np.where(np.arange(VOCAB) == 3, 200.0, -200.0).astype(np.float32) * np.ones((1, 1, 1), np.float32)
    for kind in KINDS:
        divergence = Divergence(kind=kind)
        for student in (peaked, -peaked):
            value, gradient = jax.value_and_grad(lambda s: lib.between(divergence, peaked, s).sum())(student)  # noqa: B023
            assert np.isfinite(value) and np.isfinite(gradient).all(), kind
            value, gradient = jax.value_and_grad(lambda s: top_k_loss(divergence, 2, s, peaked).sum())(student)  # noqa: B023
            assert np.isfinite(value) and np.isfinite(gradient).all(), kind


def test_bad_input_is_refused():
    for changes, message in (
        (dict(temperature=0.0), "temperature=0.0: expected above 0"),
        (dict(beta=1.0), "beta=1.0: expected above 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Divergence(**changes)
    with pytest.raises(ValueError, match="top_k=11: expected above 0 and below the vocabulary's 11"):
        lib.top_k(Divergence(), TEACHER, VOCAB)
