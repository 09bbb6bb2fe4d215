import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.nn import transformer
from gptjax.nn.config import MoEConfig
from gptjax.nn.spec import ModelSpec
from gptjax.train import objective as objectives
from gptjax.train import step as step_lib
from gptjax.types import Batch
from tests.train import toy

VOCAB = 48
MASK = 47


def model(**changes):
    sizes = dict(
        vocab_size=VOCAB, seq_len=16, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32,
        activation="swiglu", position="rope", rope_theta=1e4, tie_embeddings=True, dtype="float32", remat="none",
    )  # fmt: skip
    return ModelSpec(**(sizes | changes)).build()


def moe(**changes):
    sizes = dict(num_experts=4, num_experts_per_token=2, d_ff=16, activation="swiglu", balance_rate=0.1)
    return model(moe=MoEConfig(**(sizes | changes)))


@functools.lru_cache
def init(cfg):
    return jax.jit(lambda: transformer.init(cfg, jax.random.key(0)))()


def packed_batch(rows=4, length=16, seed=0) -> Batch:
    """Two documents and some padding in each row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MASK, (rows, length + 1)).astype(np.int32)
    segments, positions = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for row in range(rows):
        cut, end = 4 + row % 4, length - row % 3
        segments[row, :cut], segments[row, cut:end] = 1, 2
        positions[row, :cut], positions[row, cut:end] = np.arange(cut), np.arange(end - cut)
    mask = ((segments > 0) & (np.roll(segments, -1, axis=1) == segments)).astype(np.float32)
    mask[:, -1] = 0
    return Batch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], loss_mask=mask, segment_ids=segments, positions=positions
    )


def loss_of(objective, params, batch, seed=0):
    run = jax.jit(lambda p, b: objective(p, (), b, jax.random.key(seed), jnp.zeros((), jnp.int32)))
    return run(params, batch)


def gradient_of(objective, params, batch):
    def total(p, b):
        loss = objective(p, (), b, jax.random.key(0), jnp.zeros((), jnp.int32))
        return loss.total, loss.metrics

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params, batch)


def test_next_token_is_the_formula_over_all_logits():
    cfg, batch = model(), packed_batch()
    params = init(cfg)
    got = loss_of(objectives.next_token(cfg, z_loss=0.01), params, batch)

    def all_logits(p, b):
        out = transformer.forward(cfg, p, b.tokens, positions_BT=b.positions, segment_ids_BT=b.segment_ids)
        return transformer.logits(cfg, p, out.hidden_BTD)

    logits = jax.jit(all_logits)(params, batch)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    mask, weight = batch.loss_mask, batch.loss_mask.sum()
    np.testing.assert_allclose(got.total, (mask * (nll + 0.01 * log_z**2)).sum(), rtol=1e-5)
    np.testing.assert_allclose(got.weight, weight)
    np.testing.assert_allclose(got.metrics["loss"].value, (mask * nll).sum() / weight, rtol=1e-5)
    np.testing.assert_allclose(got.metrics["z_loss"].value, (mask * 0.01 * log_z**2).sum() / weight, rtol=1e-5)
    correct = (logits.argmax(-1) == batch.targets) * mask
    np.testing.assert_allclose(got.metrics["accuracy"].value, correct.sum() / weight, rtol=1e-6)
    assert set(got.metrics) == {"loss", "z_loss", "accuracy"}


def test_targets_outside_the_loss_mask_and_padding_change_nothing():
    cfg, batch = model(), packed_batch()
    params = init(cfg)
    objective = jax.jit(jax.value_and_grad(lambda p, b: loss_of(objectives.next_token(cfg), p, b).total))
    noise = packed_batch(seed=9)
    changed = dataclasses.replace(
        batch,
        targets=np.where(batch.loss_mask > 0, batch.targets, noise.targets),
        tokens=np.where(batch.segment_ids > 0, batch.tokens, noise.tokens),
    )
    assert (changed.targets != batch.targets).any() and (changed.tokens != batch.tokens).any()
    jax.tree.map(np.testing.assert_array_equal, objective(params, batch), objective(params, changed))
    other = dataclasses.replace(batch, targets=noise.targets)
    assert objective(params, other)[0] != objective(params, batch)[0]


def test_chunked_logits_give_the_same_loss(monkeypatch):
    cfg, batch = model(), packed_batch()
    params = init(cfg)
    whole = loss_of(objectives.next_token(cfg), params, batch)
    monkeypatch.setattr(objectives.cross_entropy, "pick_num_chunks", lambda **sizes: 4)
    np.testing.assert_allclose(loss_of(objectives.next_token(cfg), params, batch).total, whole.total, rtol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"moe": True}], ids=["dense", "moe"])
def test_accumulation_equals_the_large_batch_for_a_transformer(changes):
    cfg = moe(z_loss=0.01) if changes else model()
    params = init(cfg)
    optimizer = toy.guarded(optax.sgd(1.0), 1.0)
    state = step_lib.TrainState(jnp.zeros((), jnp.int32), params, optimizer.tx.init(params), {})
    batch, results = packed_batch(rows=8), []
    for num in (1, 4):
        run = jax.jit(step_lib.train_step(objectives.next_token(cfg, z_loss=1e-3), optimizer, accumulate_steps=num))
        results.append(run(state, (), batch))
    (whole_state, whole), (parts_state, parts) = results
    update = jax.tree.map(jnp.subtract, whole_state.params, params)
    error = jax.tree.map(jnp.subtract, whole_state.params, parts_state.params)
    # 9e-7 was measured: float32 sums in another order, added to parameters that are rounded themselves.
    assert optax.tree.norm(error) <= 3e-6 * optax.tree.norm(update)
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(error)) <= 2e-6
    for name in whole:
        np.testing.assert_allclose(
            whole[name].total / whole[name].count, parts[name].total / parts[name].count, rtol=2e-6, err_msg=name
        )


@pytest.mark.parametrize("changes", [{"balancing": "aux_loss"}, {"balancing": "none", "z_loss": 0.1}], ids=str)
def test_every_auxiliary_loss_is_positive_and_reaches_its_router(changes):
    cfg, batch = moe(**changes), packed_batch()

    def auxiliary(p, b):
        loss = objectives.next_token(cfg)(p, (), b, jax.random.key(0), jnp.zeros((), jnp.int32))
        return loss.total - loss.metrics["loss"].total, loss.metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(auxiliary, has_aux=True))(init(cfg), batch)
    assert value > 1e-2
    np.testing.assert_allclose(metrics["router_loss"].total, value, rtol=1e-3)
    for layer in range(2):  # a loss lost under the scan would reach one layer, or none
        assert jnp.abs(gradient["group_0"]["block_0"]["moe"]["router"]["kernel"][layer]).max() > 1e-6


def test_the_balance_bias_gets_the_load_violation():
    cfg, batch = moe(balancing="bias"), packed_batch()
    params = init(cfg)
    (_, metrics), gradient = gradient_of(objectives.next_token(cfg), params, batch)
    bias_LE = gradient["group_0"]["block_0"]["moe"]["balance_bias"]
    load = metrics["router_load/group_0/block_0"]
    share_LE = load.total / load.count
    np.testing.assert_allclose(share_LE.sum(-1), 4.0, rtol=1e-6)
    np.testing.assert_allclose(bias_LE, (share_LE - 1.0) * load.count / 4, atol=1e-3)
    assert jnp.abs(bias_LE).max() > 0


def test_router_metrics_of_an_untrained_router():
    cfg, batch = moe(), packed_batch()
    metrics = loss_of(objectives.next_token(cfg), init(cfg), batch).metrics
    assert 0.5 * np.log(4) < float(metrics["router_entropy"].value) <= np.log(4) + 1e-6
    assert float(metrics["router_dropped"].value) == 0.0
    assert metrics["router_load/group_0/block_0"].total.shape == (2, 4)


def test_masked_tokens_follow_15_percent_80_10_10():
    tokens = jnp.tile(jnp.arange(40, dtype=jnp.int32), (100, 50))
    allowed = jnp.arange(tokens.shape[1]) % 4 > 0
    mask_tokens = jax.jit(functools.partial(objectives.mask_tokens, mask_id=MASK, vocab_size=40))
    read, chosen = mask_tokens(jax.random.key(0), tokens, jnp.broadcast_to(allowed, tokens.shape))
    chosen_at = np.asarray(chosen) > 0
    num_allowed = allowed.sum() * tokens.shape[0]
    assert not chosen_at[:, ~allowed].any()
    # 150,000 positions allowed: four standard deviations are 0.0037 and, of the 22,500 chosen, 0.011.
    assert abs(chosen_at.sum() / num_allowed - 0.15) < 0.0037
    masked, same = (read == MASK)[chosen_at].mean(), (read == tokens)[chosen_at].mean()
    assert abs(masked - 0.8) < 0.011
    assert abs(same - (0.1 + 0.1 / 40)) < 0.009
    np.testing.assert_array_equal(np.asarray(read)[~chosen_at], np.asarray(tokens)[~chosen_at])
    others = np.asarray(read)[chosen_at & np.asarray((read != tokens) & (read != MASK))]
    assert np.bincount(others, minlength=40).min() > 0 and others.max() < 40


def masked(cfg=None, **changes):
    cfg = cfg or objectives.bidirectional(model())
    return cfg, objectives.masked_lm(cfg, **(dict(mask_id=MASK, vocab_size=MASK) | changes))


def test_masked_lm_counts_the_hidden_positions_alone():
    cfg, objective = masked()
    params = init(cfg)
    batch = packed_batch(rows=16)
    loss = loss_of(objective, params, batch)
    _, hidden = objectives.mask_tokens(
        jax.random.key(0), batch.tokens, batch.segment_ids > 0, mask_id=MASK, vocab_size=MASK
    )
    assert 0 < loss.weight == hidden.sum() < (batch.segment_ids > 0).sum() / 3
    shifted = dataclasses.replace(batch, targets=np.zeros_like(batch.targets), loss_mask=np.zeros_like(batch.loss_mask))
    assert loss_of(objective, params, shifted).total == loss.total
    assert loss_of(objective, params, batch, seed=1).total != loss.total


def test_masked_lm_never_hides_special_tokens():
    cfg, objective = masked(special_ids=range(VOCAB))
    batch = packed_batch()
    assert loss_of(objective, init(cfg), batch).weight == 0


def test_masked_lm_looks_both_ways_and_within_the_document():
    cfg, objective = masked()
    params = init(cfg)
    batch, rng = packed_batch(rows=1), jax.random.key(3)
    read, hidden = objectives.mask_tokens(rng, batch.tokens, batch.segment_ids > 0, mask_id=MASK, vocab_size=MASK)
    assert hidden[0].sum() > 0

    def hidden_states(embeddings, b):
        p = {**params, "embed": {**params["embed"], "tokens": embeddings}}
        tokens = jnp.arange(16)[None]
        out = transformer.forward(cfg, p, tokens, positions_BT=b.positions, segment_ids_BT=b.segment_ids)
        return out.hidden_BTD[0, 2].sum()

    # Each position reads its own row of the table, so the gradient's rows are the positions it sees.
    gradient = jax.jit(jax.grad(hidden_states))(params["embed"]["tokens"], batch)
    sees = jnp.abs(gradient[:16]).sum(-1) > 0
    np.testing.assert_array_equal(sees, batch.segment_ids[0] == 1)


def test_auxiliary_losses_are_as_strong_beside_a_target_where_few_tokens_are_targets():
    cfg, batch = moe(z_loss=0.01), packed_batch(rows=16)
    params, num_tokens = init(cfg), (batch.segment_ids > 0).sum()
    causal = loss_of(objectives.next_token(cfg), params, batch)
    loss = loss_of(masked(objectives.bidirectional(cfg))[1], params, batch)
    per_token = causal.metrics["router_loss"].total / num_tokens
    # Of the expected number of targets; hidden tokens and later ones that are seen change the routing a little.
    per_target = loss.metrics["router_loss"].total / (objectives.MASKED_FRACTION * num_tokens)
    np.testing.assert_allclose(per_target, per_token, rtol=0.1)
    np.testing.assert_allclose(loss.total - loss.metrics["loss"].total, loss.metrics["router_loss"].total, rtol=1e-4)


def test_next_token_refuses_a_model_that_sees_its_targets():
    with pytest.raises(ValueError, match="set causal=True"):
        objectives.next_token(objectives.bidirectional(model()))


def test_masked_lm_refuses_a_causal_model_and_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="set causal=False"):
        masked(model())
    with pytest.raises(ValueError, match="mask_id=48"):
        masked(mask_id=48)


def test_rows_longer_than_the_model_are_refused():
    cfg = model(seq_len=12)
    with pytest.raises(ValueError, match="rows of 16 tokens .* seq_len=12"):
        objectives.next_token(cfg)(init(cfg), (), packed_batch(), jax.random.key(0), jnp.zeros((), jnp.int32))
