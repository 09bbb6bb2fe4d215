from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from gptjax.checkpoint import arrays
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh


def test_names_are_paths_whatever_the_containers():
    state = optax.adam(0.1).init({"a": {"b": jnp.zeros(2)}})
    assert list(arrays.flatten(state)) == ["0/count", "0/mu/a/b", "0/nu/a/b"]
    assert arrays.nest({"x/y": 1, "x/z": 2, "w": 3}) == {"x": {"y": 1, "z": 2}, "w": 3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "int8", "uint8", "bool"])
def test_any_changed_value_changes_the_checksum(dtype):
    values = np.arange(64).astype(np.dtype(dtype) if dtype in np.sctypeDict else getattr(ml_dtypes, dtype))
    before = arrays.checksums({"x": jnp.asarray(values)})
    raw = bytearray(values.tobytes())
    raw[-1] ^= 1
    changed = np.frombuffer(bytes(raw), values.dtype)
    assert arrays.checksums({"x": jnp.asarray(changed)}) != before


def test_checksums_by_hand():
    found = arrays.checksums({"f": jnp.asarray([1.0, -2.0], jnp.float32), "u": jnp.asarray([255, 2], jnp.uint8)})
    assert found == {"f": (0x3F800000 + 0xC0000000) % 2**32, "u": 257}


def test_checksums_do_not_depend_on_the_sharding():
    values = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, expert=1, context=1, tensor=2, rules="standard"))
    sharded = jax.device_put(values, rules.sharding(mesh, ("embed", "mlp"), values.shape))
    assert arrays.checksums({"x": sharded}) == arrays.checksums({"x": values})


def test_refuses_values_that_jax_would_change():
    with pytest.raises(ValueError, match="data/count: int64 would be saved as int32"):
        arrays.as_array("data/count", np.arange(3))


def test_mismatches_name_path_expected_and_got():
    def leaf(*shape, dtype=np.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    wanted = {"a": leaf(2), "b": leaf(3), "c": leaf(4, dtype=np.int32), "d": leaf(5), "e": leaf(6, dtype=jnp.bfloat16)}
    stored = {"b": leaf(7), "c": leaf(4), "d": leaf(5), "e": leaf(6), "f": leaf(8)}
    assert list(arrays.mismatches(wanted, stored)) == [
        "a: expected [2] from the config, not there",
        "b: expected [3] from the config, got [7]",
        "c: expected int32 from the config, got float32",
        "f: not in the config, got [8]",
    ]


def test_only_a_part_of_the_arrays_that_change_dtype_is_held_twice():
    stored = {f"w{i}": jax.ShapeDtypeStruct((1024,), np.float32) for i in range(32)}
    wanted = {path: jax.ShapeDtypeStruct((1024,), jnp.bfloat16) for path in stored} | {
        "w0": jax.ShapeDtypeStruct((1024,), np.float32)
    }
    batches = list(arrays._batches(stored, wanted))
    assert list(batches[0]) == ["w0"]
    assert sum(len(batch) for batch in batches) == 32
    assert max(len(batch) for batch in batches) <= 4
