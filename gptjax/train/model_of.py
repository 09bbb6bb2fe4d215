"""The architecture of a checkpoint as the model that a run trains."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from gptjax.checkpoint.store import find_agreed, read_meta
from gptjax.nn import quant_spec
from gptjax.nn.config import DType, ModelConfig, Remat


@dataclass(frozen=True, kw_only=True)
class ModelOf:
    """Stands in `config.model` for the keys of a `ModelSpec`: whatever was imported, pruned or shared can be trained.

    Attributes:
      checkpoint: it, or a workdir for its newest one; read until the run has a checkpoint of its own.
      seq_len: tokens of a training row, at most what the model reads.
      dtype, remat: None for those of the checkpoint.
      quant: what products round while training, see `nn.quant_spec`; None for what the checkpoint was trained for.
    """

    checkpoint: str
    seq_len: int
    dtype: DType | None = None
    remat: Remat | None = None
    quant: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "quant", self.quant or None)
        if not self.checkpoint:
            raise ValueError("checkpoint: missing; give a checkpoint or a workdir")
        if self.seq_len < 1:
            raise ValueError(f"seq_len={self.seq_len}: expected at least 1")
        if self.quant is not None:
            quant_spec.parse(self.quant)  # which checks

    def build(self) -> ModelConfig:
        """The checkpoint's model; every process calls it.

        Raises:
          ValueError: if there is no checkpoint, it is in few bits, or it reads no rows as long.
        """
        found = read_meta(find_agreed(self.checkpoint)).model
        check_floats(found, self.checkpoint)
        if self.seq_len > found.seq_len:
            raise ValueError(
                f"model.seq_len={self.seq_len}: the model of {self.checkpoint} reads at most {found.seq_len} tokens; "
                f"set --config.model.seq_len={found.seq_len}"
            )
        own = {name: getattr(self, name) for name in ("dtype", "remat") if getattr(self, name) is not None}
        if self.quant is not None:
            own["quant"] = quant_spec.parse(self.quant)
        return dataclasses.replace(found, **own)


def check_floats(model: ModelConfig, name: str) -> None:
    """Raises:
    ValueError: for the model of a checkpoint, called `name`, that is no start for training.
    """
    if model.has_stored_kernels:
        raise ValueError(
            f"{name}: its kernels are in few bits, which do not train; start from the checkpoint in floats that it was "
            "made from"
        )
