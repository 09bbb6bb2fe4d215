"""Exported programs, run by the `run.py` that lies beside them, in a process with no more than what they need."""

from __future__ import annotations

import pathlib

from gptjax.interop.referees.process import BareProcess
from gptjax.interop.saved_model import EXTRA_FOLDER

_PACKAGES = {
    "stablehlo": ("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "flatbuffers"),
    "saved_model": ("tensorflow", "numpy", "absl", "google.protobuf"),
    "onnx": ("onnxruntime", "numpy"),
}
_SETUP = """
import importlib.util, os, pathlib
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
folder = pathlib.Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("run", folder / "run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
model = run.Model(folder)
has_tokenizer = (folder / "tokenizer.json").exists() and importlib.util.find_spec("tokenizers")
tokenizer = run.load_tokenizer(folder) if has_tokenizer else None
model.encode = lambda text: tokenizer and tokenizer.encode(text, add_special_tokens=False).ids
answer("bare process: " + model.name)
"""
# Wherever it may be installed.
_WITHOUT_JAX = "sys.modules['jax'] = None"


class ProgramsRunner(BareProcess):
    """The programs of an exported folder; see `BareProcess`."""

    def __init__(self, folder: pathlib.Path, format: str) -> None:
        setup = _SETUP if format == "stablehlo" else _WITHOUT_JAX + _SETUP
        place = folder / EXTRA_FOLDER if format == "saved_model" else folder
        super().__init__(place, setup=setup, packages=_PACKAGES[format])
