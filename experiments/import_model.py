"""Makes a checkpoint of another framework's model, and proves that it is the same model.

    python -m experiments.import_model --src=<Hugging Face folder, GGUF file or llama2.c .bin> --dst=runs/llama

The format is told by the content. The checkpoint is read back and compared with the source, run beside the peer's own
implementation where that is installed (pip install 'gptjax[referees]'), and gets its name when both agree; the figures
are in its certificate.json. What does not agree is kept as <dst>.rejected, and the exit status is 3. Interrupted, the
same command goes on.
"""

from __future__ import annotations

import pathlib

from absl import flags

from experiments import common, interop_flags

_SRC = flags.DEFINE_string("src", None, "What to import; only read.", required=True)
_DST = flags.DEFINE_string("dst", None, "The checkpoint directory to make; not there yet.", required=True)
flags.adopt_module_key_flags(interop_flags)


def main() -> int:
    """Imports, and prints the certificate."""
    from gptjax.interop import importing

    return interop_flags.run(
        lambda: importing.import_model(
            pathlib.Path(_SRC.value).expanduser(),
            pathlib.Path(_DST.value).expanduser().absolute(),
            **interop_flags.values(),
            check=interop_flags.check(),
        ),
        path=_DST.value,
    )


if __name__ == "__main__":
    common.start(main)
