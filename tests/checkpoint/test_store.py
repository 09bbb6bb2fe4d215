from __future__ import annotations

import dataclasses
import datetime

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from gptjax.checkpoint import arrays
from gptjax.checkpoint import store as store_lib
from gptjax.checkpoint.store import CheckpointStore, restore_params
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh
from tests.checkpoint import tiny

AXES = {
    "embed": {"tokens": ("vocab", "embed")},
    "group_0": {"block_0": {"mlp": {"up": {"kernel": ("layers", "embed", "mlp")}}}},
}


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path) as opened:
        yield opened


def mesh_of(**sizes):
    axes = dict(data=1, fsdp=1, expert=1, context=1, tensor=1) | sizes
    count = int(np.prod(list(axes.values())))
    return make_mesh(MeshConfig(**axes, rules="standard"), jax.devices()[:count])


def placed(mesh, tree, dtype):
    places = rules.tree_shardings(mesh, AXES, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), tree, places)


def test_a_state_comes_back_bit_for_bit(store):
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38], np.float32)
    params = tiny.params() | {
        "odd": jnp.asarray(np.append(odd, np.frombuffer(np.uint32(0x7FC12345).tobytes(), np.float32))),
        "half": jnp.asarray(odd, jnp.bfloat16),
        "codes": jnp.arange(256, dtype=jnp.uint8),
        "ints": jnp.asarray([-(2**31), 2**31 - 1], jnp.int32),
        "small": jnp.arange(-8, 8, dtype=jnp.int8),
        "flags": jnp.asarray([True, False]),
        "scalar": jnp.float32(0.1),
    }
    opt_state, extra = tiny.opt_state(tiny.params()), {"teacher": {"scale": jnp.ones(3)}}
    store.save(
        5, meta=tiny.meta(), params=params, opt_state=opt_state, extra=extra,
        data={"row": 12}, assets={"tokenizer.model": b"\x00\xff"}, score=1.5,
    )  # fmt: skip
    store.wait()
    items = {path.name for path in (store.directory / "5").iterdir() if path.is_dir()}
    assert items == {"params", "opt_state", "extra", "data", "meta", "assets"}
    found = store.restore(
        5, params=tiny.abstract(params), opt_state=tiny.abstract(opt_state), extra=tiny.abstract(extra)
    )
    tiny.assert_same_bits(found.params, params)
    tiny.assert_same_bits(found.opt_state, opt_state)
    tiny.assert_same_bits(found.extra, extra)
    assert found.data == {"row": 12}
    assert found.assets == {"tokenizer.model": b"\x00\xff"}
    assert (found.meta.step, found.meta.score, found.meta.model) == (5, 1.5, tiny.model())


def test_a_checkpoint_tells_when_it_was_saved_not_when_its_run_began(store):
    old = dataclasses.replace(tiny.meta(), created="2001-02-03T04:05:06+00:00")
    store.save(1, meta=old, params=tiny.params())
    store.wait()
    saved = datetime.datetime.fromisoformat(store_lib.read_meta(store.directory / "1").created)
    assert datetime.datetime.now(datetime.UTC) - saved < datetime.timedelta(minutes=10)


def test_the_arrays_may_be_donated_while_they_are_written(store):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2.0 + 1.0, tree), donate_argnums=0)
    live = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(512, 1024)), jnp.float32)}
    expected = {"w": np.array(live["w"])}
    store.save(1, meta=tiny.meta(), params=live)
    for _ in range(20):
        live = step(live)
    store.wait()
    _, found = restore_params(store.directory.parent)
    np.testing.assert_array_equal(found["w"], expected["w"])


def test_saved_on_one_mesh_and_restored_on_another_in_another_dtype(store):
    params = tiny.params()
    wide = mesh_of(fsdp=4, tensor=2)
    sharded = jax.device_put(params, rules.tree_shardings(wide, AXES, params))
    store.save(1, meta=tiny.meta(), params=sharded)
    store.wait()
    narrow = mesh_of(tensor=2)
    found = store.restore(1, params=placed(narrow, params, jnp.bfloat16)).params
    tiny.assert_same_bits(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    kernel = found["group_0"]["block_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.device_set == set(jax.devices()[:2])
    assert kernel.addressable_shards[0].data.shape == (2, 8, 16)


def test_parameters_alone_from_a_workdir_its_ckpt_or_a_checkpoint(tmp_path, store):
    params = tiny.params(2)
    codes = {"codes": jnp.arange(4, dtype=jnp.uint8)}
    store.save(1, meta=tiny.meta(), params=tiny.params(1))
    store.save(2, meta=tiny.meta(), params=params | codes, opt_state=tiny.opt_state(params))
    store.wait()
    for path in (tmp_path, str(tmp_path / "ckpt"), tmp_path / "ckpt" / "2"):
        meta, found = restore_params(path, dtype=jnp.bfloat16)
        assert meta.step == 2
        tiny.assert_same_bits(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params) | codes)
    places = rules.tree_shardings(mesh_of(fsdp=2), AXES | {"codes": (None,)}, params | codes)
    _, found = restore_params(tmp_path, shardings=places)
    assert found["embed"]["tokens"].sharding.device_set == set(jax.devices()[:2])
    _, found = restore_params(tmp_path, shardings=rules.replicated(mesh_of(fsdp=8)))
    tiny.assert_same_bits(found, params | codes)


def test_the_step_count_of_an_empty_workdir(store):
    assert store.latest() is None
    assert store.steps() == []
    with pytest.raises(ValueError, match=r"ckpt/3: no such checkpoint; committed steps are \[\]"):
        store.restore(3, params={})


def test_a_saved_step_is_left_as_it_is(store):
    tiny.save(store, 4)
    store.wait()
    before = tiny.bytes_under(store.directory)
    tiny.save(store, 4, seed=99)
    store.wait()
    assert tiny.bytes_under(store.directory) == before


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (dict(keep_last=2), [5, 6]),
        (dict(keep_last=0), [1, 2, 3, 4, 5, 6]),
        (dict(keep_last=1, keep_every=3), [3, 6]),
        (dict(keep_last=1, keep_best=2), [2, 4, 6]),
        (dict(keep_last=1, keep_every=5, keep_best=1), [2, 5, 6]),
    ],
)
def test_keeps_what_the_policy_says(tmp_path, policy, kept):
    store = CheckpointStore(tmp_path, **policy)
    for step, score in enumerate([3.0, 1.0, 2.5, 2.0, None, 9.0], start=1):
        store.save(step, meta=tiny.meta(), params={"w": jnp.full((2,), step)}, score=score)
    store.close()
    assert store.steps() == kept


