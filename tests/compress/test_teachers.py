"""Who can teach whom: imported models, models in few bits, students with zeros; and that no teacher changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import CheckpointStore, restore_params
from gptjax.compress import distill, on_policy, prune
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.interop import exporting, importing
from gptjax.interop.exporting import Options
from gptjax.nn import transformer
from gptjax.nn.formats import KernelRule, QuantConfig, WeightFormat
from gptjax.optim import sparsity
from gptjax.parallel import mesh as mesh_lib
from gptjax.train import setup as setup_lib
from gptjax.train import state as state_lib
from gptjax.train import step as step_lib
from gptjax.train.metrics import read_metrics
from gptjax.train.run import run
from gptjax.types import Batch
from tests.nn import zoo
from tests.tiny import random_params
from tests.train.conftest import data_dir, run_config  # noqa: F401  # fixtures

SHARDED = dict(data=2, fsdp=2, expert=1, context=1, tensor=2)
SHORT = {"train__num_steps": 3}
EVERYTHING = dict(hidden_weight=0.1, attention_weight=0.1, on_policy=0.5, on_policy_steps=2, on_policy_prompt=4)


def saved(path, cfg, *, params=None, tokenizer=None):
    """A checkpoint of a byte-level model."""
    tokenizer = tokenizer or tokenizer_lib.byte_level()
    meta = meta_lib.make(cfg, tokenizer=tokenizer.fingerprint)
    params = random_params(cfg, scale=0.1) if params is None else params
    with CheckpointStore(path) as store:
        store.save(1, meta=meta, params=params, assets={tokenizer_lib.FILE_NAME: tokenizer.to_bytes()})
    return path


@pytest.fixture
def make(run_config):  # noqa: F811
    def make(teacher, changes=None, **distill_keys):
        values = config_lib.to_dict(run_config(**(changes or {})))
        values["distill"] = dict(teacher=str(teacher)) | distill_keys
        return config_lib.from_dict(distill.DistillRun, values)

    return make


def teach(cfg, path):
    return run(cfg, path, task_fn=distill.task)


def losses(path):
    names = ("loss", "distill_loss", "distill_loss_alone", "hidden_loss", "attention_loss")
    return [[line[name] for name in names if name in line] for line in read_metrics(path) if "loss" in line]


def test_an_imported_model_of_another_family_teaches(make, tmp_path, run_config, caplog):  # noqa: F811
    ours = saved(tmp_path / "ours", run_config(model__num_heads=4, model__num_kv_heads=2).model.build())
    exporting.export(ours, tmp_path / "hf", format="hf", options=Options())
    assert importing.import_model(tmp_path / "hf", tmp_path / "llama").accepted
    student = dict(model__position="learned", model__norm="layernorm", model__activation="gelu_tanh",
                   model__bias=True, model__num_layers=3, model__vocab_size=384)  # fmt: skip
    cfg = make(tmp_path / "llama", student, **(EVERYTHING | dict(weight=1.0, hidden_weight=1.0)))
    with caplog.at_level("INFO"):
        assert teach(cfg, tmp_path / "student")["outcome"] == "finished"
    first, *_, last = losses(tmp_path / "student")
    assert len(first) == 5 and last[3] < first[3], "hidden states come nearer"
    table = next(record.message for record in caplog.records if record.message.startswith("distillation\n"))
    names = [line.split("  ")[0] for line in table.splitlines()[1:]]
    assert names == ["teacher", "student", "data", "forward_kl", "hidden states", "attention", "on policy"]
    assert "3 layers, 12,288 parameters" in table and "layers 1 of 1, 2 of 1, 3 of 1" in table


def test_teachers_in_few_bits_and_students_of_every_kind_on_any_mesh(make, tmp_path):
    rule = KernelRule(pattern="group_", weights=WeightFormat(dtype="int8"))
    floats = zoo.build("dense", vocab_size=260)
    params = random_params(floats, scale=0.1)
    teacher = dataclasses.replace(floats, quant=QuantConfig(rules=(rule,)))
    few = saved(tmp_path / "few", teacher, params=transformer.store(teacher, params))
    for name, changes in (("one", {}), ("many", {"mesh": SHARDED, "train__accumulate_steps": 2})):
        teach(make(few, changes | SHORT, **EVERYTHING), tmp_path / name)
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=2e-3)


def test_zeros_of_a_student_stay_exactly(make, tmp_path, run_config):  # noqa: F811
    model = run_config().model.build()
    params = random_params(model, scale=0.1)
    cfg, pruned = prune.prune(model, params, [], method="magnitude", sparsity=sparsity.parse("2:4"))
    start = saved(tmp_path / "pruned", cfg, params=pruned)
    changes = {"train__init_from": str(start), "optim__zeros": "kept"} | SHORT
    teach(make(saved(tmp_path / "teacher", model), changes, **EVERYTHING), tmp_path / "student")
    after = restore_params(tmp_path / "student")[1]
    before, after = (jax.tree.map(np.asarray, dict(tree)) for tree in (pruned, after))
    up = lambda tree: tree["group_0"]["block_0"]["mlp"]["up"]["kernel"]  # noqa: E731
    assert (up(before) == 0).mean() == 0.5
    np.testing.assert_array_equal(up(after) == 0, up(before) == 0)
    assert not np.array_equal(up(after), up(before))


def test_a_teacher_with_other_tokens_is_refused_whatever_its_size(make, tmp_path, run_config):  # noqa: F811
    text = "".join(map(chr, range(32, 32 + 250)))
    other = tokenizer_lib.characters(text)
    model = dataclasses.replace(run_config().model.build(), vocab_size=260)
    path = saved(tmp_path / "other", model, tokenizer=other)
    with pytest.raises(ValueError, match=f"its tokens are of tokenizer {other.fingerprint[:12]}, the student's of"):
        teach(make(path), tmp_path / "student")
    assert not (tmp_path / "student" / "ckpt").exists()


def test_a_teacher_is_neither_given_back_nor_differentiated_nor_taken_over(make, tmp_path):
    path = saved(tmp_path / "teacher", zoo.build("dense", vocab_size=260, d_ff=40))
    cfg = make(path, weight=0.9)
    with mesh_lib.use(cfg.mesh) as mesh:
        setup = setup_lib.make(cfg, mesh, tokenizer_lib.load(cfg.data.tokenizer), task_fn=distill.task)
        state = state_lib.create(
            lambda rng: dict(transformer.init(setup.model, rng)), setup.optimizer.tx, seed=0, shardings=setup.shardings
        )
        step_fn = step_lib.jit_train_step(setup.task.objective, setup.optimizer, state)
        teacher = restore_params(path)[1]
        ones = jnp.ones((8, 16), jnp.int32)
        batch = Batch(tokens=ones, targets=ones, loss_mask=ones.astype(jnp.float32), segment_ids=ones, positions=ones)
        lowered = step_fn.lower(state, teacher, batch)
    given = jax.tree.leaves(lowered.args_info[0][1])
    assert len(given) == len(jax.tree.leaves(teacher)) and not any(info.donated for info in given)
    assert all(info.donated for info in jax.tree.leaves(lowered.args_info[0][0]))
    after, metrics = lowered.out_info
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert all(leaf.shape == () for leaf in jax.tree.leaves(metrics))

    def total(frozen):
        return setup.task.objective(state.params, frozen, batch, None, None).total

    assert all(not np.any(leaf) for leaf in jax.tree.leaves(jax.grad(total)(teacher)))


def test_every_row_may_be_the_student_s_own(make, tmp_path):
    path = saved(tmp_path / "teacher", zoo.build("dense", vocab_size=260))
    teach(make(path, SHORT, on_policy=1.0, on_policy_steps=4, on_policy_prompt=3), tmp_path / "student")
    assert on_policy.NAME not in restore_params(tmp_path / "student")[1]
    # Only their prompts are data.
    line = read_metrics(tmp_path / "student")[0]
    assert line["distill_loss_alone"] > 0 and np.isfinite(line["loss"])
