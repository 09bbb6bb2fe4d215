"""ONNX Runtime on CPU, in a process without gptjax and JAX, running exported graphs."""

from __future__ import annotations

import pathlib

from gptjax.interop.referees.process import BareProcess

_PACKAGES = ("onnxruntime", "numpy")
_SETUP = """
import json, pathlib
sys.modules["jax"] = None
import numpy as np, onnxruntime

class Model:
    def __init__(self, folder):
        folder = pathlib.Path(folder)
        self.manifest = json.loads((folder / "manifest.json").read_text())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.model, self.step = (
            onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
            for name in ("model.onnx", "step.onnx")
        )

    def logits(self, tokens):
        return self.model.run(["logits"], {"tokens": np.array([tokens], np.int32)})[0][0]

    def generate(self, tokens, num):
        sizes = {"batch": 1, "cache_len": len(tokens) + num}
        entries = self.manifest["cache"]
        cache = [np.full([sizes.get(d, d) for d in e["shape"]], e["fill"], e["dtype"]) for e in entries]
        names = [entry["name"] for entry in entries]
        found, new, at = [], tokens, 0
        while len(found) < num:
            given = {"tokens": new, "positions": range(at, at + len(new)), "wanted": [len(new) - 1]}
            given = {name: np.array([list(value)], np.int32) for name, value in given.items()}
            logits, *cache = self.step.run(None, given | dict(zip(names, cache)))
            found.append(int(logits[0, 0].argmax()))
            at, new = at + len(new), found[-1:]
        return found

model = Model(sys.argv[1])
answer(f"onnxruntime {onnxruntime.__version__} on CPU, numpy {np.__version__}")
"""


class OnnxRunner(BareProcess):
    """The graphs of an exported folder; see `BareProcess`."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder, setup=_SETUP, packages=_PACKAGES)
