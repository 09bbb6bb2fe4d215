import collections
import dataclasses
import itertools
import logging
import threading
import time

import jax
import numpy as np
import pytest

from gptjax import config
from gptjax.data import loader, mixture, packing, store, tokenizer, writer
from gptjax.data.source import Document

BYTES = tokenizer.byte_level()
RNG = np.random.default_rng(0)
SEQ_LEN = 24


def random_documents(count, *, alphabet):
    lengths = RNG.integers(1, 70, count)
    return [Document(f"d{i}", "".join(RNG.choice(list(alphabet), length))) for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    for name, alphabet, count in (("lower", "abcdef", 30), ("upper", "ABCDEF", 11), ("held_out", "xyz é", 17)):
        documents = random_documents(count, alphabet=alphabet)
        writer.write_store(directory / name, documents, BYTES, description=name, shard_bytes=500)
    tokenizer.save(BYTES, directory / tokenizer.FILE_NAME)
    return directory


@pytest.fixture
def cfg(directory):
    return loader.DataConfig(
        train={str(directory / "lower"): 0.75, str(directory / "upper"): 0.25},
        eval=str(directory / "held_out"),
        tokenizer=str(directory),
        batch_size=8,
        packing="concat",
        prefetch=3,
    )


def only(cfg, directory, name):
    return dataclasses.replace(cfg, train={str(directory / name): 1.0})


def take(cfg, count, *, start_step=0, **options):
    data = loader.TrainData(cfg, seq_len=SEQ_LEN, **({"seed": 1} | options))
    batches = loader.train_batches(data, start_step=start_step)
    return list(itertools.islice(batches, count))


def joined(batches):
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_shapes_and_types(cfg):
    (batch,) = take(cfg, 1)
    assert batch.notes == ()  # which has no leaf
    for path, array in jax.tree_util.tree_leaves_with_path(batch):
        name = path[0].name
        assert isinstance(array, np.ndarray)
        assert array.shape == (8, SEQ_LEN)
        assert array.dtype == (np.float32 if name == "loss_mask" else np.int32)


@pytest.mark.parametrize("kind", ["concat", "best_fit"])
def test_resumed_equals_uninterrupted_across_epochs(cfg, kind):
    cfg = dataclasses.replace(cfg, packing=kind)
    whole = take(cfg, 60)
    assert_equal(joined(whole[23:]), joined(take(cfg, 37, start_step=23)))


@pytest.mark.parametrize("kind", ["concat", "best_fit"])
def test_any_number_of_hosts_sees_the_same_batches(cfg, kind):
    cfg = dataclasses.replace(cfg, packing=kind)
    whole = take(cfg, 12)
    for num_hosts in (2, 4, 8):
        parts = [take(cfg, 12, num_hosts=num_hosts, host=host) for host in range(num_hosts)]
        for step, batch in enumerate(whole):
            assert_equal(batch, joined([part[step] for part in parts]))


def test_prefetching_changes_nothing(cfg):
    ahead = take(cfg, 20)
    assert_equal(joined(ahead), joined(take(dataclasses.replace(cfg, prefetch=0), 20)))
    data = loader.TrainData(cfg, seq_len=SEQ_LEN, seed=1)
    assert_equal(ahead[17], data[17])


def test_prefetch_threads_end_with_the_iterator(cfg):
    before = set(threading.enumerate())
    batches = loader.train_batches(loader.TrainData(cfg, seq_len=SEQ_LEN, seed=1))
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    del batches
    deadline = time.monotonic() + 10
    while any(thread.is_alive() for thread in started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize("kind", ["concat", "best_fit"])
def test_an_epoch_has_every_target_of_every_document_once(cfg, directory, kind):
    cfg = dataclasses.replace(only(cfg, directory, "lower"), packing=kind, batch_size=1)
    opened = store.open_store(directory / "lower")
    num_rows = packing.plan(opened.starts, SEQ_LEN, kind).num_rows
    expected = collections.Counter(
        pair for i in range(opened.num_documents) for pair in itertools.pairwise(opened.document(i).tolist())
    )
    epochs = [take(cfg, num_rows, start_step=epoch * num_rows) for epoch in (0, 1, 7)]
    for epoch in epochs:
        batch = joined(epoch)
        real = batch.loss_mask > 0
        pairs = zip(batch.tokens[real].tolist(), batch.targets[real].tolist(), strict=True)
        assert collections.Counter(pairs) == expected
    orders = [[batch.tokens.tobytes() for batch in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize("kind", ["concat", "best_fit"])
def test_targets_follow_their_tokens_and_never_leave_the_document(cfg, kind):
    batch = joined(take(dataclasses.replace(cfg, packing=kind), 30))
    real = batch.segment_ids > 0
    np.testing.assert_array_equal(real, batch.loss_mask == 1)
    # Within a segment, targets are the tokens one later, and positions count on.
    same = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & real[:, 1:]
    np.testing.assert_array_equal(batch.targets[:, :-1][same], batch.tokens[:, 1:][same])
    np.testing.assert_array_equal(batch.positions[:, 1:][same], batch.positions[:, :-1][same] + 1)
    # Where a segment starts, positions restart; a start token is only ever an input, an end only a target.
    starts = real & (np.diff(batch.segment_ids, axis=1, prepend=0) > 0)
    assert np.all(batch.positions[starts] == 0)
    assert BYTES.bos_id not in batch.targets[real]
    assert BYTES.eos_id not in batch.tokens[real]
    # Padding is all zeros.
    for array in jax.tree.leaves(batch):
        assert not np.any(array[~real])


def test_mixture_weights_are_kept_in_rows(cfg):
    batch = joined(take(cfg, 50))
    letters = np.where(batch.tokens < 256, batch.tokens, 0).max(axis=1)
    num_upper = int((letters < ord("a")).sum())
    assert num_upper == 100


def test_what_is_trained_on_is_told_at_the_start(cfg, directory, caplog):
    with caplog.at_level(logging.INFO, logger="absl"):
        take(cfg, 0)
    opened = store.open_store(directory / "lower")
    num_rows = packing.plan(opened.starts, SEQ_LEN, "concat").num_rows
    padding = 1 - (opened.num_tokens - 30) / (num_rows * SEQ_LEN)
    line = (
        f"{directory / 'lower'}: 75.00% of the rows, 30 documents, {opened.num_tokens:,} tokens, "
        f"{num_rows} rows an epoch, {padding:.2%} of them padding"
    )
    title, lower, upper = caplog.records[-1].getMessage().split("\n")
    assert (title, lower) == ("data", line)
    assert upper.startswith(f"{directory / 'upper'}: 25.00% of the rows, 11 documents")


def test_order_of_the_sources_in_the_config_does_not_matter(cfg):
    turned = dataclasses.replace(cfg, train=dict(reversed(cfg.train.items())))
    assert_equal(joined(take(cfg, 5)), joined(take(turned, 5)))


def test_seed_changes_the_order(cfg):
    one, other = (joined(take(cfg, 5, seed=seed)) for seed in (1, 2))
    assert np.any(one.tokens != other.tokens)


def test_golden_batch(cfg, directory):
    """A change here makes resumed runs see other data; say so in the log if it must be."""
    documents = [Document(f"d{i}", chr(97 + i) * (5 * i % 17 + 1)) for i in range(12)]
    writer.write_store(directory / "golden", documents, BYTES, description="golden")
    (batch,) = take(only(cfg, directory, "golden"), 1, seed=0)
    rows = ["".join(chr(t) if t < 256 else "^" for t in row) for row in batch.tokens.tolist()]
    padding = chr(0) * 4
    assert rows == [
        f"kkkkkkkkkkkkkk^lllll{padding}",
        "^a^bbbbbb^ccccccccccc^dd",
        "dddddddddddddd^eeee^ffff",
        "iiiiiii^jjjjjjjjjjjj^kkk",
        "fffff^gggggggggggggg^hh^",
        f"kkkkkkkkkkkkkk^lllll{padding}",  # the second epoch starts here
        "^a^bbbbbb^ccccccccccc^dd",
        "dddddddddddddd^eeee^ffff",
    ]


# Evaluation


def eval_of(directory, **options):
    return loader.eval_batches(directory / "held_out", **({"batch_size": 4, "seq_len": SEQ_LEN} | options))


def scored(batch):
    return collections.Counter(
        zip(batch.tokens[batch.loss_mask > 0].tolist(), batch.targets[batch.loss_mask > 0].tolist(), strict=True)
    )


@pytest.mark.parametrize("stride", [None, 1, 7, SEQ_LEN])
def test_evaluation_scores_every_target_once(directory, stride):
    opened = store.open_store(directory / "held_out")
    batches = eval_of(directory, stride=stride)
    expected = collections.Counter(
        pair for i in range(opened.num_documents) for pair in itertools.pairwise(opened.document(i).tolist())
    )
    for _ in range(2):  # it can be iterated again
        whole = joined(list(batches))
        assert scored(whole) == expected
    assert whole.tokens.shape == (4 * len(batches), SEQ_LEN)
    assert batches.num_targets == whole.loss_mask.sum() == opened.num_tokens - opened.num_documents
    assert batches.num_bytes == opened.num_bytes


def test_evaluation_gives_windows_context_that_is_not_scored(directory):
    whole = joined(list(eval_of(directory, stride=6)))
    unscored = (whole.segment_ids > 0) & (whole.loss_mask == 0)
    assert unscored.any()
    # All but the first window of a document have at least seq_len - stride pairs of context.
    begins_inside = (whole.segment_ids == 1) & (whole.positions == 0) & (whole.tokens != BYTES.bos_id)
    assert begins_inside.any()
    for row in np.flatnonzero(begins_inside.any(axis=1)):
        assert np.argmax(whole.loss_mask[row]) >= SEQ_LEN - 6


def test_a_part_of_the_evaluation_has_its_own_bytes(directory):
    part = eval_of(directory, max_batches=2, stride=5)
    batches = list(part)
    assert len(batches) == len(part) == 2
    whole = joined(batches)
    targets = whole.targets[whole.loss_mask > 0]
    assert part.num_targets == len(targets)
    assert part.num_bytes == len(BYTES.decode_bytes(targets.tolist()))
    everything = eval_of(directory, stride=5)
    assert not scored(whole) - scored(joined(list(everything)))
    assert eval_of(directory, max_batches=10**6, stride=5).num_bytes == everything.num_bytes


def test_evaluation_over_hosts_is_the_same(directory):
    for whole, *parts in zip(
        eval_of(directory), *(eval_of(directory, num_hosts=2, host=host) for host in (0, 1)), strict=True
    ):
        assert_equal(whole, joined(parts))


def test_without_a_start_token_the_first_is_given(tmp_path):
    letters = tokenizer.characters("abcé")
    found = writer.write_store(tmp_path / "s", [Document("a", "éabc"), Document("b", "ab")], letters, description="-")
    batches = loader.eval_batches(found, batch_size=2, seq_len=8)
    assert (batches.num_targets, batches.num_bytes) == (4, 4)
    (batch,) = batches
    assert letters.decode(batch.targets[batch.loss_mask > 0].tolist()) == "abcb"


# What is refused


def test_config_from_a_mapping_names_what_is_wrong(cfg):
    values = config.to_dict(cfg)
    assert config.from_dict(loader.DataConfig, values) == cfg
    for change, message in (
        ({"packing": "bestfit"}, "did you mean 'best_fit'"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"train": {}}, "train: expected at least one token store"),
        ({"prefetch": -1}, "prefetch: expected 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            config.from_dict(loader.DataConfig, values | change)


def test_what_cannot_be_is_refused_before_the_first_batch(cfg, directory):
    with pytest.raises(ValueError, match="batch_size=8: expected a multiple of the 3 hosts"):
        take(cfg, 0, num_hosts=3)
    with pytest.raises(ValueError, match="host: expected 0 to 1, got 2"):
        take(cfg, 0, num_hosts=2, host=2)
    with pytest.raises(ValueError, match="nowhere: no token store there"):
        take(only(cfg, directory, "nowhere"), 0)
    with pytest.raises(ValueError, match="lower: expected a positive weight, got 0"):
        take(dataclasses.replace(cfg, train={str(directory / "lower"): 0.0}), 0)


def test_a_store_of_another_tokenizer_is_refused(cfg, directory):
    tokenizer.save(tokenizer.characters("abc"), directory / "other.model")
    with pytest.raises(ValueError, match="lower: made with tokenizer"):
        take(dataclasses.replace(cfg, tokenizer=str(directory / "other.model")), 0)


def test_rows_come_by_the_formula_of_the_docstring(cfg, directory):
    """The order written out once more, without the loader."""
    name = str(directory / "upper")
    opened = store.open_store(name)
    plan = packing.plan(opened.starts, SEQ_LEN, "concat")
    batch = take(only(cfg, directory, "upper"), 10)[9]
    for row in range(8):
        epoch, index = divmod(9 * 8 + row, plan.num_rows)
        spans = plan.spans(mixture.permute(index, plan.num_rows, key=mixture.stream_key(1, 0, epoch)))
        expected = np.concatenate([opened.read(span.start, span.length) for span in spans])
        np.testing.assert_array_equal(batch.tokens[row, : len(expected)], expected)
