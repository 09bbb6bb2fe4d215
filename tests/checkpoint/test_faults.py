"""What goes wrong on real machines: kills, full disks, damaged files, two processes."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import store as store_lib
from gptjax.checkpoint.store import CheckpointStore, restore_params
from tests.checkpoint import tiny

REPOSITORY = Path(__file__).resolve().parents[2]

KILLED = """
import asyncio, os, signal, sys
import orbax.checkpoint as ocp
from gptjax.checkpoint import files, store as store_lib
from tests.checkpoint import tiny

store = store_lib.CheckpointStore(sys.argv[1])
tiny.save(store, 1)
store.wait()

write_files = files.FilesHandler.async_save

async def never_done(self, directory, args):
    late = ocp.future.CommitFutureAwaitingContractedSignals(asyncio.sleep(600), name="late")
    return await write_files(self, directory, args) + [late]

files.FilesHandler.async_save = never_done
tiny.save(store, 2)
while not list(store.directory.glob("2.*/params*")):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""

TWO_PROCESSES = """
import os, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[3]))
import numpy as np
from gptjax.checkpoint.store import CheckpointStore
from gptjax.parallel import rules
from gptjax.parallel.mesh import MeshConfig, make_mesh
from tests.checkpoint import tiny

mesh = make_mesh(MeshConfig(data=1, fsdp=4, expert=1, context=1, tensor=1, rules="standard"))
values = np.arange(64, dtype=np.float32).reshape(8, 8)
place = rules.sharding(mesh, ("embed", "mlp"), values.shape)
params = {"w": jax.make_array_from_callback(values.shape, place, lambda index: values[index])}
store = CheckpointStore(sys.argv[1], keep_last=1)
for step in (1, 2):
    store.save(step, meta=tiny.meta(), params=params, assets={"a": b"b"}, data={"step": step})
store.close()
assert store.latest() == 2, store.steps()
found = store.restore(2, params={"w": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=place)})
assert found.data == {"step": 2} and found.assets == {"a": b"b"}
for shard in found.params["w"].addressable_shards:
    np.testing.assert_array_equal(shard.data, values[shard.index])
"""


def script(text, *args, num_devices=1):
    env = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
    }
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def saved(tmp_path):
    """A workdir whose newest checkpoint is 2."""
    store = CheckpointStore(tmp_path, keep_last=2)
    tiny.save(store, 1, assets={"tok": b"x"})
    tiny.save(store, 2, assets={"tok": b"x"})
    store.close()
    return tmp_path


def restore_all(workdir, step=2):
    store = CheckpointStore(workdir, keep_last=2)
    values = tiny.params()
    try:
        return store.restore(
            step, params=tiny.abstract(values), opt_state=tiny.abstract(tiny.opt_state(values)), extra=()
        )
    finally:
        store.close()


