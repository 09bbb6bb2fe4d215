"""Arrays with many zeros: smaller on disk, and the same to everyone who reads."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import arrays, meta, sparse, stream
from gptjax.checkpoint.store import CheckpointStore, restore_params
from gptjax.nn import quantized, transformer
from gptjax.nn.formats import KernelRule, QuantConfig, WeightFormat
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh
from tests.nn import zoo
from tests.tiny import random_params

CFG = zoo.build("moe", d_model=64, d_ff=132, num_layers=3, vocab_size=128)
# Large enough that what the files have besides arrays, some 30 kB, counts for little.
LARGER = zoo.build("dense", d_model=128, d_ff=2048, num_layers=4, vocab_size=64)
INT8 = QuantConfig(rules=(KernelRule(pattern="^(?!.*router)", weights=WeightFormat(dtype="int8")),))


def half_zero(params, fraction=0.5, seed=0):
    rng = np.random.default_rng(seed)

    def leaf(x):
        gone = np.argsort(rng.random(x.size)) < int(fraction * x.size)
        return np.where(gone.reshape(x.shape), 0, x).astype(x.dtype) if x.ndim > 1 else x

    return jax.tree.map(leaf, params)


def save(directory, cfg, params):
    with CheckpointStore(directory) as store:
        store.save(0, meta=meta.make(cfg), params=params)
    return pathlib.Path(directory) / "ckpt" / "0"


def stored_bytes(directory):
    return sum(file.stat().st_size for file in (directory / "params").rglob("*") if file.is_file())


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8, np.uint8])
def test_parts_make_the_array_again_to_the_bit(dtype):
    rng = np.random.default_rng(0)
    array = (rng.normal(size=(3, 5, 12)) * 20 * (rng.random((3, 5, 12)) < 0.4)).astype(dtype)
    if dtype not in (np.int8, np.uint8):
        array[0, 0, :3] = -0.0, np.nan, 1e-42
    packed = sparse.pack(array)
    assert packed.bitmap.shape == (3, 5, 2) and packed.values.ndim == 1
    assert sparse.unpack(packed).tobytes() == array.tobytes()
    with pytest.raises(ValueError, match="values for"):
        sparse.unpack(packed._replace(values=packed.values[1:]))


@pytest.mark.parametrize("dtype, bound", [(np.float32, 0.55), (jnp.bfloat16, 0.59)])
def test_half_of_the_weights_take_half_of_the_disk(tmp_path, dtype, bound):
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(LARGER))
    dense, thin = (save(tmp_path / name, LARGER, p) for name, p in (("d", params), ("s", half_zero(params))))
    assert stored_bytes(thin) < bound * stored_bytes(dense)
    same(restore_params(thin)[1], arrays.nest(arrays.flatten(half_zero(params))))
    assert arrays.stored_shapes(thin / "params").keys() == arrays.stored_shapes(dense / "params").keys()


def test_eight_bits_half_of_them_zero_take_65_percent(tmp_path):
    cfg = dataclasses.replace(LARGER, quant=INT8)
    params = random_params(LARGER)
    stored = {"d": transformer.store(cfg, params), "s": transformer.store(cfg, half_zero(params))}
    dense, thin = (save(tmp_path / name, cfg, of) for name, of in stored.items())
    assert stored_bytes(thin) <= 0.65 * stored_bytes(dense)
    again = restore_params(thin, dtype=jnp.bfloat16)[1]
    kernel = again["group_0"]["block_0"]["mlp"]["up"]["kernel"]
    assert quantized.is_quantized(kernel) and kernel.planes[0].dtype == jnp.int8
    same(kernel, stored["s"]["group_0"]["block_0"]["mlp"]["up"]["kernel"])


def test_dense_arrays_are_stored_as_before(tmp_path):
    files = arrays._files(save(tmp_path, CFG, random_params(CFG)) / "params")
    assert not sparse.bitmaps(files)


def test_it_comes_back_on_any_mesh_and_dtype(tmp_path):
    params = half_zero(random_params(CFG))
    path = save(tmp_path, CFG, params)
    assert sparse.bitmaps(arrays._files(path / "params"))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, context=1, tensor=2, rules="standard"))
    with jax.set_mesh(mesh):
        places = rules.tree_shardings(mesh, transformer.param_axes(CFG), transformer.abstract_params(CFG))
        found = restore_params(path, shardings=places, dtype=jnp.bfloat16)[1]
        assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding == place, found, places))
        with CheckpointStore(tmp_path / "again") as store:  # from eight devices
            store.save(0, meta=meta.make(CFG), params=jax.tree.map(jax.device_put, params, places))
        with CheckpointStore(tmp_path / "again") as store:
            shapes = transformer.abstract_params(CFG)
            wanted = jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), shapes, places)
            same(store.restore(0, params=wanted).params, params)
    same(found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_a_reader_of_slices_sees_the_array(tmp_path):
    params = half_zero(random_params(CFG))
    path = save(tmp_path, CFG, params)
    flat = arrays.flatten(params)
    for dims in (0, 1, 2):
        sliced = {name: min(dims, leaf.ndim - 1) for name, leaf in flat.items() if leaf.ndim > 1}
        reader = stream.ArraysReader(path / "params", sliced)
        for name, num in sliced.items():
            for index in np.ndindex(flat[name].shape[:num]):
                assert np.array_equal(reader.read(name, index), flat[name][index]), (name, index)


@pytest.mark.parametrize("part", ["places", "values"])
def test_a_damaged_part_is_noticed(tmp_path, part):
    path = save(tmp_path, CFG, half_zero(random_params(CFG)))
    file = path / "meta" / "metadata"
    found = json.loads(file.read_text())
    array, bitmap = next(iter(sparse.bitmaps(found["checksums"]).items()))
    name = bitmap if part == "places" else array
    found["checksums"][name] ^= 1
    file.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"params.*checksum"):
        restore_params(path)
