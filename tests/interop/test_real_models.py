"""Trained models: what they were seen to compute elsewhere, they compute here, and again after an export."""

import base64
import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from gptjax.infer.layout import for_decoding
from gptjax.interop import certificate, checkpoint, hf
from gptjax.interop.runner import GptjaxRunner
from gptjax.kernels.attention import attention
from gptjax.nn import transformer
from gptjax.nn.attention import Context
from gptjax.nn.block import Block, Stream
from gptjax.nn.linear import project
from gptjax.nn.mlp import activate
from tests.interop import peers
from tests.interop.peers import TransformersRunner

EXACT = dataclasses.replace(peers.EXACT, max_logit=1e-4)
# What the reference's stages of the first layer are called by the modules here.
MODULES = {
    "ln1": "attention_norm", "yProj": "attention", "ln2": "mlp_norm", "fc": "mlp/up", "mlp": "mlp",
}  # fmt: skip


@pytest.fixture(scope="module", params=["stories260K", "gpt-nano-sort"])
def model(request, shared_data, tmp_path_factory):
    """The name, the folder, and the imported checkpoint."""
    folder = shared_data / "models" / request.param / "hf"
    path = tmp_path_factory.mktemp(request.param) / "checkpoint"
    checkpoint.write(hf.open_source(folder), path)
    return folder, path


def compare(theirs, ours):
    prompts = certificate.prompts(ours, ours.model)
    asked = {name: tokens for name, tokens in prompts.items() if name in ("one token", "prose", "long")}
    records = [certificate.record(runner, asked, seq_len=ours.model.seq_len) for runner in (theirs, ours)]
    assert not list(certificate.problems(certificate.compare(*records), None, EXACT))


def test_a_trained_model_computes_the_same_here_and_after_an_export(model, tmp_path):
    folder, path = model
    ours = GptjaxRunner.load(path)
    compare(TransformersRunner(folder), ours)
    hf.write(path, tmp_path / "exported")
    compare(TransformersRunner(tmp_path / "exported"), ours)
    checkpoint.write(hf.open_source(tmp_path / "exported"), tmp_path / "again")
    peers.check_bits(path, tmp_path / "again")


def test_the_tiny_story_teller_tells_the_story_that_its_author_shows(shared_data, tmp_path):
    folder = shared_data / "models" / "stories260K"
    checkpoint.write(hf.open_source(folder / "hf"), tmp_path / "checkpoint")
    runner = GptjaxRunner.load(tmp_path / "checkpoint")
    story = re.search(r"-t 0\.0\n(.*?)```", (folder / "stories260K.md").read_text(), re.S).group(1).strip()
    told = runner.tokenizer.decode(runner.greedy([runner.tokenizer.bos_id], 256)).strip()
    assert len(story) > 500 and told == story


@pytest.fixture(scope="module")
def stages(shared_data):
    """Activations that minGPT on PyTorch had: `[3, 11, ...]`, by the name of the stage."""
    stored = json.loads((shared_data / "models" / "gpt-nano-sort" / "gpt-nano-sort-t0-partials.json").read_text())
    return {
        name: np.frombuffer(base64.b64decode(value["data"]), np.float32).reshape(value["shape"])
        for name, value in stored.items()
        if name != "config"
    }


@pytest.fixture(scope="module")
def computed(shared_data, stages, tmp_path_factory):
    """The same stages here. The scores and their softmax (`att`, `attSm`) exist only inside the kernel."""
    path = tmp_path_factory.mktemp("sort") / "checkpoint"
    checkpoint.write(hf.open_source(shared_data / "models" / "gpt-nano-sort" / "hf"), path)
    runner = GptjaxRunner.load(path)
    cfg, params = for_decoding(runner.model, runner.params)
    tokens_BT = stages["idx"].astype(np.int32)
    found = dict(zip(("x", "block0", "block1", "block2"), transformer.residuals(cfg, params, tokens_BT), strict=True))
    found["ln_f"] = transformer.forward(cfg, params, tokens_BT).hidden_BTD
    found["lm_head"] = transformer.logits(cfg, params, found["ln_f"])
    found["probs"] = jax.nn.softmax(found["lm_head"])
    found["tok_emb"] = params["embed"]["tokens"][tokens_BT]
    found["pos_emb"] = params["embed"]["positions"][None]
    layer = jax.tree.map(lambda x: x[0], params["group_0"]["block_0"])
    return found | first_layer(cfg.blocks[0], layer, found["x"])


def first_layer(block, params, x_BTD):
    positions_BT = np.broadcast_to(np.arange(x_BTD.shape[1], dtype=np.int32), x_BTD.shape[:2])
    ctx = Context(positions_BT=positions_BT, segment_ids_BT=None, rope_tables=(), rope_keys=(), causal=True)
    (stream, _, _), state = Block(block, 1.0).apply(
        {"params": params}, Stream(x_BTD), ctx, None, capture_intermediates=True, mutable=["intermediates"]
    )
    found = {"mlpResid": stream.x_BTD}
    for stage, module in MODULES.items():
        values = state["intermediates"]
        for part in module.split("/"):
            values = values[part]
        value = values["__call__"][-1]
        found[stage] = value[0] if isinstance(value, tuple) else value
    found["attnResid"] = x_BTD + found["yProj"]
    found["gelu"] = activate(block.mlp.activation, found["fc"], None)
    weights = [(params["attention"][part]["kernel"], params["attention"][part]["bias"])
               for part in ("query", "key", "value")]  # fmt: skip
    q_BTNH, k_BTNH, v_BTNH = project(found["ln1"], weights)
    found["qkv"] = np.concatenate([part.reshape(*part.shape[:2], -1) for part in (q_BTNH, k_BTNH, v_BTNH)], axis=-1)
    found |= {name: part.swapaxes(1, 2) for name, part in (("q", q_BTNH), ("k", k_BTNH), ("v", v_BTNH))}
    found["y"] = attention(
        q_BTNH, k_BTNH, v_BTNH, q_positions_BT=positions_BT, kv_positions_BS=positions_BT, q_segments_BT=None,
        kv_segments_BS=None, causal=True, window=None, scale=block.attention.head_dim**-0.5, softcap=None,
        sinks_N=None,
    ).reshape(*x_BTD.shape)  # fmt: skip
    return found


def test_every_stage_is_that_of_pytorch(stages, computed):
    assert stages.keys() - computed.keys() == {"idx", "att", "attSm"}
    for name, value in computed.items():
        np.testing.assert_allclose(np.asarray(value), stages[name], atol=1e-5, rtol=0, err_msg=name)


def test_it_sorts(shared_data, tmp_path):
    checkpoint.write(hf.open_source(shared_data / "models" / "gpt-nano-sort" / "hf"), tmp_path / "checkpoint")
    runner = GptjaxRunner.load(tmp_path / "checkpoint")
    for letters in ([2, 0, 1, 2, 1, 0], [1, 1, 1, 0, 2, 2], [0, 2, 2, 2, 2, 0]):
        assert runner.greedy(letters, 6) == sorted(letters)
