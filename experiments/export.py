"""Writes a checkpoint in another framework's format, and proves that it is the same model.

    python -m experiments.export --ckpt=runs/llama --format=hf --dst=exported/llama

What was written is loaded by the peer's own implementation where that is installed (pip install 'gptjax[referees]'),
compared with the checkpoint, and gets its name when both agree; the figures are in its certificate.json. What does not
agree is kept as <dst>.rejected, and the exit status is 3.
"""

from __future__ import annotations

import pathlib

from absl import flags

from experiments import common, interop_flags

_CKPT = flags.DEFINE_string("ckpt", None, "Checkpoint, or workdir (its newest); only read.", required=True)
_FORMAT = flags.DEFINE_enum("format", None, ["hf"], "hf: config.json and safetensors, for transformers.", required=True)
_DST = flags.DEFINE_string("dst", None, "The folder to make; not there yet.", required=True)
_FAMILY = flags.DEFINE_string("family", None, "model_type to write it as; the first that expresses it unless told.")
_SHARD_GB = flags.DEFINE_float("max_shard_gb", 5.0, "Size of a .safetensors file at most.", lower_bound=0.001)
flags.adopt_module_key_flags(interop_flags)


def main() -> int:
    """Exports, and prints the certificate."""
    from gptjax.interop import exporting

    return interop_flags.run(
        lambda: exporting.export(
            _CKPT.value,
            pathlib.Path(_DST.value).absolute(),
            format=_FORMAT.value,
            family=_FAMILY.value,
            max_shard_bytes=int(_SHARD_GB.value * 1e9),
            **interop_flags.options(),
        ),
        path=_DST.value,
    )


if __name__ == "__main__":
    common.start(main)
