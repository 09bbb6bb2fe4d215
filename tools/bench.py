r"""Speed of gptjax on five small tasks, beside other libraries in the same run; one JSON line per task.

    python tools/bench.py --tasks=T1,T2 --seconds=60
    python tools/bench.py --peers=transformers,nanogpt --peers_python=<venv with torch>/bin/python \
        --nanogpt_dir=<checkout>

Every contestant is a process of its own that keeps its compiled step; they take turns, one
measurement each, so that a busy machine slows all of them alike. Compare only within one run.
`tokens_per_second` has the median and the fastest measurement; `processor_seconds` of a step is
what is left to compare when other programs compete for the cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

_TASKS = flags.DEFINE_list("tasks", "T1,T2,T3,T4,T5b1,T5b8", "Which tasks.")
_SECONDS = flags.DEFINE_float("seconds", 60.0, "How long to measure each task, all contestants together.")
_PEERS = flags.DEFINE_list("peers", "", "Of transformers and nanogpt: what to run beside gptjax.")
_PEERS_PYTHON = flags.DEFINE_string("peers_python", sys.executable, "Python that has the peers installed.")
_NANOGPT_DIR = flags.DEFINE_string("nanogpt_dir", None, "Checkout of nanoGPT, for --peers=nanogpt.")
_DEVICES = flags.DEFINE_list(
    "devices", "1", "Simulated CPU devices that gptjax shares the batch over; one contestant each."
)

_CHARACTERS = {"kind": "gpt2", "vocab_size": 65}
_SUBWORDS = {"num_heads": 8, "num_kv_heads": 4, "vocab_size": 8192}
_LLAMA = {"kind": "llama", "num_layers": 8, "d_model": 512, "d_ff": 1408, "seq_len": 512, **_SUBWORDS}
_EXPERTS = {"num_experts": 8, "num_experts_per_token": 2}
_DECODING = {"prompt_tokens": 64, "new_tokens": 128}


def _sizes(num_layers: int, num_heads: int, d_model: int, seq_len: int, batch_size: int) -> dict[str, int]:
    heads = {"num_heads": num_heads, "num_kv_heads": num_heads}
    widths = {"d_model": d_model, "d_ff": 4 * d_model}
    return {"num_layers": num_layers, "seq_len": seq_len, "batch_size": batch_size, **heads, **widths}


TASKS: Mapping[str, Mapping[str, Any]] = {
    "T1": _CHARACTERS | _sizes(4, 4, 128, 64, 12),
    "T2": _CHARACTERS | _sizes(6, 6, 384, 256, 16),
    "T3": _LLAMA | {"batch_size": 4},
    "T4": _SUBWORDS
    | _EXPERTS
    | {"kind": "mixtral", "num_layers": 4, "d_model": 256, "d_ff": 512, "seq_len": 256, "batch_size": 4},
    "T5b1": _LLAMA | _DECODING | {"batch_size": 1},
    "T5b8": _LLAMA | _DECODING | {"batch_size": 8},
}
_HERE = Path(__file__).resolve().parent


class Contestant:
    """A process that measures one library on one task whenever it is asked to."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]):
        self.name = name
        self._log = subprocess.DEVNULL if flags.FLAGS.verbosity < 0 else None
        self._process = subprocess.Popen(
            [*command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        self.started = self._read()
        self._walls: list[float] = []
        self._processors: list[float] = []

    def measure(self) -> None:
        report = self._ask("measure")
        self._walls.append(report["wall_seconds"])
        self._processors.append(report["processor_seconds"])

    def finish(self, tokens: int) -> dict[str, Any]:
        """Ends the process; its figures."""
        peak = self._ask("finish")["peak_memory_bytes"]
        self._process.wait()
        median, fastest = statistics.median(self._walls), min(self._walls)
        return {
            "tokens_per_second": {"median": round(tokens / median, 1), "best": round(tokens / fastest, 1)},
            "step_ms": {"median": round(1e3 * median, 2), "best": round(1e3 * fastest, 2)},
            "processor_ms": {
                "median": round(1e3 * statistics.median(self._processors), 2),
                "best": round(1e3 * min(self._processors), 2),
            },
            "first_step_seconds": round(self.started["first_step_seconds"], 2),
            "peak_memory_bytes": peak,
            "measurements": len(self._walls),
        }

    def _ask(self, request: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # Libraries print to stdout too; ours are the lines that are JSON objects.
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with status {self._process.wait()} before it answered; see its output")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    unknown = [name for name in _TASKS.value if name not in TASKS]
    if unknown:
        raise app.UsageError(f"--tasks={','.join(unknown)}: expected some of {','.join(TASKS)}")
    for name in _TASKS.value:
        print(json.dumps(_run_task(name, TASKS[name])), flush=True)


def _run_task(name: str, task: Mapping[str, Any]) -> dict[str, Any]:
    contestants = []
    for library, command, environment in _entries(task):
        contestants.append(Contestant(library, [*command, json.dumps(dict(task))], environment))
    deadline = time.monotonic() + _SECONDS.value
    while True:
        for contestant in contestants:
            contestant.measure()
        if time.monotonic() > deadline:
            break
    tokens = task["batch_size"] * task.get("new_tokens", task["seq_len"])
    figures = {contestant.name: contestant.finish(tokens) for contestant in contestants}
    first = figures[contestants[0].name]
    ratios = {peer: _ratios(first, theirs) for peer, theirs in figures.items() if theirs is not first}
    return {"task": name, "shape": dict(task), "figures": figures, f"{contestants[0].name}_is_faster_by": ratios}


def _ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """How many times longer a step of theirs takes."""
    wall, processor = "step_ms", "processor_ms"
    figures = {"median": (wall, "median"), "best": (wall, "best"), "processor": (processor, "median")}
    return {name: round(theirs[part][key] / ours[part][key], 2) for name, (part, key) in figures.items()}


def _entries(task: Mapping[str, Any]) -> list[tuple[str, list[str], dict[str, str]]]:
    """Name, command and environment of everyone who can run the task."""
    root = {"PYTHONPATH": os.pathsep.join([str(_HERE.parent), os.environ.get("PYTHONPATH", "")])}
    entries = []
    for devices in _DEVICES.value:
        environment = dict(root)
        if devices != "1":
            forced = f"--xla_force_host_platform_device_count={devices}"
            environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {forced}".strip()
        name = "gptjax" if devices == "1" else f"gptjax_{devices}_devices"
        entries.append((name, [sys.executable, str(_HERE / "bench_gptjax.py")], environment))
    for peer in _PEERS.value:
        if peer == "nanogpt" and (task["kind"] != "gpt2" or "new_tokens" in task):
            continue
        command = [_PEERS_PYTHON.value, str(_HERE / "bench_peers.py"), peer, _NANOGPT_DIR.value or ""]
        entries.append((peer, command, {}))
    return entries


if __name__ == "__main__":
    app.run(main)
