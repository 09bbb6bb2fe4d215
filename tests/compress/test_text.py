"""Calibration rows: which tokens they are, and what is said where there are too few."""

import numpy as np
import pytest

from gptjax.compress import text
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data import writer

BYTES = tokenizer_lib.byte_level()


def test_rows_are_of_the_text_in_order_and_spread_over_it(tmp_path):
    (tmp_path / "book.txt").write_text("".join(chr(65 + i % 26) for i in range(1000)))
    found = text.calibration(str(tmp_path / "book.txt"), BYTES, rows=4, length=50)
    whole = writer.store_of(str(tmp_path / "book.txt"), BYTES, scratch=tmp_path / "store").document(0)
    starts = [i * (len(whole) - 50) // 3 for i in range(4)]
    assert np.array_equal(found.tokens_RT, np.stack([whole[s : s + 50] for s in starts])) and starts[-1] + 50 == len(
        whole
    )
    assert found.tokens_RT.dtype == np.int32


def test_a_store_gives_the_rows_of_its_text(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 30)
    of_text = text.calibration(f"dir:{tmp_path}/*.txt", BYTES, rows=2, length=40)
    writer.store_of(f"dir:{tmp_path}/*.txt", BYTES, scratch=tmp_path / "store")
    of_store = text.calibration(str(tmp_path / "store"), BYTES, rows=2, length=40)
    assert np.array_equal(of_text.tokens_RT, of_store.tokens_RT) and of_store.source == str(tmp_path / "store")
    assert set(BYTES.decode(of_text.tokens_RT[0])) >= {"a", "b"}


def test_batches_are_of_one_shape():
    found = text.Calibration("x", np.arange(60, dtype=np.int32).reshape(12, 5))
    batches = found.batches(rows_at_once=5)
    assert [batch.shape for batch in batches] == [(4, 5)] * 3 and np.array_equal(
        np.concatenate(batches), found.tokens_RT
    )
    assert found.facts()["rows"] == 12 and len(found.facts()["tokens_sha256"]) == 64


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"rows": 4, "length": 50}, "too few for 4 calibration rows of 50; give more text, or ask for at most 2 rows"),
        ({"rows": 0, "length": 50}, "0 rows of 50 tokens; expected at least 1 row"),
    ],
)
def test_too_short_a_text_is_refused(tmp_path, sizes, message):
    (tmp_path / "short.txt").write_text("x" * 120)
    with pytest.raises(ValueError, match=message):
        text.calibration(str(tmp_path / "short.txt"), BYTES, **sizes)
