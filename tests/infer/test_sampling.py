"""Sampling stages against numpy re-implementations of transformers' logits processors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.infer import sampling
from gptjax.infer.sampling import SamplingConfig


def reference_scores(logits_V: np.ndarray, config: SamplingConfig, seen: list[int]) -> np.ndarray:
    """One row, token by token, as transformers' processors and warpers are written."""
    scores = logits_V.astype(np.float64).copy()
    for token in set(seen):
        scores[token] *= config.repetition_penalty if scores[token] < 0 else 1 / config.repetition_penalty
    scores = scores / config.temperature
    if config.top_k:
        scores[scores < np.sort(scores)[-min(config.top_k, len(scores))]] = -np.inf
    if config.top_p < 1:
        order = np.argsort(scores)
        cumulative = np.cumsum(softmax(scores)[order])
        remove = cumulative <= 1 - config.top_p
        remove[-1] = False
        scores[order[remove]] = -np.inf
    if config.min_p:
        probs = softmax(scores)
        scores[probs < config.min_p * probs.max()] = -np.inf
    return scores


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


CONFIGS = [
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.7, top_k=5),
    SamplingConfig(temperature=1.3, top_p=0.8),
    SamplingConfig(temperature=0.9, min_p=0.1),
    SamplingConfig(temperature=1.1, repetition_penalty=1.5),
    SamplingConfig(temperature=0.8, top_k=7, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    SamplingConfig(temperature=1.0, top_k=1000),
    SamplingConfig(temperature=2.0, top_k=1, top_p=0.01),
    SamplingConfig(temperature=0.5, repetition_penalty=0.8),
]


def our_scores(logits_BV, configs, seen_BV):
    rows = sampling.per_row(configs, vocab_size=logits_BV.shape[-1])
    scores = sampling.penalize_repetition(logits_BV, rows.repetition_penalty, seen_BV=seen_BV)
    return sampling.truncate(sampling.scale_temperature(scores, rows.temperature), rows)


def test_every_config_alone_and_all_together_equal_the_reference():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(CONFIGS), 50)).astype(np.float32) * 3
    seen = [rng.integers(0, 50, 6).tolist() for _ in CONFIGS]
    seen_BV = np.zeros(logits.shape, bool)
    for row, tokens in enumerate(seen):
        seen_BV[row, tokens] = True
    together = np.asarray(jax.jit(lambda logits, seen: our_scores(logits, CONFIGS, seen))(logits, seen_BV))
    for row, config in enumerate(CONFIGS):
        want = reference_scores(logits[row], config, seen[row])
        alone = np.asarray(our_scores(jnp.asarray(logits[row : row + 1]), [config], seen_BV[row : row + 1]))[0]
        for got in (together[row], alone):
            np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want), err_msg=str(config))
            kept = np.isfinite(want)
            np.testing.assert_allclose(got[kept], want[kept], rtol=1e-5, err_msg=str(config))


def test_order_of_stages_is_observable():
    logits = np.log(np.array([[0.6, 0.3, 0.1]], np.float32))

    def num_kept(**config):
        return int(np.isfinite(our_scores(logits, [SamplingConfig(**config)], np.zeros((1, 3), bool))).sum())

    # Temperature comes before top-p: a sharper distribution keeps fewer tokens.
    assert (num_kept(temperature=1.0, top_p=0.62), num_kept(temperature=0.5, top_p=0.62)) == (2, 1)
    # Top-k comes before top-p, whose probability is of the k tokens that are left.
    assert (num_kept(temperature=1.0, top_p=0.65), num_kept(temperature=1.0, top_p=0.65, top_k=2)) == (2, 1)


def test_ties_at_the_threshold_stay():
    logits = jnp.array([[1.0, 2.0, 2.0, 0.0]])
    got = sampling.keep_top_k_top_p(logits, jnp.array([1]), top_p_B=jnp.array([1.0]))
    np.testing.assert_array_equal(np.isfinite(got), [[False, True, True, False]])


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    rows = sampling.per_row([SamplingConfig(temperature=1.0, top_k=3)] * 4000, vocab_size=4)
    keys = jax.random.split(jax.random.key(0), 4000)
    tokens = sampling.sample(jnp.tile(logits, (4000, 1)), rows, keys_B=keys, seen_BV=None).token_B
    frequency = np.bincount(np.asarray(tokens), minlength=4) / 4000
    np.testing.assert_allclose(frequency, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_greedy_rows_stay_greedy_beside_drawing_ones_and_logprobs_are_of_the_raw_logits():
    logits = np.random.default_rng(1).normal(size=(6, 20)).astype(np.float32)
    configs = [SamplingConfig(), SamplingConfig(temperature=3.0)] * 3
    draw = sampling.sample(
        jnp.asarray(logits),
        sampling.per_row(configs, vocab_size=20),
        keys_B=jax.random.split(jax.random.key(3), 6),
        seen_BV=None,
    )
    np.testing.assert_array_equal(draw.token_B[::2], logits.argmax(-1)[::2])
    want = np.log(np.array([softmax(row.astype(np.float64)) for row in logits]))
    np.testing.assert_allclose(draw.logprob_B, want[np.arange(6), np.asarray(draw.token_B)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_only_tokens_of_the_tokenizer_are_chosen(temperature):
    logits = jnp.tile(jnp.arange(10.0), (200, 1))
    rows = sampling.per_row([SamplingConfig(temperature=temperature)] * 200, vocab_size=7)
    draw = sampling.sample(logits, rows, keys_B=jax.random.split(jax.random.key(0), 200), seen_BV=None)
    assert int(draw.token_B.max()) == 6 and np.isfinite(draw.logprob_B).all()


def test_new_values_do_not_recompile():
    traces = []

    @jax.jit
    def step(logits, rows, keys):
        traces.append(1)
        return sampling.sample(logits, rows, keys_B=keys, seen_BV=None).token_B

    keys = jax.random.split(jax.random.key(0), 2)
    for temperature, top_k in [(0.5, 3), (0.9, 4), (1.7, 8)]:
        config = SamplingConfig(temperature=temperature, top_k=top_k)
        step(jnp.zeros((2, 9)), sampling.per_row([config] * 2, vocab_size=9), keys)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "change",
    [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 2.0}, {"repetition_penalty": 0.0}],
)
def test_bad_values_are_named(change):
    (name,) = change
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(SamplingConfig(), **change)
