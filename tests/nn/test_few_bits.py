"""Products with kernels in few bits on one CPU device, beside those of the kernel's values."""

import functools
import itertools
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.kernels.native import build
from gptjax.kernels.native import few_bits as native
from gptjax.nn import few_bits, quantized
from gptjax.nn.formats import WeightFormat
from gptjax.nn.quantized import Layout
from gptjax.parallel.mesh import MeshConfig, make_mesh, portable

FORMATS = [
    WeightFormat(dtype=f"int{bits}", group_size=group, symmetric=symmetric)
    for bits, group, symmetric in itertools.product((2, 3, 4, 5, 6, 8), (None, 32, 96), (True, False))
]
KIND = native.Kind("int8", 96, None)
needs_library = pytest.mark.skipif(not native.is_available(KIND), reason="no C++ compiler")


def leaf_of(format, num_inputs, num_outputs, *, activations="none", seed=0):
    kernel = np.random.default_rng(seed).normal(size=(num_inputs, *num_outputs)).astype(np.float32)
    kernel[:, ..., 0] = 0  # a row whose scale is 0
    layout = Layout((num_inputs,), num_outputs)
    return quantized.quantize(jnp.asarray(kernel), format=format, layout=layout, activations=activations)


def inputs(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def by_hand(x, leaf):
    """In float64, from the definition of a code's value and of rounded inputs."""
    w = np.asarray(quantized.dequantize(leaf), np.float64)
    x = np.asarray(x, np.float64)
    if leaf.activations == "int8":
        scale = np.abs(x).max(-1, keepdims=True) / 127
        x = np.round(x / np.where(scale == 0, 1, scale)) * scale
    return np.tensordot(x, w, 1)


def assert_close(got, wanted):
    assert np.abs(np.asarray(got) - wanted).max() <= 3e-6 * max(1e-3, np.abs(wanted).max())


@needs_library
@pytest.mark.parametrize("activations", ["none", "int8"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_products_of_any_format(format, activations):
    leaf = leaf_of(format, 192, (3, 7), activations=activations)
    for num_rows in (1, 2, 5, 11):
        x = inputs(1, num_rows, 192).at[0, 0, :].multiply(0 if num_rows == 5 else 1)
        assert few_bits._is_native(leaf)
        assert_close(few_bits._native("BTD,DNH->BTNH", x, leaf), by_hand(x, leaf))


@needs_library
@pytest.mark.parametrize("activations", ["none", "int8"])
@pytest.mark.parametrize("sizes", [(1, 13, 5), (3, 200, 33), (9, 320, 1030), (40, 256, 1000), (2, 4096, 600)])
def test_products_of_any_size(sizes, activations):
    num_rows, num_inputs, num_outputs = sizes  # the larger ones in several threads
    for symmetric in (True, False):
        format = WeightFormat(dtype="int8", symmetric=symmetric)
        leaf = leaf_of(format, num_inputs, (num_outputs,), activations=activations)
        x = inputs(num_rows, num_inputs)
        assert_close(few_bits._native("BD,DF->BF", x, leaf), by_hand(x, leaf))
        assert_close(few_bits.einsum("BD,DF->BF", x, leaf), by_hand(x, leaf))


@needs_library
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_values_are_the_same_to_the_bit(format):
    leaf = leaf_of(format, 192, (4, 5))
    assert np.array_equal(few_bits._native_values(leaf), quantized.dequantize_rows(leaf))


@needs_library
@pytest.mark.parametrize("activations", ["none", "int8"])
def test_gradients_are_those_of_the_values(activations):
    leaf = leaf_of(WeightFormat(dtype="int4", group_size=32), 64, (6,), activations=activations)
    x, dy = inputs(3, 64), inputs(3, 6)
    dx, d_leaf = jax.vjp(functools.partial(few_bits._native, "BD,DF->BF"), x, leaf)[1](dy)
    assert_close(dx, np.asarray(dy) @ np.asarray(quantized.dequantize(leaf)).T)
    # y is linear in the scales.
    y = few_bits._native("BD,DF->BF", x, leaf)
    assert np.isclose(jnp.sum(d_leaf.scale.astype(jnp.float32) * leaf.scale), jnp.sum(y * dy), rtol=1e-2)


@needs_library
def test_in_loops_with_donated_buffers_and_under_vmap():
    leaf = leaf_of(WeightFormat(dtype="int4", group_size=32), 64, (64,))

    def step(x):
        return jnp.tanh(few_bits.einsum("BD,DF->BF", x, leaf))

    wanted = inputs(2, 64)
    for _ in range(5):
        wanted = jnp.tanh(jnp.asarray(by_hand(wanted, leaf), jnp.float32))
    looped = jax.jit(lambda x: jax.lax.while_loop(lambda s: s[0] < 5, lambda s: (s[0] + 1, step(s[1])), (0, x))[1])
    assert np.abs(looped(inputs(2, 64)) - wanted).max() < 1e-4
    scanned = jax.jit(lambda x: jax.lax.scan(lambda x, _: (step(x), None), x, length=5)[0], donate_argnums=0)
    assert np.abs(scanned(inputs(2, 64)) - wanted).max() < 1e-4
    many = jax.vmap(functools.partial(few_bits.einsum, "BD,DF->BF"), in_axes=(0, None))(inputs(3, 2, 64), leaf)
    assert_close(many, by_hand(inputs(3, 2, 64), leaf))


@needs_library
def test_kernels_that_lie_on_many_devices_without_a_mesh_in_use():
    leaf = leaf_of(WeightFormat(dtype="int8", group_size=32), 64, (16,))
    mesh = jax.make_mesh((8,), ("rows",))
    spread = jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("rows")))
    x = jax.device_put(inputs(2, 64), NamedSharding(mesh, PartitionSpec()))
    y = jax.jit(functools.partial(few_bits.einsum, "BD,DF->BF"))(x, spread)
    assert_close(y, by_hand(inputs(2, 64), leaf))


def test_over_a_mesh_and_in_portable_programs_products_are_xlas():
    leaf = leaf_of(WeightFormat(dtype="int8"), 64, (8,))
    x = inputs(2, 64)

    def lowered():
        # A new function each time: what was traced in another context must not be used again.
        return jax.jit(lambda x, leaf: few_bits.einsum("BD,DF->BF", x, leaf)).lower(x, leaf).as_text()

    with jax.set_mesh(make_mesh(MeshConfig(data=-1, fsdp=1, expert=1, context=1, tensor=1))):
        assert "gptjax_few_bits" not in lowered()
    with portable("any"):
        assert "gptjax_few_bits" not in lowered()
    assert ("gptjax_few_bits" in lowered()) == native.is_available(KIND)


def test_without_a_library_products_are_xlas_and_one_line_says_so(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda message, *rest: lines.append(message % rest))

    def unavailable(*_):
        raise build.Unavailable("for a test")

    monkeypatch.setattr(build, "library", unavailable)
    native._register.cache_clear()
    try:
        leaf = leaf_of(WeightFormat(dtype="int8"), 64, (8,), activations="int8")
        for num_rows in (2, 3):
            x = inputs(num_rows, 64)
            assert_close(few_bits.einsum("BD,DF->BF", x, leaf), by_hand(x, leaf))
    finally:
        native._register.cache_clear()
    assert len(lines) == 1 and lines[0].endswith("faster ones: for a test.")


@needs_library
@pytest.mark.parametrize("flags", ["-DGPTJAX_PLAIN", "-mno-avx512f"])
def test_processors_with_fewer_instructions(flags):
    """The same source for other processors; in a process of its own, since handlers cannot be taken back."""
    if flags != "-DGPTJAX_PLAIN" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("instructions of x86")
    code = (
        "import sys; from gptjax.kernels.native import build\n"
        "build._FLAGS = (*build._FLAGS, '-O1'); march = build._for_this_processor()\n"
        f"build._FLAGS = (*build._FLAGS, march, {flags!r}); build._for_this_processor = lambda: {flags!r}\n"
        "from tests.nn import test_few_bits as tests\n"
        "for format in tests.FORMATS:\n"
        "    for activations in ('none', 'int8'): tests.test_products_of_any_format(format, activations)\n"
        "    tests.test_values_are_the_same_to_the_bit(format)\n"
        "for activations in ('none', 'int8'): tests.test_products_of_any_size((9, 320, 1030), activations)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
