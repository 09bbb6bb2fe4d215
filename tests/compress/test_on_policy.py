"""Rows that the student writes: whose they are, where they go, and what is learnt of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.compress import distill, on_policy
from gptjax.compress.distill import DistillConfig
from gptjax.data.loader import TrainData
from gptjax.infer.generate import GenerateConfig, generate
from gptjax.infer.sampling import SamplingConfig
from gptjax.nn.formats import KernelRule, QuantConfig, WeightFormat
from gptjax.parallel import mesh as mesh_lib
from gptjax.train.state import TrainState
from tests.tiny import random_params
from tests.train.conftest import data_dir, run_config  # noqa: F401  # fixtures

BATCH, LENGTH, STEPS, PROMPT = 8, 16, 3, 5
MESH = dict(data=1, fsdp=1, expert=1, context=1, tensor=1)


@pytest.fixture(params=[None, "rounded in training"], scope="module")
def student(request, data_dir):  # noqa: F811
    model = run_config.__wrapped__(data_dir)().model.build()
    if request.param is None:
        return model
    rule = KernelRule(pattern="group_", weights=WeightFormat(dtype="int4", group_size=8))
    return dataclasses.replace(model, quant=QuantConfig(rules=(rule,), stage="train"))


def writing(model, **changes):
    values = dict(student=model, batch_size=BATCH, num_parts=1, seq_len=LENGTH, fraction=0.75, num_steps=STEPS,
                  prompt_tokens=PROMPT, vocab_size=250, eos_ids=tuple(range(30)), seed=4)  # fmt: skip
    return on_policy.Writing(**(values | changes))


def written(model, data, step=3, **changes):
    plan = writing(model, **changes)
    params = random_params(model, scale=0.1)
    state = TrainState(step=jnp.int32(step), params=params, opt_state=(), extra={"other": 1})
    with mesh_lib.use(mesh_lib.MeshConfig(**MESH)):
        after = on_policy.renew(plan, data, step, state)
        assert on_policy.renew(plan, data, step + 1, state) is state, "until these are used up"
    assert after.params is params and after.extra["other"] == 1
    return plan, params, after.extra


@pytest.fixture(scope="module")
def data(data_dir):  # noqa: F811
    cfg = run_config.__wrapped__(data_dir)()
    return TrainData(cfg.data, seq_len=LENGTH, seed=1)


def test_they_are_what_generating_gives_after_the_beginnings_of_the_data_s_rows(student, data):
    plan, params, extra = written(student, data)
    rows = jax.tree.map(np.asarray, extra[on_policy.NAME])
    own = [row for row in range(BATCH) if plan.is_own(row)]
    assert own == [0, 1, 2, 4, 5, 6] and plan.num_rows == 6
    prompts = []
    for row in own:
        for step in range(3, 3 + STEPS):
            batch = data[step]
            length = min(PROMPT, int((batch.segment_ids[row] == 1).sum()))
            prompts.append(batch.tokens[row, :length].tolist())
    assert len({len(prompt) for prompt in prompts}) > 1, "some documents end early"
    config = GenerateConfig(
        max_new_tokens=LENGTH + 1 - PROMPT, sampling=SamplingConfig(temperature=1.0), eos_ids=plan.eos_ids,
        vocab_size=plan.vocab_size, seed=on_policy.draw_seed(plan.seed, 3),
    )  # fmt: skip
    expected = generate(student, params, prompts=prompts, config=config)
    assert {completion.finish_reason for completion in expected} == {"eos", "length"}
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)
    for i, (prompt, completion) in enumerate(zip(prompts, expected, strict=True)):
        whole = prompt + list(completion.tokens)
        assert flat.tokens[i, : flat.length[i]].tolist() == whole and not flat.tokens[i, flat.length[i] :].any()
        assert flat.prompt[i] == len(prompt)


def test_a_step_reads_them_in_the_places_of_the_rows_that_they_begin_with(student, data):
    plan, _, extra = written(student, data)
    rows, batch = extra[on_policy.NAME], data[4]
    mixed = jax.jit(on_policy.carried(plan).mix_fn)(batch, extra, jnp.int32(4))
    for row, index in zip((0, 1, 2, 4, 5, 6), range(6), strict=True):
        tokens, prompt, length = (np.asarray(leaf)[index, 1] for leaf in (rows.tokens, rows.prompt, rows.length))
        np.testing.assert_array_equal(mixed.tokens[row], tokens[:-1])
        np.testing.assert_array_equal(mixed.targets[row], tokens[1:])
        np.testing.assert_array_equal(mixed.tokens[row, :prompt], batch.tokens[row, :prompt])
        places = np.arange(LENGTH)
        np.testing.assert_array_equal(mixed.loss_mask[row], places < length - 1)
        np.testing.assert_array_equal(mixed.segment_ids[row], places < length - 1)
        np.testing.assert_array_equal(mixed.positions[row], places)
        np.testing.assert_array_equal(mixed.notes.written_BT[row], (places >= prompt - 1) & (places < length - 1))
    for name in ("tokens", "targets", "loss_mask", "segment_ids", "positions"):
        for row in (3, 7):
            np.testing.assert_array_equal(getattr(mixed, name)[row], getattr(batch, name)[row])
    assert not mixed.notes.written_BT[3].any()


def test_a_student_that_is_its_teacher_has_nothing_to_learn_of_what_it_wrote(student, data):
    plan, params, extra = written(student, data)
    mixed = on_policy.carried(plan).mix_fn(data[4], extra, jnp.int32(4))
    objective = jax.jit(distill.objective(student, student, DistillConfig(weight=0.0)))
    loss = objective(params, params, mixed, None, None)
    assert abs(loss.metrics["distill_loss_alone"].value) < 1e-5
    # The data's loss is that of the data's own targets, prompts among them.
    data_mask = mixed.loss_mask * (1 - mixed.notes.written_BT)
    kept = dataclasses.replace(mixed, loss_mask=data_mask, notes=())
    alone = objective(params, params, kept, None, None)
    np.testing.assert_allclose(loss.total, alone.total, rtol=1e-5)
    np.testing.assert_allclose(loss.metrics["loss"].value, alone.metrics["loss"].value, rtol=1e-5)
    assert loss.weight == mixed.loss_mask.sum() and loss.metrics["loss"].count == data_mask.sum()


def test_what_cannot_be_written_is_refused(student):
    for changes, message in (
        (dict(fraction=0.3), r"on_policy=0.3 of data.batch_size=8 is 2.4 rows.*such as on_policy=0.375"),
        (dict(fraction=0.25, num_parts=4), r"is 2 rows; expected a multiple of 4.*such as on_policy=0.5"),
        (dict(prompt_tokens=16), "on_policy_prompt=16: leaves nothing to write"),
    ):
        with pytest.raises(ValueError, match=message):
            writing(student, **changes)
    with pytest.raises(ValueError, match="on_policy=1.5: expected 0 to 1"):
        DistillConfig(on_policy=1.5)
    with pytest.raises(ValueError, match="what the student writes is in no cache; set on_policy=0"):
        DistillConfig(on_policy=0.5, cache="x", top_k=3)