def test_a_kill_while_saving_leaves_the_checkpoint_before_it(tmp_path, caplog):
    process = script(KILLED, tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    unfinished = [path.name for path in (tmp_path / "ckpt").iterdir() if path.name != "1"]
    assert [name.split(".")[0] for name in unfinished] == ["2"]
    meta, found = restore_params(tmp_path)
    assert meta.step == 1
    tiny.assert_same_bits(found, tiny.params(1))
    assert (tmp_path / "ckpt" / unfinished[0]).exists(), "a reader must not touch what may be another's save"
    with caplog.at_level(logging.WARNING, logger="absl"):
        store = CheckpointStore(tmp_path)
    assert "removing it was interrupted" in caplog.text
    assert store.latest() == 1
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["1"]
    tiny.save(store, 2)
    store.close()
    assert store.latest() == 2


def files_of(workdir, step="2"):
    root = workdir / "ckpt" / step
    return [path for path in sorted(root.rglob("*")) if path.is_file()]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that were under way
@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[: len(content) // 2], None])
def test_an_emptied_cut_or_deleted_file_never_gives_other_values(saved, damage):
    stopped = set()
    for path in files_of(saved):
        content = path.read_bytes()
        path.unlink() if damage is None else path.write_bytes(damage(content))
        before = tiny.bytes_under(saved)
        try:
            # Orbax keeps some files that it does not need; without them the values must be the same.
            found = restore_all(saved)
            tiny.assert_same_bits(found.params, tiny.params(2))
            tiny.assert_same_bits(found.opt_state, tiny.opt_state(tiny.params(2)))
            assert found.assets == {"tok": b"x"}
        except ValueError as error:
            assert str(saved / "ckpt" / "2") in str(error)
            stopped.add(path.relative_to(saved / "ckpt" / "2").parts[0])
        assert tiny.bytes_under(saved) == before
        path.write_bytes(content)
    assert stopped == {"params", "opt_state", "meta", "data", "assets"}
    gc.collect()  # what TensorStore was reading complains when it is collected; here, where that is ignored


def test_one_flipped_bit_in_the_values_stops_with_the_path(saved):
    kernel = np.asarray(tiny.params(2)["group_0"]["block_0"]["mlp"]["up"]["kernel"]).tobytes()
    holders = [path for path in files_of(saved) if kernel in path.read_bytes()]
    assert holders, "the values should lie uncompressed in the files"
    for path in holders:
        content = bytearray(path.read_bytes())
        content[content.index(kernel) + 100] ^= 1
        path.write_bytes(content)
    before = tiny.bytes_under(saved)
    message = f"{saved / 'ckpt' / '2'}: the checkpoint exists but its 'params' cannot be read .*up/kernel.*checksum"
    with pytest.raises(ValueError, match=message):
        restore_all(saved)
    with pytest.raises(ValueError, match=message):
        restore_params(saved)
    with pytest.raises(ValueError, match=message):
        restore_params(saved, dtype=jnp.bfloat16)
    assert tiny.bytes_under(saved) == before
    assert restore_all(saved, step=1).meta.step == 1


@pytest.mark.parametrize("lost", ["params", "meta", "*"])
def test_a_checkpoint_that_lost_its_files_is_never_taken_for_absent(saved, lost):
    for path in (saved / "ckpt" / "2").glob(lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    store = CheckpointStore(saved, keep_last=2)
    assert store.latest() == 2
    tiny.save(store, 2)
    store.close()
    with pytest.raises(ValueError, match=f"{saved / 'ckpt' / '2'}: .* cannot be read .* go on from step 1"):
        restore_params(saved)
    with pytest.raises(ValueError, match="cannot be read"):
        restore_all(saved)


@contextlib.contextmanager
def largest_file(num_bytes):
    """Writing more to one file fails, as on a full disk (with another errno)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_good_checkpoint(saved):
    store = CheckpointStore(saved, keep_last=1)
    before = tiny.bytes_under(saved / "ckpt" / "2")
    with largest_file(100_000):
        with pytest.raises(ValueError, match="ckpt/3: could not be written .*last good checkpoint is .*ckpt/2"):
            store.save(3, meta=tiny.meta(), params={"w": jnp.ones((512, 512))})
            store.wait()
    assert store.latest() == 2
    assert tiny.bytes_under(saved / "ckpt" / "2") == before
    assert not list((saved / "ckpt").glob("3*")), "what was written of it frees the disk"
    store.save(4, meta=tiny.meta(), params={"w": jnp.ones((512, 512))})
    store.close()
    assert store.steps() == [4]


def test_too_little_memory_is_not_blamed_on_the_files(saved, monkeypatch):
    def exhausted(*args, **kwargs):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")

    monkeypatch.setattr(store_lib.arrays, "read", exhausted)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        restore_params(saved)


def test_two_processes_write_one_checkpoint(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [script(TWO_PROCESSES, tmp_path, port, index, num_devices=2) for index in range(2)]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    _, found = restore_params(tmp_path, shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    np.testing.assert_array_equal(found["w"], np.arange(64, dtype=np.float32).reshape(8, 8))
