"""Tiny models of several kinds as checkpoints, and what every exported form of them must do."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint import reading
from gptjax.checkpoint.store import CheckpointStore
from gptjax.interop import checkpoint as interop_checkpoint
from gptjax.interop import hf
from gptjax.interop.runner import GptjaxRunner
from gptjax.nn.config import ModelConfig, MoEConfig, RopeScaling
from gptjax.nn.spec import MLASpec, ModelSpec
from tests.tiny import TINY, random_params

WINDOW = 8
_MOE = MoEConfig(num_experts=4, num_experts_per_token=2, d_ff=16, activation="swiglu", shared_d_ff=8)
_GROUPED_MOE = MoEConfig(
    num_experts=8, num_experts_per_token=2, d_ff=8, activation="swiglu_clamped", router="sigmoid", balancing="bias",
    num_groups=4, groups_per_token=2, router_bias=True, bias=True,
)  # fmt: skip
_MLA = MLASpec(kv_latent=8, nope_head_dim=8, rope_head_dim=4, v_head_dim=8, q_latent=12)
_LONG = dataclasses.replace(TINY, seq_len=128)

_SPECS: dict[str, ModelSpec] = {
    "grouped queries in a window": dataclasses.replace(_LONG, window=WINDOW, tie_embeddings=False),
    "learned positions and biases": dataclasses.replace(
        _LONG, position="learned", bias=True, norm="layernorm", activation="gelu_tanh", num_kv_heads=4
    ),
    "local and global, caps and sinks": dataclasses.replace(
        _LONG, num_layers=4, window=WINDOW, global_every=2, attn_softcap=20.0, logit_softcap=30.0, attn_sinks=True,
        qk_norm=True, norm_placement="sandwich",
    ),
    "experts": dataclasses.replace(_LONG, moe=_MOE, first_k_dense=1),
    "groups of experts with biases": dataclasses.replace(_LONG, moe=_GROUPED_MOE),
    "latent attention": dataclasses.replace(_LONG, num_kv_heads=4, mla=_MLA),
}  # fmt: skip


def _sharing(model: ModelConfig) -> ModelConfig:
    """The model with one set of weights for the layers of a group."""
    return dataclasses.replace(model, groups=tuple(dataclasses.replace(g, shared=True) for g in model.groups))


MODELS: dict[str, ModelConfig] = {name: spec.build() for name, spec in _SPECS.items()} | {
    "layers that share weights": _sharing(
        dataclasses.replace(
            _LONG, num_layers=3, window=WINDOW, rope_fraction=0.5, embed_scale=4.0, activation="geglu_tanh",
            rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_seq_len=32),
        ).build()
    )
}  # fmt: skip


def write_checkpoint(name: str, directory: pathlib.Path) -> pathlib.Path:
    """A checkpoint of random weights."""
    model = MODELS[name]
    with CheckpointStore(directory) as store:
        store.save(1, meta=meta_lib.make(model, tokenizer="", lineage=[]), params=random_params(model))
    return pathlib.Path(reading.find(directory))


def import_stories(shared_data: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    """The TinyStories model as a checkpoint."""
    interop_checkpoint.write(hf.open_source(shared_data / "models" / "stories260K" / "hf"), directory)
    return directory


def require(*packages: str) -> None:
    """Skips the test where a package is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def run_documented(title: str, folder: pathlib.Path) -> str:
    """What the program that docs/programs.md prints under a title writes, run in a folder by a bare Python."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "programs.md").read_text()
    program = text.split(f"## {title}")[1].split("```python\n")[1].split("```")[0]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout


def check_logits_and_greedy(
    checkpoint: pathlib.Path, runner: object, *, lengths: tuple[int, ...] = (1, 5, 40)
) -> float:
    """Logits of several lengths, and a cached continuation past the window; the largest difference of logits."""
    ours = GptjaxRunner.load(checkpoint)
    random, worst = np.random.default_rng(0), 0.0
    for length in lengths:
        tokens = random.integers(0, ours.model.vocab_size, length).tolist()
        got = runner.logits(tokens)  # type: ignore[attr-defined]
        assert got.shape == (length, ours.model.vocab_size) and got.dtype == np.float32
        worst = max(worst, float(np.abs(got - ours.logits(tokens)).max()))
    assert worst <= 2e-4
    continued = runner.greedy(tokens[:5], 3 * WINDOW)  # type: ignore[attr-defined]
    assert continued == ours.greedy(tokens[:5], 3 * WINDOW)
    # Cached decoding agrees with the whole sequence read at once, by the artefact itself.
    at_once = runner.logits([*tokens[:5], *continued])  # type: ignore[attr-defined]
    assert at_once[4:-1].argmax(-1).tolist() == continued
    return worst
