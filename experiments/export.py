"""Writes a checkpoint in another framework's format, and proves that it is the same model.

    python -m experiments.export --ckpt=runs/llama --format=hf --dst=exported/llama

What was written is loaded by the peer's own implementation where that is installed (pip install 'gptjax[referees]'),
compared with the checkpoint, and gets its name when both agree; the figures are in its certificate.json. What does not
agree is kept as <dst>.rejected, and the exit status is 3. Interrupted, the same command goes on.
"""

from __future__ import annotations

import os
import pathlib

from absl import flags

from experiments import common, interop_flags

_CKPT = flags.DEFINE_string("ckpt", None, "Checkpoint, or workdir (its newest); only read.", required=True)
_FORMAT = flags.DEFINE_enum(
    "format",
    None,
    ["hf", "gguf", "onnx", "saved_model", "stablehlo"],
    "hf: config.json and safetensors, for transformers; gguf: for llama.cpp; the others are programs.",
    required=True,
)
_DST = flags.DEFINE_string(
    "dst", None, "The folder to make; not there yet. In it model.gguf, or the files of the format.", required=True
)
_FAMILY = flags.DEFINE_string("family", None, "model_type to write it as; the first that expresses it unless told.")
_QUANTIZATION = flags.DEFINE_enum(
    "quantization", None, ["f32", "f16", "bf16", "q8_0", "q4_0"], "Of float weights in gguf; f16 unless told."
)
_FEW_BITS = flags.DEFINE_enum(
    "few_bits",
    None,
    ["blocks", "blocks_or_f16", "blocks_or_f32", "floats"],
    "gguf, of kernels in few bits: blocks with the very values; what has none is refused, or gets so many bits. Or "
    "floats for all, as --quantization says. blocks unless told.",
)
_TEXT = flags.DEFINE_string("text", None, "Held-out text, on which both have to have the same perplexity within 1 %.")
_SHARD_GB = flags.DEFINE_float("max_shard_gb", None, "Size of a .safetensors file at most; 5.", lower_bound=0.001)
flags.adopt_module_key_flags(interop_flags)


def main() -> int:
    """Exports, and prints the certificate."""
    from gptjax.interop import exporting

    options = exporting.Options(
        family=_FAMILY.value,
        quantization=_QUANTIZATION.value,
        few_bits=_FEW_BITS.value,
        max_shard_bytes=None if _SHARD_GB.value is None else int(_SHARD_GB.value * 1e9),
        **interop_flags.values(),
    )
    return interop_flags.run(
        lambda: exporting.export(
            os.path.expanduser(_CKPT.value),
            pathlib.Path(_DST.value).expanduser().absolute(),
            format=_FORMAT.value,
            options=options,
            check=interop_flags.check(text=_TEXT.value),
        ),
        path=_DST.value,
    )


if __name__ == "__main__":
    common.start(main)
