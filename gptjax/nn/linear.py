"""The one matmul seam: every product of an activation with a stored kernel goes through `einsum`.

Low-precision and factored kernels enter here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.kernels import matmul
from gptjax.kernels.grouped import Groups, grouped_matmul
from gptjax.nn import few_bits, init, low_rank, taps
from gptjax.nn.low_rank import Factors
from gptjax.nn.quantized import Kernel as WholeKernel
from gptjax.nn.quantized import Layout, QuantizedArray, RoundedKernel
from gptjax.nn.taps import Seen, Tapped, Weighed
from gptjax.types import Array

_OUTPUTS = "NHF"
AnyKernel = WholeKernel | Factors
_NOT_PLAIN = (QuantizedArray, RoundedKernel, Factors, Tapped)


def einsum(spec: str, x: Array, kernel: AnyKernel) -> Array:
    """`jnp.einsum(spec, x, kernel)` with the kernel in the dtype of `x`."""
    if isinstance(kernel, Tapped):
        x = x if kernel.x is None else kernel.x
        taps.record(kernel, Seen(few_bits.rows(spec, x), x))
        return einsum(spec, x, kernel.kernel)
    if isinstance(kernel, Factors):
        reduced, expanded = low_rank.specs(spec)
        return einsum(expanded, einsum(reduced, x, kernel.reduce), kernel.expand)
    if isinstance(kernel, QuantizedArray | RoundedKernel):
        return few_bits.einsum(spec, x, kernel)
    return matmul.einsum(spec, x, kernel.astype(x.dtype))


def project(x_BTD: Array, weights: Sequence[tuple[AnyKernel, Array | None]]) -> list[Array]:
    """`x_BTD @ kernel + bias` for each kernel `[D, ...]` and bias; see `kernels.matmul.project`."""
    kernels, biases = zip(*weights, strict=True)
    if any(isinstance(kernel, _NOT_PLAIN) for kernel in kernels):
        letters = [_OUTPUTS[: kernel.ndim - 1] for kernel in kernels]
        products = [einsum(f"BTD,D{out}->BT{out}", x_BTD, k) for out, k in zip(letters, kernels, strict=True)]
    else:
        products = matmul.project(x_BTD, [kernel.astype(x_BTD.dtype) for kernel in kernels])
    return [y if bias is None else y + bias.astype(y.dtype) for y, bias in zip(products, biases, strict=True)]


def grouped(x_MD: Array, kernel_EDF: AnyKernel, groups: Groups) -> Array:
    """`x[m] @ kernel[e]` for rows sorted by expert; see `kernels.grouped`."""
    if isinstance(kernel_EDF, Tapped):
        taps.record(kernel_EDF, Seen(x_MD, groups=groups))
        return grouped(x_MD, kernel_EDF.kernel, groups)
    if isinstance(kernel_EDF, Factors):
        return grouped(grouped(x_MD, kernel_EDF.reduce, groups), kernel_EDF.expand, groups)
    if isinstance(kernel_EDF, QuantizedArray | RoundedKernel):
        x_MD, kernel_EDF = few_bits.operands(x_MD, kernel_EDF)
    return grouped_matmul(x_MD, kernel_EDF.astype(x_MD.dtype), groups)


def stored(module: nn.Module, name: str, init_fn: Callable[[Array], Any], *, num_lead: int = 0) -> Any:
    """A parameter of a module: a float one as declared, or what stands in its place in few bits or two factors."""
    found = module.get_variable("params", name)
    if isinstance(found, Weighed):
        return taps.plain(found)
    if isinstance(found, Tapped):
        return found.replace(kernel=_joined(found.kernel, num_lead))  # type: ignore[attr-defined]
    if isinstance(found, Mapping):
        return _joined(found, num_lead)
    return found if isinstance(found, _NOT_PLAIN) else module.param(name, init_fn)


def _joined(kernel: Any, num_lead: int) -> Any:
    if not isinstance(kernel, Mapping):
        return kernel
    return Factors(taps.plain(kernel["reduce"]), taps.plain(kernel["expand"]), num_lead)


class Kernel(nn.Module):
    """Declares a kernel, and a bias over its output dimensions or None.

    Attributes:
      shape: of the kernel.
      axes: logical axes of the kernel's dimensions.
      in_dims: dimensions that a product contracts; they set the scale of the initial values.
      batch_dims: leading dimensions that count separate kernels, such as experts.
      scale: gain of the initial values.
    """

    shape: Sequence[int]
    axes: Sequence[str | None]
    in_dims: Sequence[int] = (0,)
    batch_dims: int = 0
    bias: bool = False
    scale: float = 1.0

    @nn.compact
    def __call__(self) -> tuple[AnyKernel, Array | None]:
        std = self.scale * init.fan_in_std(self.shape, self.in_dims)
        ins = [self.shape[dim] for dim in self.in_dims]
        assert tuple(self.in_dims) == tuple(range(self.batch_dims, self.batch_dims + len(ins))), "inputs come first"
        layout = Layout(tuple(ins), tuple(self.shape[self.batch_dims + len(ins) :]))
        init_fn = init.declare(self.shape, self.axes, std=std, layout=layout)
        kernel = stored(self, "kernel", init_fn, num_lead=self.batch_dims)
        if not self.bias:
            return kernel, None
        kept = [dim for dim in range(len(self.shape)) if dim < self.batch_dims or dim not in self.in_dims]
        shape, axes = [self.shape[dim] for dim in kept], [self.axes[dim] for dim in kept]
        return kernel, self.param("bias", init.declare(shape, axes))


class Linear(Kernel):
    """`y = einsum(spec, x, kernel) + bias`, with the attributes of `Kernel`.

    Attributes:
      spec: einsum of the activation and the kernel, such as `BTD,DNH->BTNH`.
    """

    spec: str = ""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        kernel, bias = super().__call__()
        y = einsum(self.spec, x, kernel)
        return y if bias is None else y + bias.astype(y.dtype)


def compute_dtype(dtype: str, platform: str) -> jnp.dtype:
    """The dtype of activations; `auto` is bfloat16 except on CPU, which has no fast bfloat16."""
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    return jax.dtypes.canonicalize_dtype(dtype)
