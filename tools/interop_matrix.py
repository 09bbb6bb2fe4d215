"""Converts a small random model of each family to and from each format, and writes the table of docs/interop.md.

    python -m tools.interop_matrix --out=docs/interop.md

Every figure is of a certificate made now, by the referees that are installed here; what is missing or refused is said
in its cell. About ten minutes on two cores.
"""

from __future__ import annotations

import datetime
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags

from gptjax.checkpoint import arrays
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import CheckpointStore
from gptjax.interop import exporting, importing
from gptjax.interop.certificate import Certificate
from gptjax.interop.exporting import GGUF_FILE, Options
from gptjax.interop.families import FAMILIES
from gptjax.interop.publish import RejectedError
from gptjax.interop.table import read_config
from gptjax.nn import transformer
from gptjax.nn.config import ModelConfig

_OUT = flags.DEFINE_string("out", "docs/interop.md", "File to write.")
_FAMILIES = flags.DEFINE_list("families", None, "Only these.")

_BASE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 160,
    "tie_word_embeddings": False,
}
_HEADS = {"head_dim": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 131, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 160},
    "llama": {**_BASE, "rope_theta": 10_000.0},
    "mistral": {**_BASE, "sliding_window": 24},
    "qwen3": {**_BASE, **_HEADS},
    "gemma3_text": {
        **_BASE,
        **_HEADS,
        "num_hidden_layers": 6,
        "tie_word_embeddings": True,
        "sliding_window": 24,
        "query_pre_attn_scalar": 32,
    },
    "mixtral": {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        **_BASE,
        **_HEADS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        **_BASE,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
    },
    "gpt_oss": {
        **_BASE,
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_bias": True,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 80,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
        "rope_theta": 150_000.0,
    },
}
EXPORTS: dict[str, tuple[str, Options]] = {
    "hf": ("hf", Options()),
    "gguf f32": ("gguf", Options(quantization="f32")),
    "gguf f16": ("gguf", Options(quantization="f16")),
    "gguf q8_0": ("gguf", Options(quantization="q8_0")),
    "gguf q4_0": ("gguf", Options(quantization="q4_0")),
    "stablehlo": ("stablehlo", Options()),
    "saved_model": ("saved_model", Options()),
    "onnx": ("onnx", Options()),
}
IMPORTS = {"hf": "hf", "gguf f32": f"gguf f32/{GGUF_FILE}"}

_INTRODUCTION = (
    "Of small random models, and of all prompts the worst: difference of a logit (they spread over about 4), mean",
    "KL divergence in nats, share of 64 greedy tokens up to the first that differs. `out` is a checkpoint exported,",
    "and run by the format's own implementation beside the model here with the same values, as rounded. `in` is the",
    "exported model imported again, beside the peer.",
    "",
    "In float32 the two differ by the order of sums. llama.cpp differs by more: it looks GELU up in a table of",
    "float16, and beside narrower weights it rounds activations too, to 8 bits beside q8_0 and q4_0. Random models",
    "have near ties everywhere, and in a mixture a near tie sends a token to another expert: there tokens part",
    "early and single logits differ by a lot, though the file is right. Narrow weights are therefore judged by the",
    "mean KL: at most 1e-4 in float16, 0.002 in bfloat16, 0.03 in q8_0, 0.05 in q4_0; in mixtures 0.02 to 0.1.",
    "Heads, experts or projections in a wrong order in one layer of these models give 0.7 to 4. What rounding did",
    "to a model is a note in its certificate.",
)


_FEW_BITS = (
    "## Kernels in few bits",
    "",
    "A checkpoint in few bits goes to GGUF as blocks of its own codes, so that the file's values are the",
    "checkpoint's to the bit; both are read back and compared. A block has 32 inputs, so groups (or rows) must be",
    "multiples of that.",
    "",
    "| codes | blocks | bits |",
    "|---|---|---:|",
    "| int2, int3; int4 without zeros | Q4_0 | 4.5 |",
    "| int4 with zeros | Q4_1 | 5.0 |",
    "| int5 without zeros | Q5_0 | 5.5 |",
    "| int5 with zeros; int6; int8 without zeros | Q8_0 | 8.5 |",
    "| int8 with zeros, fp8_e4m3, other group sizes | none |  |",
    "",
    "What no block holds is refused by name, or written as floats with `--few_bits=blocks_or_f32` (the same values)",
    "or `blocks_or_f16`. `--quantization` says what becomes of kernels that are floats, f16 unless told. Inputs",
    "that the checkpoint rounds (`activations`) are not rounded so there: llama.cpp rounds those of every block",
    "product to 8 bits, 32 at a time, and transformers none. The certificate compares with the same model here",
    "without, and a note says how far that is from the checkpoint. To `hf` kernels in few bits are the floats that",
    "they stand for; programs (stablehlo, saved_model, onnx) are not written from them. What was done to a model",
    "goes along: in the certificate, in GGUF's metadata (`gptjax.lineage` and `general.description`), and in the",
    "model card beside `hf`.",
    "",
    "With `--text=<held-out text>` the certificate also has the perplexity of 8,192 tokens by the checkpoint, by",
    "the values that were written, and by the peer, whose has to be within 1 %.",
)


