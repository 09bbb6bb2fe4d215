"""Compressor baselines against the compressors called directly, and hand-made cases."""

import gzip
import lzma
import random
import shutil
import subprocess

import pytest

from gptjax.data import source, tokenizer, writer
from gptjax.eval import baselines


def random_text(num_bytes, seed=0):
    rng = random.Random(seed)
    return bytes(rng.choice(b"abcdefgh \n") for _ in range(num_bytes))


def test_sizes_are_those_of_the_standard_library():
    text = random_text(5000)
    figures = baselines.bits_per_byte(text)
    assert set(figures) == {"gzip", "bz2", "xz"}
    assert figures["gzip"] == 8 * len(gzip.compress(text, 9)) / 5000
    assert figures["xz"] == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / 5000


@pytest.mark.skipif(shutil.which("xz") is None, reason="no xz program to compare with")
def test_xz_equals_the_program():
    text = random_text(20_000)
    size = len(subprocess.run(["xz", "-9e", "--check=crc64"], input=text, capture_output=True, check=True).stdout)
    assert baselines.bits_per_byte(text)["xz"] == 8 * size / 20_000


def test_knowing_the_training_text_makes_a_copy_of_it_almost_free():
    train = random_text(20_000)
    figures = baselines.bits_per_byte(train[5000:9000], train=train)
    assert figures["xz_given_train"] < 0.1 < figures["xz"]


def test_nothing_held_out_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        baselines.bits_per_byte(b"")


def test_text_of_a_store_is_the_text_it_was_made_of(tmp_path):
    texts = ["one\n", "zwei é", "\t3"]
    documents = [source.Document(text, text) for text in texts]
    store = writer.write_store(tmp_path / "s", documents, tokenizer.byte_level(), description="test")
    assert baselines.text_of(store) == "".join(texts).encode()
