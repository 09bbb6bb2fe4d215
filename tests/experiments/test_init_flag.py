"""`--init` of the commands that train: a checkpoint's parameters in the architecture that they have there."""

import subprocess
import sys
from pathlib import Path

import pytest

import gptjax
from gptjax.checkpoint import meta as meta_lib
from gptjax.checkpoint.store import CheckpointStore
from gptjax.data import source, tokenizer, writer
from gptjax.nn.sharing import SharingConfig
from gptjax.nn.spec import ModelSpec
from tests.tiny import TINY, random_params

REPOSITORY = Path(__file__).parents[2]
SPEC = ModelSpec(**vars(TINY) | {"vocab_size": 260, "sharing": SharingConfig(pattern="all")})
SHORT = (
    "--config.model.seq_len=16", "--config.train.num_steps=2", "--config.data.batch_size=8",
    "--config.train.eval_batches=1", "--config.model.dtype=float32",
)  # fmt: skip


def run(command: str, directory: Path, *flags: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", f"experiments.{command}", f"--config=configs/demo.py:{directory}", *flags]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint whose layers share weights, in `shared`, and tokens as `experiments.prepare_data` leaves them."""
    path, pieces = tmp_path_factory.mktemp("run"), tokenizer.byte_level()
    (path / tokenizer.FILE_NAME).write_bytes(pieces.to_bytes())
    for split in ("train", "eval"):
        documents = (source.Document(f"{split}{i}", f"def f{i}(x):\n    return x + {i}\n" * 9) for i in range(8))
        writer.write_store(path / split, documents, pieces, description=split)
    meta = meta_lib.make(SPEC.build(), step=5, tokenizer=pieces.fingerprint, lineage=[{"stage": "share"}])
    with CheckpointStore(path / "shared") as store:
        store.save(5, meta=meta, params=random_params(SPEC.build(), scale=0.1))
    return path


def test_training_goes_on_in_the_architecture_of_the_checkpoint(directory, tmp_path):
    init = f"--init={directory}/shared"
    result = run("distill", directory, init, f"--teacher={directory}/shared", f"--workdir={tmp_path}/run", *SHORT)
    assert result.returncode == 0, result.stderr
    assert "differs" not in result.stderr
    model = gptjax.load(tmp_path / "run")
    assert model.config == SPEC.build() and model.config.groups[0].shared
    assert [entry["stage"] for entry in model.meta.lineage] == ["share", "distill"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.model.num_layers=2"], "--config.model.num_layers has no effect: the model is that of --init="),
        (["--config.train.init_from=runs/x"], "--init and --config.train.init_from both say what training starts from"),
    ],
)
def test_what_cannot_be_meant_is_one_line(directory, tmp_path, flags, message):
    result = run("pretrain", directory, f"--init={directory}/shared", f"--workdir={tmp_path}/run", *flags)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
