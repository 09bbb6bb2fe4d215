"""The protocol between `tools/bench.py` and the processes that it measures; never a speed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import bench

TOOLS = Path(bench.__file__).resolve().parent
# Eight rows, since the tests run on eight simulated devices.
TINY = {
    "kind": "llama",
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "d_model": 8,
    "d_ff": 16,
    "vocab_size": 11,
    "seq_len": 16,
    "batch_size": 8,
}
DECODING = {"prompt_tokens": 4, "new_tokens": 3}
# Embedding and head, queries and output, keys and values, gate with up and down, three norms.
NUM_PARAMS = 2 * 11 * 8 + 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16 + 3 * 8

WORKER = """
import sys
import bench_worker
task = bench_worker.json.loads(sys.argv[2])
print("a library says hello")
if task.get("fails"):
    raise SystemExit(3)
bench_worker.serve(lambda: bench_worker.time.sleep(float(sys.argv[1])), num_params=7, packages=())
"""


@pytest.fixture
def stub(tmp_path):
    """Other libraries: one takes so many seconds a step, in a Python that has nothing but the standard library."""
    path = tmp_path / "worker.py"
    path.write_text(WORKER)

    def make(seconds):
        return bench.Entry(f"stub{seconds}", (sys.executable, "-S", str(path), seconds), {"PYTHONPATH": str(TOOLS)})

    return make


def run(*arguments):
    command = [sys.executable, str(TOOLS / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=120)


@pytest.mark.parametrize("task", [TINY, TINY | DECODING], ids=["training", "decoding"])
def test_gptjax_answers_every_request(task):
    contestant = bench.Contestant(bench.our_entry(), task)
    contestant.measure()
    contestant.measure()
    figures = contestant.finish(tokens=100)
    assert figures["measurements"] == 2 and figures["num_params"] == NUM_PARAMS
    assert figures["versions"].keys() == {"jax", "flax", "optax"}
    assert figures["first_step_seconds"] > 0 and figures["peak_memory_bytes"] > 2**20
    best = figures["step_ms"]["best"]
    assert figures["tokens_per_second"]["best"] == pytest.approx(100 / best * 1e3, rel=1e-2 + 0.01 / best)


def test_contestants_take_turns_and_are_compared_with_the_first(stub):
    task = {"batch_size": 2, "seq_len": 3}
    report = bench.run_task("T", task, entries=[stub("0.1"), stub("0.3")], seconds=0.5)
    first, second = report["figures"]["stub0.1"], report["figures"]["stub0.3"]
    assert first["measurements"] == second["measurements"] >= 1
    assert first["tokens_per_second"]["best"] == pytest.approx(60, rel=0.2)
    # Sleeping takes no processor.
    assert second["processor_ms"]["best"] < 30
    assert report["stub0.1_is_faster_by"]["stub0.3"]["best"] == pytest.approx(3, rel=0.2)


def test_a_worker_that_dies_is_named(stub):
    with pytest.raises(RuntimeError, match="stub0 ended with status 3"):
        bench.Contestant(stub("0"), {"fails": True})


@pytest.mark.parametrize(
    "peer, task, expected",
    [
        ("nanodo", "T1", None),
        ("nanodo", "T3", "no llama"),
        ("nanogpt", "T4", "no mixtral"),
        ("levanter", "T4", None),
        ("maxtext", "T5b1", "not measured in decoding"),
        ("transformers", "T5b8", None),
    ],
)
def test_who_runs_what(peer, task, expected):
    refusal = bench.PEERS[peer].refusal(bench.TASKS[task])
    assert refusal is None if expected is None else expected in refusal


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--tasks=T9"], "--tasks=T9: expected some of T1,"),
        (["--peers=nanochat"], "--peers=nanochat: expected some of transformers,"),
        (["--peers=nanodo"], "add --checkout=nanodo=DIRECTORY"),
        (["--peer_python=/usr/bin/python3"], "expected PEER=PATH"),
        (["--checkout=nanodo=/no/such/folder"], "/no/such/folder: expected PEER=PATH of something that exists"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(arguments, expected):
    process = run(*arguments)
    assert process.returncode == 1 and expected in " ".join(process.stderr.split())


def test_a_peer_that_cannot_do_a_task_sits_it_out(capsys):
    peers = ["transformers", "maxtext"]
    entries = bench.peer_entries("T5b1", peers, pythons={"transformers": "/venv/bin/python"}, checkouts={})
    assert [(entry.name, entry.command[0]) for entry in entries] == [("transformers", "/venv/bin/python")]
    assert capsys.readouterr().err == "T5b1 without maxtext: it is not measured in decoding\n"