def test_the_older_checkpoint_stays_until_the_newer_is_committed(store):
    tiny.save(store, 1)
    tiny.save(store, 2)
    assert 1 in store.steps()
    store.wait()
    assert store.steps() == [2]


def test_a_shape_of_another_config_is_explained(store):
    params = tiny.params()
    store.save(300, meta=tiny.meta(), params=params)
    store.wait()
    with pytest.raises(ValueError) as error:
        store.restore(300, params=tiny.abstract(tiny.params(d_ff=64)), model=tiny.model(64))
    message = str(error.value)
    assert "group_0/block_0/mlp/up/kernel: expected [2, 8, 64] from the config, got [2, 8, 32] in " in message
    assert f"{store.directory / '300'}; checkpoint -> config: groups.0.pattern.0.mlp.d_ff: 32 -> 64" in message


def test_another_optimizers_state_is_refused(store):
    tiny.save(store, 1)
    store.wait()
    with pytest.raises(ValueError, match=r"opt_state/trace/embed/tokens: .* not there in .*ckpt/1 \(\d+ more differ\)"):
        store.restore(1, params=tiny.abstract(tiny.params()), opt_state={"trace": tiny.abstract(tiny.params())})


def test_a_workdir_may_have_a_number_for_a_name(tmp_path):
    with CheckpointStore(tmp_path / "7") as store:
        tiny.save(store, 1)
    meta, _ = restore_params(tmp_path / "7")
    assert meta.step == 1


def test_a_checkpoint_moved_elsewhere_reads_by_its_path(tmp_path, store):
    tiny.save(store, 3)
    store.close()
    moved = (tmp_path / "ckpt" / "3").rename(tmp_path / "best")
    meta, found = restore_params(moved)
    assert meta.step == 3
    tiny.assert_same_bits(found, tiny.params(3))


def test_a_removal_that_was_cut_short_is_no_damaged_checkpoint(tmp_path, store, monkeypatch):
    tiny.save(store, 1)
    tiny.save(store, 2)
    monkeypatch.setattr(type(store.directory), "rmtree", lambda self: None)
    store.wait()
    assert store.steps() == [2]
    monkeypatch.undo()
    CheckpointStore(tmp_path).close()
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["2"]


def test_a_place_without_checkpoints_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no checkpoint there; expected"):
        restore_params(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint there"):
        restore_params(tmp_path / "absent")


@pytest.mark.parametrize("name", ["a/b", "..", ""])
def test_assets_are_plain_files(store, name):
    with pytest.raises(ValueError, match="is not a plain file name"):
        store.save(1, meta=tiny.meta(), params=tiny.params(), assets={name: b""})


def test_assets_lie_as_files_and_read_alone(store):
    store.save(1, meta=tiny.meta(), params=tiny.params(), assets={"vocab.json": b"{}"})
    store.wait()
    assert (store.directory / "1" / "assets" / "vocab.json").read_bytes() == b"{}"
    assert store_lib.read_assets(store.directory / "1") == {"vocab.json": b"{}"}
    assert store_lib.read_meta(store.directory / "1").tokenizer == "ab12"


def test_a_large_stack_of_layers_is_stored_a_layer_apart(tmp_path, monkeypatch):
    """So that one layer can be read without memory for all."""
    monkeypatch.setattr(arrays, "_STACK_BYTES", 1000)
    params = {
        "group_0": {"w": jnp.arange(4.0 * 8 * 16).reshape(4, 8, 16), "scale": jnp.ones((4, 8))},
        "embed": jnp.ones((300, 8)),
    }
    directory = tmp_path / "run"
    with CheckpointStore(directory) as store:
        store.save(1, meta=tiny.meta(), params=params)
    path = directory / "ckpt" / "1" / "params"
    chunks = {
        name: tensorstore.open(
            {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}}, open=True
        )
        .result()
        .chunk_layout.read_chunk.shape
        for name in ("group_0.w", "group_0.scale", "embed")
    }
    assert chunks == {"group_0.w": (1, 8, 16), "group_0.scale": (4, 8), "embed": (300, 8)}
    assert jnp.array_equal(restore_params(directory)[1]["group_0"]["w"], params["group_0"]["w"])
