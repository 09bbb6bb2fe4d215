"""Evaluation and generation by two processes of four devices: one job, one voice, the same figures."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import portpicker
import pytest

from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data import tokenizer as tokenizer_lib
from tests.tiny import TINY, random_params

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("run"), tokenizer_lib.byte_level()
    cfg = dataclasses.replace(TINY, vocab_size=260).build()
    (path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    with CheckpointStore(path) as store:
        meta = meta_lib.make(cfg, tokenizer=tokenizer.fingerprint)
        store.save(1, meta=meta, params=random_params(cfg), assets={"tokenizer.model": tokenizer.to_bytes()})
    return path


def run(num_processes, module, *args):
    """What each process prints."""
    port = portpicker.pick_unused_port()
    children = []
    for process in range(num_processes):
        job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_PROCESS_ID": str(process)}
        job |= {"JAX_NUM_PROCESSES": str(num_processes)}
        flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={8 // num_processes}"
        children.append(
            subprocess.Popen(
                [sys.executable, "-m", f"experiments.{module}", *args], cwd=REPOSITORY, text=True,
                env=os.environ | {"XLA_FLAGS": flags} | (job if num_processes > 1 else {}),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    outputs = [child.communicate(timeout=300) for child in children]
    assert all(child.returncode == 0 for child in children), outputs
    # What joins the processes speaks on standard output, too.
    return ["".join(x for x in out.splitlines(True) if not x.startswith("[Gloo]")) for out, _ in outputs]


def test_evaluation(workdir, tmp_path):
    found = []
    for num in (1, 2):
        args = (f"--ckpt={workdir}", f"--data={workdir}/text.txt", "--nobaselines", f"--out={tmp_path}/{num}.json")
        first, *others = run(num, "evaluate", *args)
        assert "perplexity" in first and not any(others)
        found.append(json.loads((tmp_path / f"{num}.json").read_text()))
    one, two = found
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6) and two["tokens"] == one["tokens"]


def test_generation(workdir):
    args = (f"--ckpt={workdir}", "--prompt=The quick", "--max_new_tokens=12")
    (alone,) = run(1, "generate", *args)
    # Gloo, which connects the two, now and then writes how many peers it has to standard output.
    together = [re.sub(r"(?m)^.*connected peer ranks.*\n", "", text) for text in run(2, "generate", *args)]
    assert together == [alone, ""]
    assert alone.startswith("The quick")
