r"""Speed of gptjax on five small tasks, beside other libraries in the same run; one JSON line per task.

    python tools/bench.py --tasks=T1,T2 --seconds=60
    python tools/bench.py --seconds=300 --peers=transformers,nanogpt,nanodo,levanter,maxtext \
        --peer_python=transformers=torch/bin/python --peer_python=nanogpt=torch/bin/python \
        --peer_python=nanodo=nanodo/bin/python --peer_python=levanter=levanter/bin/python \
        --peer_python=maxtext=maxtext/bin/python \
        --checkout=nanogpt=src/nanoGPT --checkout=nanodo=src/nanodo

An environment for each family of peers, in which these make what they need:

    transformers, nanogpt  pip install torch transformers
    nanodo                 pip install jax flax optax orbax-checkpoint grain ml_collections clu sentencepiece \
                               tensorflow_datasets tensorflow-cpu tensorboard
    levanter               pip install marin-levanter              (its name on PyPI since 2026; Python >= 3.12)
    maxtext                pip install maxtext, whose extras are for accelerators: --no-deps, and add what the
                           import of maxtext.trainers.pre_train.train asks for        (Python >= 3.12)

Training is the whole step in float32: loss, gradients, clipping to norm 1, AdamW. Every contestant is
a process of its own that keeps its compiled step; they take turns, one measurement each, so that a busy
machine slows all of them alike. Compare only within one run. `tokens_per_second` has the median and the
fastest measurement; `processor_seconds` of a step is what is left to compare when other programs compete
for the cores. A peer that has no such model or cannot decode sits the task out, which stderr says.
"""

from __future__ import annotations

import dataclasses
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

from gptjax.kernels import cpu

_TASKS = flags.DEFINE_list("tasks", "T1,T2,T3,T4,T5b1,T5b8", "Which tasks.")
_SECONDS = flags.DEFINE_float("seconds", 60.0, "How long to measure each task, all contestants together.")
_PEERS = flags.DEFINE_list(
    "peers", "", "What to run beside gptjax: some of transformers, nanogpt, nanodo, levanter, maxtext."
)
_PEER_PYTHON = flags.DEFINE_multi_string(
    "peer_python", [], "PEER=PATH of the Python that has this peer installed, once for each; else the one running this."
)
_CHECKOUT = flags.DEFINE_multi_string(
    "checkout", [], "PEER=DIRECTORY of the sources of nanogpt and nanodo, which no registry has."
)
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


@dataclasses.dataclass(frozen=True)
class Peer:
    """What another library can run here.

    Attributes:
      worker: the file beside this one that measures it.
      kinds: of model, as `TASKS` names them, that it has.
      decodes: whether it is measured in decoding with a cache.
      checkout: whether it runs from its sources.
    """

    worker: str
    kinds: tuple[str, ...] = ("gpt2", "llama", "mixtral")
    decodes: bool = False
    checkout: bool = False

    def refusal(self, task: Mapping[str, Any]) -> str | None:
        """Why it sits the task out."""
        if task["kind"] not in self.kinds:
            return f"it has no {task['kind']} model"
        if "new_tokens" in task and not self.decodes:
            return "it is not measured in decoding"
        return None


PEERS: Mapping[str, Peer] = {
    "transformers": Peer("bench_peers_torch.py", decodes=True),
    "nanogpt": Peer("bench_peers_torch.py", kinds=("gpt2",), checkout=True),
    "nanodo": Peer("bench_peers_jax.py", kinds=("gpt2",), checkout=True),
    "levanter": Peer("bench_peers_jax.py"),
    "maxtext": Peer("bench_peers_jax.py"),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a contestant is started; the task as JSON is the last argument."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Contestant:
    """A process that measures one library on one task whenever it is asked to."""

    def __init__(self, entry: Entry, task: Mapping[str, Any]):
        self.name = entry.name
        self._process = subprocess.Popen(
            [*entry.command, json.dumps(dict(task))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**cpu.start_environment(), **entry.environment},  # the same memory for all contestants
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
            "num_params": self.started["num_params"],
            "versions": self.started["versions"],
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
    _check_known("tasks", _TASKS.value, TASKS)
    _check_known("peers", _PEERS.value, PEERS)
    pythons, checkouts = _paths("peer_python", _PEER_PYTHON.value), _paths("checkout", _CHECKOUT.value)
    for name in _PEERS.value:
        if PEERS[name].checkout and name not in checkouts:
            raise app.UsageError(f"--peers={name} runs from its sources: add --checkout={name}=DIRECTORY")
    for name in _TASKS.value:
        peers = peer_entries(name, _PEERS.value, pythons=pythons, checkouts=checkouts)
        entries = [our_entry(devices) for devices in _DEVICES.value] + peers
        print(json.dumps(run_task(name, TASKS[name], entries=entries, seconds=_SECONDS.value)), flush=True)


def _check_known(flag: str, names: Sequence[str], known: Mapping[str, Any]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise app.UsageError(f"--{flag}={','.join(unknown)}: expected some of {','.join(known)}")


def _paths(flag: str, values: Sequence[str]) -> dict[str, str]:
    """PEER=PATH, as a mapping; paths that are not there are refused before anything is measured."""
    paths = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or not Path(path).exists():
            raise app.UsageError(f"--{flag}={value}: expected PEER=PATH of something that exists")
        _check_known(flag, [name], PEERS)
        # Not resolved: a virtual environment's Python is a link whose place says which environment it is.
        paths[name] = os.path.abspath(path)
    return paths


def run_task(name: str, task: Mapping[str, Any], *, entries: Sequence[Entry], seconds: float) -> dict[str, Any]:
    """Everyone's figures, and how many times faster the first of `entries` is than each other."""
    contestants = [Contestant(entry, task) for entry in entries]
    deadline = time.monotonic() + seconds
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


def our_entry(devices: str = "1") -> Entry:
    """Gptjax, on so many simulated devices of the CPU."""
    command = (sys.executable, str(_HERE / "bench_gptjax.py"))
    environment = {"PYTHONPATH": os.pathsep.join([str(_HERE.parent), os.environ.get("PYTHONPATH", "")])}
    if devices == "1":
        return Entry("gptjax", command, environment)
    forced = f"--xla_force_host_platform_device_count={devices}"
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {forced}".strip()
    return Entry(f"gptjax_{devices}_devices", command, environment)


def peer_entries(
    task: str, peers: Sequence[str], *, pythons: Mapping[str, str], checkouts: Mapping[str, str]
) -> list[Entry]:
    """Those of `peers` that can run the task; the others are told of on stderr."""
    entries = []
    for name in peers:
        peer = PEERS[name]
        refusal = peer.refusal(TASKS[task])
        if refusal:
            print(f"{task} without {name}: {refusal}", file=sys.stderr)
            continue
        python = pythons.get(name, sys.executable)
        entries.append(Entry(name, (python, str(_HERE / peer.worker), name, checkouts.get(name, ""))))
    return entries


if __name__ == "__main__":
    app.run(main)