def main(argv: list[str]) -> None:
    del argv
    names = _FAMILIES.value or list(FAMILIES)
    cells: dict[str, dict[str, str]] = {}
    referees: dict[str, str] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            cells[name] = _row(name, pathlib.Path(folder), referees)
        print(name, cells[name], flush=True)
    pathlib.Path(_OUT.value).write_text(_page(cells, referees))


def _row(name: str, root: pathlib.Path, referees: dict[str, str]) -> dict[str, str]:
    """A cell for each direction of each format."""
    _save(name, root / "run")
    cells = {}
    for label, (format, options) in EXPORTS.items():

        def export(format: str = format, options: Options = options, label: str = label) -> Certificate:
            return exporting.export(root / "run", root / label, format=format, options=options)

        cells[f"out {label}"] = _cell(export, referees, f"out {label}")
    for label, path in IMPORTS.items():

        def bring_in(path: str = path, label: str = label) -> Certificate:
            return importing.import_model(root / path, root / f"in {label}")

        there = (root / path).exists()
        cells[f"in {label}"] = _cell(bring_in, referees, f"in {label}") if there else "–"
    return cells


def _save(name: str, workdir: pathlib.Path) -> None:
    model = read_config(FAMILIES[name], CONFIGS[name], path=name)
    with CheckpointStore(workdir) as store:
        store.save(0, meta=meta_lib.make(model), params=arrays.nest(_random_params(model)))


def _random_params(model: ModelConfig) -> dict[str, np.ndarray]:
    """Norms near the identity, and logits as far apart (about 4) as those of a trained model."""
    random = np.random.default_rng(0)
    values = {}
    for path, leaf in arrays.flatten(transformer.init(model, jax.random.key(0))).items():
        base = np.asarray(leaf) if path.endswith("/scale") else 0.0  # a norm's one is a zero where it adds one
        spread = 0.5 if path in ("embed/tokens", "head/kernel") else 0.15
        values[path] = (base + random.normal(size=leaf.shape, scale=spread)).astype(leaf.dtype)
    return values


def _cell(convert: Callable[[], Certificate], referees: dict[str, str], label: str) -> str:
    try:
        found, mark = convert(), ""
    except RejectedError as error:
        found, mark = error.certificate, "**rejected** "
    except (ValueError, ImportError) as error:
        return f"refused: {error}".splitlines()[0]
    peer = found.referees.get("source" if label.startswith("in ") else "target", "")
    if peer.startswith("missing"):
        return "referee missing"
    referees[label] = peer
    differences = [row.max_logit_difference for row in found.comparisons if row.max_logit_difference is not None]
    kl = [row.mean_kl_nats for row in found.comparisons if row.mean_kl_nats is not None]
    greedy = min(row.greedy_agreement for row in found.comparisons)
    figures = f"{max(differences):.0e}, {max(kl):.0e}, " if differences else ""
    return f"{mark}{figures}{greedy:.0%}"


def _page(cells: dict[str, dict[str, str]], referees: dict[str, str]) -> str:
    columns = list(next(iter(cells.values())))
    refusals = {
        name: {row[column] for column in columns if row[column].startswith("refused")} for name, row in cells.items()
    }
    cells = {
        name: {column: "refused" if cell.startswith("refused") else cell for column, cell in row.items()}
        for name, row in cells.items()
    }
    lines = [
        "# Families and formats",
        "",
        f"Made by `tools/interop_matrix.py` on {datetime.date.today()}.",
        "",
        *_INTRODUCTION,
        "",
        "| family | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
        *(f"| {name} | " + " | ".join(row[column] for column in columns) + " |" for name, row in cells.items()),
        "",
        "Referees:",
        "",
        *(f"- {label}: {peer}" for label, peer in referees.items()),
        "",
        *(f"- {name} is {reason}" for name, reasons in refusals.items() for reason in sorted(reasons)),
        "",
        *_FEW_BITS,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
