"""Models in few bits by each method: what is treated, what it costs, and what is refused before any work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import restore_params
from gptjax.compress import quantize, saving
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.nn import quant_spec, quantized, transformer
from gptjax.nn.config import LayerGroup
from gptjax.nn.formats import WeightFormat
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh
from tests.compress.test_calibrate import batches
from tests.nn import zoo
from tests.tiny import random_params

INT4 = WeightFormat(dtype="int4", group_size=8, symmetric=False)
INT8 = WeightFormat(dtype="int8")
METHODS = quantize.METHODS


def hidden(cfg, params, tokens):
    return np.asarray(transformer.forward(cfg, params, tokens).hidden_BTD)


def run(cfg, params, name, *, weights=INT4, text=None, **options):
    method = METHODS[name]
    activations = "int8" if method.scaling == "smoothquant" else "none"
    quant = quant_spec.rules(weights, activations=activations, **options)
    text = batches(cfg, num=4, rows=4, length=16) if text is None else text
    return quantize.quantize(cfg, params, quant, method=method, batches=text if method.is_calibrated else ())


@pytest.mark.parametrize(
    ("name", "method"), [("dense", "rtn"), ("gpt2", "smoothquant"), ("moe", "awq"), ("moe", "gptq"), ("mla", "gptq")]
)
def test_every_kernel_is_stored_and_every_leaf_is_told(name, method):
    cfg = zoo.build(name)
    params = random_params(cfg)
    found = run(cfg, params, method, weights=INT8 if name == "mla" or method == "smoothquant" else INT4)
    told = {leaf.path: leaf for leaf in found.leaves}
    kernels = {path for path in transformer.layouts(cfg) if path.startswith("group_") and "router" not in path}
    assert {path for path, leaf in told.items() if leaf.treatment != "left"} == kernels
    assert all(leaf.why for leaf in found.leaves if leaf.treatment == "left")
    assert len(told) == len(jax.tree.leaves(params))
    shapes = transformer.abstract_params(found.model)
    assert jax.tree.structure(found.params) == jax.tree.structure(shapes)
    assert [x.shape for x in jax.tree.leaves(found.params)] == [x.shape for x in jax.tree.leaves(shapes)]
    assert sum(leaf.bytes_after for leaf in found.leaves) == sum(x.nbytes for x in jax.tree.leaves(found.params))
    if METHODS[method].is_calibrated:
        assert all(0 <= told[path].error < 0.2 for path in kernels)
    assert all(method in leaf.treatment for leaf in found.leaves if method == "gptq" and leaf.path in kernels)


def test_errors_of_the_output_are_in_the_published_order():
    cfg = zoo.build("dense", d_model=64, d_ff=128, num_layers=3)
    params, errors = random_params(cfg, scale=0.15), {}
    text = batches(cfg, num=4, rows=8, length=32)
    wanted = hidden(cfg, params, text[0])
    for name in ("rtn", "awq", "gptq"):
        found = run(cfg, params, name, weights=WeightFormat(dtype="int3", group_size=16, symmetric=False), text=text)
        errors[name] = np.square(hidden(found.model, found.params, text[0]) - wanted).mean()
    assert errors["gptq"] < errors["awq"] < errors["rtn"]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_pruned_weights_stay_zero(method):
    cfg = zoo.build("moe")
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x * (random.random(x.shape) < 0.5).astype(x.dtype), random_params(cfg))
    found = run(cfg, params, method)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found.params, is_leaf=quantized.is_quantized):
        if quantized.is_quantized(leaf):
            before = dict(jax.tree_util.tree_leaves_with_path(params))[path]
            assert np.all(np.asarray(quantized.dequantize(leaf))[before == 0] == 0)


def test_embeddings_are_stored_when_asked_and_kernels_left_when_named():
    cfg = zoo.build("sandwich")
    found = run(cfg, random_params(cfg), "gptq", embeddings=INT8, leave="mlp/down")
    told = {leaf.path: leaf for leaf in found.leaves}
    assert told["embed/tokens"].treatment == "int8 rows, nearest" == told["head/kernel"].treatment
    assert told["group_0/block_0/mlp/down/kernel"].why == "asked to, by 'mlp/down'"
    wide = WeightFormat(dtype="int4", group_size=16, symmetric=False)
    odd = zoo.build("dense", d_ff=40)  # which 16 does not divide
    found = run(odd, random_params(odd), "awq", weights=wide, leave="mlp/down")
    assert not quantized.is_quantized(found.params["group_0"]["block_0"]["mlp"]["down"]["kernel"])


@pytest.mark.parametrize(
    ("name", "method"), [("dense", "gptq"), ("moe", "gptq"), ("moe", "awq"), ("dense", "smoothquant")]
)
def test_eight_devices_find_what_one_does(name, method):
    cfg = zoo.build(name, num_layers=1, **({"d_ff": 64} if name == "dense" else {}))
    weights = INT8 if method == "smoothquant" else INT4
    params, text = random_params(cfg), batches(cfg, num=1, rows=8, length=16)
    wanted = run(cfg, params, method, weights=weights, text=text)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, context=1, tensor=2, rules="standard"))
    with jax.set_mesh(mesh):
        shardings = rules.tree_shardings(mesh, transformer.param_axes(cfg), transformer.abstract_params(cfg))
        got = run(cfg, jax.tree.map(jax.device_put, params, shardings), method, weights=weights, text=text)
    for a, b in zip(jax.tree.leaves(wanted.params), jax.tree.leaves(got.params), strict=True):
        # Sums in another order round a few codes that are half way the other way, and what is after them then differs.
        assert np.mean(np.isclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2, atol=1e-4)) > 0.97
    one, eight = (hidden(found.model, found.params, text[0]) for found in (wanted, got))
    assert np.abs(one - eight).mean() < 0.05 * np.abs(one).mean()


def test_what_cannot_be_done_is_refused_before_any_work():
    cfg = zoo.build("dense")
    params = random_params(cfg)
    done = run(cfg, params, "rtn")
    with pytest.raises(ValueError, match="in few bits already .* start from the checkpoint in floats"):
        run(done.model, done.params, "gptq")
    with pytest.raises(ValueError, match=r"group_size=128 does not divide its 16 inputs; expected one of 4, 8, 16"):
        run(cfg, params, "gptq", weights=WeightFormat(dtype="int4", group_size=128))
    with pytest.raises(ValueError, match="needs calibration text; got none"):
        run(cfg, params, "awq", text=())
    with pytest.raises(ValueError, match="no kernel is left"):
        run(cfg, params, "rtn", leave=".")
    with pytest.raises(ValueError, match="give activations=int8"):
        quantize.check(cfg, quant_spec.rules(INT8), method=METHODS["smoothquant"])
    broken = {**params, "final_norm": {"scale": params["final_norm"]["scale"] * jnp.nan}}
    with pytest.raises(ValueError, match="final_norm/scale: has values that are not finite"):
        run(cfg, broken, "rtn")


@pytest.mark.parametrize("method", ["awq", "smoothquant", "gptq"])
def test_layers_that_share_weights_are_treated_by_all_their_uses(method):
    block = zoo.build("dense").blocks[0]
    cfg = dataclasses.replace(zoo.build("dense"), groups=(LayerGroup(pattern=(block,), repeats=2, shared=True),))
    params, text = random_params(cfg), batches(cfg, num=4, rows=4, length=16)
    found = run(cfg, params, method, weights=INT8 if method == "smoothquant" else INT4, text=text)
    wanted = hidden(cfg, params, text[0])
    error = np.square(hidden(found.model, found.params, text[0]) - wanted).mean()
    plain = run(cfg, params, "rtn", weights=INT8 if method == "smoothquant" else INT4)
    # Random weights gain nothing from scaling; factors that do not fit all uses would cost many times as much.
    assert error < 1.5 * np.square(hidden(plain.model, plain.params, text[0]) - wanted).mean()


def test_calibration_that_is_not_finite_names_the_layer_and_the_kernel():
    cfg = zoo.build("dense")
    params = random_params(cfg)
    for name in ("gate", "up"):  # of the second layer, whose product is too large for float32
        kernel = params["group_0"]["block_0"]["mlp"][name]["kernel"]
        params["group_0"]["block_0"]["mlp"][name]["kernel"] = jnp.asarray(kernel).at[1].set(1e30)
    with pytest.raises(ValueError, match="group_0/block_0, layer 1: the calibration text gives mlp/down/kernel inputs"):
        run(cfg, params, "gptq")


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_three_bits_with_zeros_take_their_bits_and_no_more(name):
    cfg = zoo.build(name, d_model=32, d_ff=64)
    found = run(cfg, random_params(cfg), "gptq", weights=WeightFormat(dtype="int3", group_size=8, symmetric=False))
    for leaf in found.leaves:
        if leaf.treatment != "left":  # 3 bits, and a scale of 16 and a zero of 8 for 8 of them
            assert leaf.bytes_after == leaf.bytes_before / 4 * (3 + (16 + 8) / 8) / 8, leaf.path


def test_experts_without_tokens_and_singular_hessians_are_told():
    cfg = zoo.build("moe")
    found = run(cfg, random_params(cfg), "gptq", text=[jnp.zeros((1, 2), jnp.int32)])
    assert any("experts had no token" in note for note in found.notes)
    method = dataclasses.replace(METHODS["gptq"], gptq=dataclasses.replace(METHODS["gptq"].gptq, damping=0.0))
    text = [jnp.zeros((1, 2), jnp.int32)]
    found = quantize.quantize(cfg, random_params(cfg), quant_spec.rules(INT4), method=method, batches=text)
    assert any("the Hessian is singular" in note for note in found.notes)


def test_a_checkpoint_is_written_whole_with_its_lineage(tmp_path):
    cfg = zoo.build("dense")
    found = run(cfg, random_params(cfg), "rtn")
    tokenizer = tokenizer_lib.byte_level()
    entry = {"stage": "quantize", "method": "rtn"}
    saving.write(tmp_path / "a", found.model, found.params, entry=entry, source=None, tokenizer=tokenizer)
    meta, params = restore_params(tmp_path / "a")
    assert meta.model == found.model and meta.lineage == (entry,) and meta.tokenizer == tokenizer.fingerprint
    assert jax.tree.all(jax.tree.map(np.array_equal, params, found.params))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    saving.write(tmp_path / "b", found.model, found.params, entry={"stage": "x"}, source=meta, tokenizer=None)
    assert restore_params(tmp_path / "b")[0].lineage == (entry, {"stage": "x"})
    with pytest.raises(ValueError, match="is there already, and is not overwritten"):
        saving.write(tmp_path / "a", found.model, found.params, entry=entry, source=None, tokenizer=tokenizer)
    assert saving.fingerprint(meta.model, params) == meta_lib.params_hash(meta.model, meta.checksums)
