"""What stands in the place of float kernels, keys and values: numbers of few bits, and factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MIN_GROUP_SIZE = 4
"""Of values that share a scale of 16 bits."""


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """The numbers that a kernel is stored in; see `nn.quantized`.

    Attributes:
      group_size: consecutive inputs that share a scale; None: all inputs of an output do.
      symmetric: the middle code is 0; otherwise each group has a code for it.
    """

    dtype: Literal["int2", "int3", "int4", "int5", "int6", "int8", "fp8_e4m3"]
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < MIN_GROUP_SIZE:
            raise ValueError(f"group_size={self.group_size}: expected none or at least {MIN_GROUP_SIZE}")
        if not self.symmetric and self.dtype == "fp8_e4m3":
            raise ValueError("fp8_e4m3: has no zero code; expected symmetric=True")

    @property
    def bits(self) -> int:
        """Of a code."""
        return 8 if self.dtype == "fp8_e4m3" else int(self.dtype.removeprefix("int"))


@dataclass(frozen=True, kw_only=True)
class KernelRule:
    """How the kernels whose path matches are stored or trained.

    Attributes:
      pattern: regular expression, searched for in paths such as `group_0/block_1/attention/query/kernel`.
      weights: None leaves them as they are.
      activations: what the kernels' inputs are rounded to, row by row.
    """

    pattern: str
    weights: WeightFormat | None = None
    activations: Literal["none", "int8", "fp8_e4m3"] = "none"


@dataclass(frozen=True, kw_only=True)
class CacheFormat:
    """The numbers that keys and values are rounded to, for later tokens and for their own; see `nn.cache`.

    Attributes:
      group_size: consecutive values of a head, or of a latent, that share a scale; None: all of it do.
      symmetric: as in `WeightFormat`.
      keys: `rotated` ones, with their queries, are multiplied by a Hadamard matrix, which leaves their products as they
        are and spreads the few dimensions in which keys are large over all (QuaRot, arXiv:2404.00456, section 4).
    """

    dtype: Literal["int4", "int8"]
    group_size: int | None = None
    symmetric: bool = True
    keys: Literal["plain", "rotated"] = "plain"

    def numbers(self, width: int) -> WeightFormat:
        """Of heads or latents of `width` values; their scales are always of 16 bits."""
        return WeightFormat(dtype=self.dtype, group_size=self.group_size or width, symmetric=self.symmetric)


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Numbers of few bits in a model.

    Attributes:
      rules: of each kernel the first that matches counts; those without one are left as they are.
      stage: `stored` kernels are `nn.quantized.QuantizedArray`s; `train` kernels are floats that each product rounds,
        passing gradients through (quantisation-aware training).
      kv_cache: of keys and values; None leaves them as they are.
    """

    rules: tuple[KernelRule, ...] = ()
    stage: Literal["stored", "train"] = "stored"
    kv_cache: CacheFormat | None = None


@dataclass(frozen=True, kw_only=True)
class RankRule:
    """A kernel as the product of two, `[inputs, rank]` and `[rank, outputs]`; see `nn.low_rank`.

    Attributes:
      pattern: regular expression, searched for in the paths of layers' kernels; of each the first rule counts.
    """

    pattern: str
    rank: int
