"""A bare process, with JAX and NumPy but without gptjax, that runs an exported folder by its own `run.py`."""

from __future__ import annotations

import pathlib

from gptjax.interop.referees.process import BareProcess

_PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "flatbuffers")
_SETUP = """
import importlib.util, pathlib
spec = importlib.util.spec_from_file_location("run", sys.argv[1] + "/run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
import jax, numpy
model = run.Model(pathlib.Path(sys.argv[1]))
answer(f"bare process: jax {jax.__version__}, numpy {numpy.__version__} on {jax.default_backend()}")
"""


class StableHloRunner(BareProcess):
    """The exported programs; see `BareProcess`."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder, setup=_SETUP, packages=_PACKAGES)
