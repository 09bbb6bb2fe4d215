"""TensorFlow, in a process without gptjax and JAX, running a SavedModel."""

from __future__ import annotations

import pathlib

from gptjax.interop.referees.process import BareProcess

_PACKAGES = ("tensorflow", "numpy", "absl", "google.protobuf")
_SETUP = """
import os, json, pathlib
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
sys.modules["jax"] = None
import numpy as np, tensorflow as tf

class Model:
    def __init__(self, folder):
        self.loaded = tf.saved_model.load(folder)
        self.signatures = self.loaded.signatures
        self.manifest = json.loads((pathlib.Path(folder) / "assets.extra" / "manifest.json").read_text())

    def logits(self, tokens):
        return self.signatures["serving_default"](tokens=tf.constant([tokens], tf.int32))["logits"].numpy()[0]

    def generate(self, tokens, num):
        sizes = {"batch": 1, "cache_len": len(tokens) + num}
        cache = {
            entry["name"]: tf.fill([sizes.get(d, d) for d in entry["shape"]], tf.cast(entry["fill"], entry["dtype"]))
            for entry in self.manifest["cache"]
        }
        found, step, at = [], "prefill", 0
        while len(found) < num:
            new = tokens if step == "prefill" else found[-1:]
            positions, wanted = list(range(at, at + len(new))), [len(new) - 1]
            given = {"tokens": new, "positions": positions, "wanted": wanted}
            out = self.signatures[step](**{k: tf.constant([v], tf.int32) for k, v in given.items()}, **cache)
            found.append(int(tf.argmax(out.pop("logits")[0, 0])))
            cache, step, at = out, "decode", at + len(new)
        return found

model = Model(sys.argv[1])
answer(f"tensorflow {tf.__version__}, numpy {np.__version__}, without jax")
"""


class SavedModelRunner(BareProcess):
    """The signatures of a SavedModel; see `BareProcess`."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder, setup=_SETUP, packages=_PACKAGES)
