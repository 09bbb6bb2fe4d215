"""Checkpoints on gs://, where renaming copies and so a file marks what is complete.

Nothing is sent anywhere, see the fixture. TensorStore reaches buckets by itself, so these checkpoints hold
no arrays; everything else about them is what is written to a real bucket.
"""

import pytest
from etils import epath

from gptjax.checkpoint import directory
from gptjax.checkpoint import store as store_lib
from gptjax.checkpoint.store import CheckpointStore
from tests.checkpoint import tiny


def save(store, step):
    store.save(step, meta=tiny.meta(), params={}, data={"row": step}, assets={"tok": b"x"})


def names(path):
    return sorted(child.name for child in epath.Path(path).iterdir())


@pytest.fixture
def saved(bucket):
    with CheckpointStore(f"{bucket}/run", keep_last=2) as store:
        for step in (1, 2, 3):
            save(store, step)
    return f"{bucket}/run"


def test_checkpoints_are_kept_and_read_as_elsewhere(saved):
    assert names(f"{saved}/ckpt") == ["2", "3"]
    found = store_lib.find(saved)
    assert str(found) == "gs://bucket/run/ckpt/3"
    assert store_lib.read_meta(found).step == 3
    assert store_lib.read_assets(found) == {"tok": b"x"}
    store = CheckpointStore(saved)
    assert store.latest() == 3
    assert store.restore(3, params={}).data == {"row": 3}
    store.close()


def test_without_its_mark_a_checkpoint_is_none_and_the_next_run_removes_it(saved):
    (epath.Path(saved) / "ckpt" / "3" / directory.COMMIT_MARK).unlink()
    assert str(store_lib.find(saved)) == "gs://bucket/run/ckpt/2"
    with pytest.raises(ValueError, match="ckpt/3: saving was interrupted before the checkpoint was complete"):
        store_lib.find(f"{saved}/ckpt/3")
    assert names(f"{saved}/ckpt") == ["2", "3"], "a reader removes nothing"
    with CheckpointStore(saved, keep_last=2) as store:
        assert store.steps() == [2]
        assert names(f"{saved}/ckpt") == ["2"]
        save(store, 3)
    assert store.latest() == 3


def test_with_its_mark_a_checkpoint_that_lost_files_is_damaged_not_absent(saved):
    (epath.Path(saved) / "ckpt" / "3" / "meta").rmtree()
    with CheckpointStore(saved, keep_last=2) as store:
        assert store.latest() == 3
        with pytest.raises(ValueError, match="ckpt/3: the checkpoint exists but its 'meta' cannot be read"):
            store.restore(3, params={})


def test_a_removal_that_is_cut_short_leaves_no_damaged_checkpoint(saved, monkeypatch):
    monkeypatch.setattr(type(epath.Path(saved)), "rmtree", lambda self: None)
    directory.remove(epath.Path(saved) / "ckpt" / "2")
    assert directory.committed_steps(epath.Path(saved) / "ckpt") == [3]
