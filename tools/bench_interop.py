"""Time and peak memory of importing and exporting a large model, made on the spot.

    python -m tools.bench_interop --directory=large --gigabytes=8

Writes a Llama-type Hugging Face folder of random bfloat16 values, imports it, and exports the checkpoint again, each
in a process of its own whose peak resident memory is taken; --kill also kills each half-way once, to be taken up. One
JSON line each. Needs three times the size on disk; what it made is removed unless --keep.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
from absl import app, flags

from gptjax.interop import safetensors, table
from gptjax.interop.families import FAMILIES
from gptjax.json_files import write_json
from gptjax.nn.spec import ModelSpec

_DIRECTORY = flags.DEFINE_string("directory", None, "A new directory to work in.", required=True)
_GIGABYTES = flags.DEFINE_float("gigabytes", 8.0, "Size of the model, about.", lower_bound=0.01)
_KILL = flags.DEFINE_bool("kill", False, "Kill each command half-way, and start it again.")
_KEEP = flags.DEFINE_bool("keep", False, "Leave what was made.")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def main(argv: list[str]) -> None:
    del argv
    root = pathlib.Path(_DIRECTORY.value)
    root.mkdir(parents=True)
    began = time.perf_counter()
    num_bytes, largest = _make(root / "source", _GIGABYTES.value)
    bound = 2 * largest + 10**9
    print(
        json.dumps({"made": num_bytes, "largest_tensor": largest, "seconds": time.perf_counter() - began}), flush=True
    )
    commands = {
        "import": ["experiments.import_model", f"--src={root / 'source'}", f"--dst={root / 'checkpoint'}"],
        "export": ["experiments.export", f"--ckpt={root / 'checkpoint'}", "--format=hf", f"--dst={root / 'exported'}"],
    }
    for name, arguments in commands.items():
        figures = _run([sys.executable, "-m", *arguments, "--proof=values"], after=_seconds_to_kill(num_bytes))
        rate = num_bytes / 1e6 / figures["seconds"]
        print(json.dumps({"command": name, **figures, "megabytes_per_second": rate, "bound": bound}), flush=True)
    same = all(
        np.array_equal(tensor.read().view(np.uint16), other.read().view(np.uint16))
        for tensor, other in _pairs(root / "source", root / "exported")
    )
    print(json.dumps({"exported_equals_source": same}))
    if not _KEEP.value:
        shutil.rmtree(root)


def _make(folder: pathlib.Path, gigabytes: float) -> tuple[int, int]:
    """Writes the folder; returns its bytes and those of its largest tensor."""
    family = FAMILIES["llama"]
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * 32_000 * 4096) / 218e6))
    model = ModelSpec(
        vocab_size=32_000,
        seq_len=4096,
        d_model=4096,
        num_layers=layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        d_ff=14_336,
        activation="swiglu",
        position="rope",
        rope_theta=10_000.0,
        tie_embeddings=False,
        dtype="auto",
        remat="none",
    ).build()
    shapes = {unit.theirs: (unit.theirs_shape, _BFLOAT16) for unit in table.units(family, model)}
    folder.mkdir()
    writer = safetensors.SafetensorsWriter(folder, safetensors.plan_shards(shapes, max_shard_bytes=2 * 10**9))
    random = np.random.default_rng(0)
    for name, (shape, _) in shapes.items():
        # Random exponents near those of weights, for a hundredth of the time of normal values.
        bits = random.integers(0, 1 << 16, int(np.prod(shape)), dtype=np.uint16) & 0x807F | 0x3C00
        writer.write(name, bits.view(_BFLOAT16).reshape(shape))
    write_json(folder / "config.json", {"model_type": family.name, **family.write_config(model)})
    sizes = [2 * int(np.prod(shape)) for shape, _ in shapes.values()]
    return sum(sizes), max(sizes)


def _seconds_to_kill(num_bytes: int) -> float | None:
    return num_bytes / 1e9 if _KILL.value else None


def _run(command: list[str], *, after: float | None) -> dict[str, Any]:
    """Runs a command to its end; its seconds and peak memory, both runs where it is killed once."""
    began, kills, peak = time.perf_counter(), 0, 0
    if after is not None:
        process = subprocess.Popen(command)
        killer = threading.Timer(after, process.kill)
        killer.start()
        status, peak = _waited(process)
        killer.cancel()
        kills = int(status == -signal.SIGKILL)
    status, last = _waited(subprocess.Popen(command))
    seconds = time.perf_counter() - began
    return {"status": status, "kills": kills, "seconds": seconds, "peak_memory_bytes": max(peak, last)}


def _waited(process: subprocess.Popen) -> tuple[int, int]:
    """A process's exit status and its own peak resident memory, which `getrusage` only has of all children so far."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * 1024


def _pairs(source: pathlib.Path, exported: pathlib.Path) -> Any:
    ours, theirs = safetensors.SafetensorsFolder(source), safetensors.SafetensorsFolder(exported)
    assert ours.keys() == theirs.keys(), "the same tensors"
    return ((ours[name], theirs[name]) for name in ours)


if __name__ == "__main__":
    app.run(main)
