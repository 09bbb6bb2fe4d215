"""Tokens per second, and how much of the chips' peak they are.

    MFU = tokens/s x FLOPs per token / (devices x peak FLOP/s per device)

Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B) counts the FLOPs that the model
needs, forward and backward, and not those that rematerialisation repeats. `nn.cost`
defines them: causal attention counts the half that is computed, a mixture its active experts.
Tokens are those of documents; padding is work without use and lowers the figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from absl import logging

TERA = 1e12

PEAK_FLOPS: Mapping[str, float] = {
    "TPU v4": 275 * TERA,
    "TPU v5 lite": 197 * TERA,
    "TPU v5e": 197 * TERA,
    "TPU v5": 459 * TERA,
    "TPU v5p": 459 * TERA,
    "TPU v6 lite": 918 * TERA,
    "TPU v6e": 918 * TERA,
    "TPU7": 2307 / 2 * TERA,
    "TPU7x": 2307 / 2 * TERA,
    "NVIDIA A100": 312 * TERA,
    "NVIDIA H100 PCIe": 756 * TERA,
    "NVIDIA H100 NVL": 835 * TERA,
    "NVIDIA H100": 989 * TERA,
    "NVIDIA H200": 989 * TERA,
    "NVIDIA H200 NVL": 835 * TERA,
    "NVIDIA GH200": 989 * TERA,
    "NVIDIA B200": 2250 * TERA,
    "NVIDIA GB200": 2500 * TERA,
}
"""Dense bfloat16 FLOP/s of one JAX device by (the beginning of) its `device_kind`.

Sources: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x, "peak compute per chip (bf16)";
a TPU7x chip is two devices to JAX, one per core, unlike the v4 and v5p, whose two cores are one.
NVIDIA data sheets of the A100 (SXM and PCIe), H100 (SXM, PCIe, NVL), H200 (SXM, NVL), GH200, B200 (HGX)
and GB200, halved where they quote the figure with sparsity. The TPU names are those of JAX's
`pallas.mosaic.tpu_info`; a GPU's has its memory after it ("NVIDIA H100 80GB HBM3").
"""


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device, None where it is not known (CPUs, a slice of a partitioned GPU)."""
    if " MIG " in device_kind:
        return None
    if device_kind.startswith("TPU"):
        return PEAK_FLOPS.get(device_kind)
    matches = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


class _Span(NamedTuple):
    """Steps between two readings."""

    tokens: float
    seconds: float
    steps: int


class Throughput:
    """Rates over the steps since the last reading, less what the clock was stopped for.

    The first step after a start is not counted: it waits for the compiler.

    Args:
      flops_per_token: forward and backward; None leaves MFU out.
      devices: that share the work; by default all of JAX's.
      clock: seconds, for tests.
    """

    def __init__(
        self,
        *,
        flops_per_token: float | None = None,
        devices: list[jax.Device] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        devices = jax.devices() if devices is None else devices
        kind = devices[0].device_kind
        peak = peak_flops(kind)
        self._flops_per_token = flops_per_token
        self._peak = None if peak is None else peak * len(devices)
        if flops_per_token is not None and peak is None:
            logging.info("MFU is left out: the peak FLOP/s of %r is not known", kind)
        self._clock = clock
        self._since: float | None = None
        self._tokens = 0.0
        self._steps = 0
        self._before = _Span(0.0, 0.0, 0)
        self._all_tokens = 0.0
        self._all_seconds = 0.0

    def step_done(self, num_tokens: float) -> None:
        """Counts a step whose results have just arrived."""
        if self._since is None:
            self._since = self._clock()
            return
        self._tokens += num_tokens
        self._steps += 1

    def skip(self, seconds: float) -> None:
        """Leaves out time that went to something else than training steps."""
        if self._since is not None:
            self._since += seconds

    def read(self) -> dict[str, float]:
        """`tokens_per_second`, `step_seconds` and `mfu` since the last call; empty when nothing was counted.

        The results of two steps may arrive at once, so few steps may seem to take no time. After fewer than before the
        last call, as at the end of a run, or in less than half the time for each, the rates are over both.
        """
        if self._since is None or not self._steps:
            return {}
        now = self._clock()
        own = shown = _Span(self._tokens, max(now - self._since, 1e-9), self._steps)
        before = self._before
        if own.steps < before.steps or own.seconds * before.steps < 0.5 * before.seconds * own.steps:
            shown = _Span(own.tokens + before.tokens, own.seconds + before.seconds, own.steps + before.steps)
        self._before = own
        self._all_tokens += own.tokens
        self._all_seconds += own.seconds
        self._since, self._tokens, self._steps = now, 0.0, 0
        return {"step_seconds": shown.seconds / shown.steps, **self._rates(shown.tokens, shown.seconds)}

    def overall(self) -> dict[str, float]:
        """`tokens_per_second` and `mfu` over all that was ever read; empty when nothing was."""
        return self._rates(self._all_tokens, self._all_seconds) if self._all_seconds else {}

    def _rates(self, tokens: float, seconds: float) -> dict[str, float]:
        rates = {"tokens_per_second": tokens / seconds}
        if self._peak is not None and self._flops_per_token is not None:
            rates["mfu"] = rates["tokens_per_second"] * self._flops_per_token / self._peak
        return rates
