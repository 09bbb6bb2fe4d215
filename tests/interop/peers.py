"""What every family is held to: a random model of transformers comes in, computes the same, and goes out again.

Random initialisation leaves biases at zero and scales at one, under which a lost bias or norm is not seen; so
all parameters are moved before the model is saved.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from gptjax.checkpoint import arrays, reading
from gptjax.interop import certificate, checkpoint, hf
from gptjax.interop.certificate import Tolerance
from gptjax.interop.runner import GptjaxRunner
from gptjax.nn.config import ModelConfig

torch = pytest.importorskip("torch", reason="the peer's own implementation is not installed")
transformers = pytest.importorskip("transformers", reason="the peer's own implementation is not installed")

from gptjax.interop.referees.hf import TransformersRunner  # noqa: E402

EXACT = Tolerance(max_logit=2e-4, mean_kl=1e-6, greedy=1.0)
# What says nothing of the forward pass (see `gptjax.interop.reader`), or nothing besides `layer_types`.
_FREE_KEYS = frozenset(
    """_name_or_path transformers_version dtype torch_dtype use_cache bos_token_id eos_token_id pad_token_id
    initializer_range attention_dropout embd_pdrop attn_pdrop resid_pdrop max_window_layers sliding_window_pattern
    _sliding_window_pattern""".split()
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What `check_family` leaves for closer looks.

    Attributes:
      max_logit_difference: over all prompts.
      source, checkpoint, exported: folders.
      config: `config.json` as exported.
    """

    max_logit_difference: float
    source: object
    checkpoint: object
    exported: object
    model: ModelConfig
    config: dict


def make(config, *, seed: int = 0, scale: float = 0.15):
    """A model of a transformers config with every parameter and stored float buffer moved at random."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * scale)
    return model.eval()


def check_family(
    tmp_path, hf_model, *, prompt_tokens: int = 24, dtype=None, max_shard_bytes: int = hf.DEFAULT_SHARD_BYTES,
    family_name: str | None = None, exact_config: bool = True,
) -> Result:  # fmt: skip
    """Saves, imports, compares, exports, compares, and imports again.

    Greedy continuations are as long as the context has room for, 64 tokens at most: make it longer than windows
    and than the original length of a stretched rotation.

    Args:
      prompt_tokens: length of the prompt whose logits are compared and that is continued.
      dtype: of the saved model, by torch's name; None keeps float32.
      family_name: to export as; None must find the model's own.
      exact_config: every key of the exported config must be as in the original that bears on the forward pass.
    """
    source, ckpt, out, again = (tmp_path / name for name in ("source", "checkpoint", "exported", "again"))
    hf_model = hf_model if dtype is None else hf_model.to(getattr(torch, dtype))
    hf_model.save_pretrained(source, max_shard_size=max_shard_bytes)
    opened = hf.open_source(source)
    checkpoint.write(opened, ckpt)
    theirs = TransformersRunner(source)
    tokens = np.random.default_rng(1).integers(0, opened.model.vocab_size, prompt_tokens).tolist()
    worst = check_same(theirs, GptjaxRunner.load(ckpt), tokens, opened.model)

    family = hf.write(ckpt, out, family_name=family_name, max_shard_bytes=max_shard_bytes)
    assert family.name == (family_name or opened.family.name)
    config = json.loads((out / "config.json").read_text())
    if exact_config:
        check_configs(source, out)
    np.testing.assert_array_equal(TransformersRunner(out).logits(tokens), theirs.logits(tokens))

    reopened = hf.open_source(out)
    assert reopened.model == opened.model
    checkpoint.write(reopened, again)
    check_bits(ckpt, again)
    return Result(worst, source, ckpt, out, opened.model, config)


def check_same(theirs, ours, tokens, model, *, tolerance: Tolerance = EXACT) -> float:
    """Logits, greedy continuation and every layer's output; returns the largest difference of logits."""
    records = [certificate.record(runner, {"random": tokens}, seq_len=model.seq_len) for runner in (theirs, ours)]
    (comparison,) = certificate.compare(*records)
    problems = list(certificate.problems([comparison], None, tolerance))
    if problems:
        problems += certificate.layer_lines(certificate.layer_differences(theirs, ours, tokens))
    assert not problems, problems
    return comparison.max_logit_difference


def check_configs(source, out) -> None:
    """transformers reads the same values from both folders."""
    wanted, got = (transformers.AutoConfig.from_pretrained(str(folder)).to_dict() for folder in (source, out))
    differences = {
        key: (wanted.get(key), got.get(key))
        for key in wanted.keys() | got.keys()
        if key not in _FREE_KEYS and wanted.get(key) != got.get(key)
    }
    assert not differences, differences


def check_bits(first, second) -> None:
    """Two checkpoints hold the same model, bit by bit."""
    (meta_a, a), (meta_b, b) = (reading.restore_params(path) for path in (first, second))
    assert meta_a.model == meta_b.model
    a, b = arrays.flatten(a), arrays.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        left, right = np.asarray(a[path]), np.asarray(b[path])
        assert left.dtype == right.dtype, path
        np.testing.assert_array_equal(left.reshape(-1).view(np.uint8), right.reshape(-1).view(np.uint8), path)
