"""What a run may go on from, and start with."""

import dataclasses
import json
import shutil

import pytest

from gptjax.checkpoint import store as store_lib
from gptjax.train.run import run


def test_a_run_does_not_go_on_with_other_tokens(run_config, tmp_path, data_dir):
    stores = tmp_path / "data"
    shutil.copytree(data_dir / "train", stores)
    cfg = run_config(data__train={str(stores): 1.0})
    run(cfg, tmp_path / "run")
    shutil.rmtree(stores)
    shutil.copytree(data_dir / "eval", stores)
    with pytest.raises(ValueError, match=r"data: holds other tokens than the run was trained on \(checksum"):
        run(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, num_steps=9)), tmp_path / "run")
    assert store_lib.committed_steps(tmp_path / "run" / "ckpt") == [3, 6]


def test_a_workdir_of_before_a_key_was_known_goes_on(run_config, tmp_path):
    run(run_config(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["train"]["init_from"], config["train"]["keep_best"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = tmp_path / "ckpt" / "6" / "data" / "metadata"
    found = json.loads(data.read_text())
    del found["contents"]
    data.write_text(json.dumps(found))
    assert run(run_config(train__num_steps=7), tmp_path)["step"] == 7


def test_a_damaged_checkpoint_is_no_finished_run(run_config, tmp_path):
    run(run_config(), tmp_path)
    shutil.rmtree(tmp_path / "ckpt" / "6" / "meta")
    with pytest.raises(ValueError, match="ckpt/6.*cannot be read"):
        run(run_config(), tmp_path)


def test_a_run_may_start_with_the_parameters_of_another(run_config, tmp_path):
    first = run(run_config(), tmp_path / "first")
    cfg = run_config(train__init_from=str(tmp_path / "first"), optim__name="lion", optim__learning_rate=1e-4)
    assert run(cfg, tmp_path / "second")["loss"] < first["loss"]
    longer = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, num_steps=7))
    assert run(longer, tmp_path / "second")["step"] == 7
    first_stage, second_stage = store_lib.read_meta(tmp_path / "second" / "ckpt" / "7").lineage
    assert (first_stage["stage"], second_stage["init_from"], second_stage["init_step"]) == (
        "pretrain", str(tmp_path / "first"), 6,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"init_from=.*first: .* expected \[.*48.*\] from the config, got \["):
        run(run_config(train__init_from=str(tmp_path / "first"), model__d_ff=48), tmp_path / "third")
    with pytest.raises(ValueError, match="nowhere: no checkpoint there"):
        run(run_config(train__init_from=str(tmp_path / "nowhere")), tmp_path / "third")
    assert not (tmp_path / "third").exists()
