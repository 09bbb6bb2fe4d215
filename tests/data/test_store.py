import json
import os
import pathlib
import zlib

import numpy as np
import pytest

from gptjax import config
from gptjax.data import packing, store, tokenizer, writer
from gptjax.data.source import Document

BYTES = tokenizer.byte_level()
DOCUMENTS = [Document(f"d{i}", f"text {i} " + "é\t\n" * (i * 7 % 13)) for i in range(40)]
SMALL_SHARDS = dict(description="test", shard_bytes=100)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(writer, "_BATCH_BYTES", 30)


@pytest.fixture
def written(tmp_path):
    return writer.write_store(tmp_path / "store", DOCUMENTS, BYTES, **SMALL_SHARDS)


def files_of(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


class Killed(BaseException):
    """What no code under test catches."""


def killed_after(count):
    yield from DOCUMENTS[:count]
    raise Killed


def test_what_is_written_reads_back(written):
    assert len(written.meta.shards) > 5
    assert written.num_documents == 40
    for index, document in enumerate(DOCUMENTS):
        tokens = written.document(index)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == [BYTES.bos_id, *BYTES.encode(document.text), BYTES.eos_id]
        assert written.document_bytes()[index] == len(document.text.encode())
    assert written.num_bytes == sum(len(document.text.encode()) for document in DOCUMENTS)
    assert written.num_tokens == written.num_bytes + 2 * 40 == written.starts[-1]
    assert written.tokenizer.fingerprint == BYTES.fingerprint


def test_many_pieces_are_stored_in_32_bits(tmp_path):
    alphabet = tokenizer.characters("".join(map(chr, range(1, 0xD800))) + "".join(map(chr, range(0xE000, 0x14000))))
    assert alphabet.vocab_size > 1 << 16
    text = "\x01\U00013fff\ue000"
    found = writer.write_store(tmp_path / "store", [Document("a", text)], alphabet, description="wide")
    assert found.document(0).dtype == np.uint32
    assert alphabet.decode(found.document(0).tolist()) == text  # no start, no end: it has no special ids


def test_kill_leaves_nothing_under_the_name_and_resumes_to_the_same_files(tmp_path, written):
    path = tmp_path / "again"
    for kill_at in (3, 20, 39):
        with pytest.raises(Killed):
            writer.write_store(path, killed_after(kill_at), BYTES, **SMALL_SHARDS)
        assert not path.exists()
        with pytest.raises(ValueError, match="again.partial is unfinished: start again the exp"):
            store.open_store(path)
    finished = tmp_path / "again.partial" / store.tokens_name(1)
    before = finished.stat()
    writer.write_store(path, DOCUMENTS, BYTES, **SMALL_SHARDS)
    after = (path / store.tokens_name(1)).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert files_of(path) == files_of(written.path)
    assert not (tmp_path / "again.partial").exists()


def test_half_written_files_of_a_kill_do_no_harm(tmp_path, written):
    partial = tmp_path / "again.partial"
    with pytest.raises(Killed):
        writer.write_store(tmp_path / "again", killed_after(20), BYTES, **SMALL_SHARDS)
    done = len(list(partial.glob("*.json"))) - 1  # without the plan
    (partial / store.tokens_name(done)).write_bytes(b"half a shard")
    (partial / "00099.writing").write_bytes(b"{")
    again = writer.write_store(tmp_path / "again", DOCUMENTS, BYTES, **SMALL_SHARDS)
    assert again.num_tokens == written.num_tokens
    again.verify()


def test_resuming_notices_that_the_text_changed(tmp_path):
    with pytest.raises(Killed):
        writer.write_store(tmp_path / "store", killed_after(30), BYTES, **SMALL_SHARDS)
    changed = [DOCUMENTS[0]._replace(text=DOCUMENTS[0].text.upper()), *DOCUMENTS[1:]]
    with pytest.raises(ValueError, match="store.partial: shard 0 was made from other text than test holds now"):
        writer.write_store(tmp_path / "store", changed, BYTES, **SMALL_SHARDS)


def test_a_finished_store_is_found_not_written_again(written):
    before = files_of(written.path)
    found = writer.write_store(written.path, killed_after(1), BYTES, **SMALL_SHARDS)
    assert found.num_tokens == written.num_tokens
    assert files_of(written.path) == before


def test_another_store_is_never_overwritten(written):
    other = tokenizer.characters("".join(document.text for document in DOCUMENTS))
    for pieces, description in ((other, "test"), (BYTES, "another source")):
        with pytest.raises(ValueError, match="store: already there and made otherwise"):
            writer.write_store(written.path, DOCUMENTS, pieces, description=description, shard_bytes=100)


def test_an_unfinished_store_without_a_finished_shard_gives_way(tmp_path, written):
    """A mistyped source must not block the right one."""
    with pytest.raises(Killed):
        writer.write_store(tmp_path / "again", killed_after(3), BYTES, description="mistyped")
    (tmp_path / "again.partial" / "00007.tokens").touch()  # of a longer one
    writer.write_store(tmp_path / "again", DOCUMENTS, BYTES, **SMALL_SHARDS)
    assert files_of(tmp_path / "again") == files_of(written.path)
    with pytest.raises(Killed):
        writer.write_store(tmp_path / "other", killed_after(30), BYTES, **SMALL_SHARDS)
    with pytest.raises(ValueError, match="other.partial: already there and made otherwise"):
        writer.write_store(tmp_path / "other", DOCUMENTS, BYTES, description="another source")


def test_what_is_there_and_no_store_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="already there and not a token store; delete it or choose another"):
        writer.write_store(tmp_path, DOCUMENTS, BYTES, description="test")
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


def test_no_text_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="nothing here: no text to tokenise"):
        writer.write_store(tmp_path / "store", [], BYTES, description="nothing here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["00002.tokens", "00001.checksums", "00000.documents"])
def test_one_flipped_bit_is_noticed(written, name):
    path = written.path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: checksum.* [0-9a-f]{{8}}, expected [0-9a-f]{{8}}"):
        store.open_store(written.path)


def test_tokens_of_a_large_store_are_checked_when_they_are_read_its_tables_always(written, monkeypatch):
    monkeypatch.setattr(store, "_CHECK_ON_OPEN_BYTES", 10)
    path, damaged = written.path / "00001.tokens", written.meta.shards[0].num_documents
    path.write_bytes(bytes(len(path.read_bytes())))
    opened = store.open_store(written.path)
    assert opened.document(damaged - 1)[0] == BYTES.bos_id
    with pytest.raises(ValueError, match="00001.tokens: checksum of bytes from 0 "):
        opened.document(damaged)
    with pytest.raises(ValueError, match="00001.tokens: checksum"):
        writer.write_store(written.path, DOCUMENTS, BYTES, **SMALL_SHARDS)
    path = written.path / "00002.documents"
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(ValueError, match="00002.documents: checksum"):
        store.open_store(written.path)


def test_each_block_has_its_checksum_however_the_tokens_came(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_CHECKSUM_BYTES", 64)
    monkeypatch.setattr(store, "_CHECK_ON_OPEN_BYTES", 0)
    written = writer.write_store(tmp_path / "store", DOCUMENTS, BYTES, description="blocks")
    path = tmp_path / "store" / "00000.tokens"
    content = bytearray(path.read_bytes())
    sums = np.frombuffer((tmp_path / "store" / "00000.checksums").read_bytes(), "<u4")
    assert sums.tolist() == [zlib.crc32(content[at : at + 64]) for at in range(0, len(content), 64)]
    written.verify()
    content[64 * 5 + 3] ^= 1
    path.write_bytes(content)
    opened = store.open_store(tmp_path / "store")
    before, after = opened.read(0, 160), opened.read(192, opened.num_tokens - 192)  # up to the block, and from its end
    assert (len(before), len(after)) == (160, written.num_tokens - 192)
    for start, length in ((159, 2), (160, 1), (191, 1), (100, 200)):
        with pytest.raises(ValueError, match="00000.tokens: checksum of bytes from 320 "):
            opened.read(start, length)


def test_token_numbers_beyond_32_bits(tmp_path):
    """Two shards of one document each, as files with holes: they take no disk."""
    length, shards = (1 << 32) - 1, []
    for index in range(2):
        with (tmp_path / store.tokens_name(index)).open("wb") as file:
            file.seek(2 * (length - 2))
            file.write(np.array([97 + index, 258], "<u2").tobytes())
        sizes = np.array([[length, length - 2]], "<u4").tobytes()
        (tmp_path / store.documents_name(index)).write_bytes(sizes)
        zeros = bytes(1 << 16)
        last = zlib.crc32(zeros[:-6] + np.array([97 + index, 258], "<u2").tobytes())
        sums = np.full(1 << 17, zlib.crc32(zeros), "<u4")
        sums[-1] = last
        (tmp_path / store.checksums_name(index)).write_bytes(sums.tobytes())
        shards.append(
            store.ShardMeta(
                num_documents=1, num_tokens=length, num_bytes=length - 2, text_crc=0,
                checksums_crc=zlib.crc32(sums.tobytes()), documents_crc=zlib.crc32(sizes),
            )
        )  # fmt: skip
    meta = store.StoreMeta(
        version=store.VERSION, fingerprint=BYTES.fingerprint, vocab_size=260, source="holes", start_id=0, end_id=258,
        shard_bytes=1 << 40, shards=tuple(shards),
    )  # fmt: skip
    (tmp_path / store.META).write_text(json.dumps(config.to_dict(meta)))
    opened = store.open_store(tmp_path)
    assert opened.starts.tolist() == [0, length, 2 * length]
    assert opened.num_bytes == 2 * (length - 2)
    for plan in (packing.plan(opened.starts, 1 << 20, "concat"), packing.plan(opened.starts, 1 << 20, "best_fit")):
        assert sum(span.length for row in range(plan.num_rows) for span in plan.spans(row)) == 2 * (length - 1)
        ends = [span for row in range(plan.num_rows) for span in plan.spans(row) if span.start > 2 * length - (2 << 20)]
        last = max(ends)
        assert opened.read(last.start, last.length + 1)[-2:].tolist() == [98, 258]


@pytest.mark.parametrize("name", ["00002.tokens", "00001.checksums", "00000.documents"])
def test_a_cut_or_missing_file_is_named(written, name):
    path = written.path / name
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(ValueError, match=rf"{name}: \d+ bytes, expected \d+"):
        store.open_store(written.path)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name}: missing"):
        store.open_store(written.path)


@pytest.mark.parametrize("content", ["", "{", '{"version": 1}', "[]"])
def test_damaged_meta_is_named(written, content):
    (written.path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=r"meta\.json"):
        store.open_store(written.path)


def test_other_versions_and_tokenizers_are_refused(written):
    with pytest.raises(ValueError, match=f"made with tokenizer {BYTES.fingerprint[:12]}, expected abc"):
        store.open_store(written.path, fingerprint="abc")
    for version in (1, 99):  # with whatever keys it has
        (written.path / "meta.json").write_text(json.dumps({"version": version, "tokens_crc": 3}))
        with pytest.raises(ValueError, match=rf"version {version}, expected 2: .*delete .*store and make it again"):
            store.open_store(written.path)


def test_a_swapped_tokenizer_is_noticed(written):
    (written.path / tokenizer.FILE_NAME).write_bytes(tokenizer.characters("ab").to_bytes())
    with pytest.raises(ValueError, match="not the tokenizer that made this store"):
        store.open_store(written.path).tokenizer  # noqa: B018


def test_nothing_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="none: no token store there; make one with experiments.prepare_data"):
        store.open_store(tmp_path / "none")
    with pytest.raises(ValueError, match="gs://bucket/train: stores are memory-mapped"):
        store.open_store("gs://bucket/train")
    for name in ("train", "eval"):
        writer.write_store(tmp_path / "data" / name, DOCUMENTS, BYTES, description="test")
    with pytest.raises(ValueError, match="data: no token store there; there are in it: eval, train"):
        store.open_store(tmp_path / "data")


def test_a_store_is_not_written_to_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="gs://bucket/train: stores are memory-mapped"):
        writer.write_store("gs://bucket/train", DOCUMENTS, BYTES, description="-")
    assert not list(tmp_path.iterdir())


def test_progress_counts_everything_once(tmp_path):
    seen = []
    with pytest.raises(Killed):
        writer.write_store(tmp_path / "store", killed_after(20), BYTES, **SMALL_SHARDS)
    found = writer.write_store(tmp_path / "store", DOCUMENTS, BYTES, progress_fn=seen.append, **SMALL_SHARDS)
    assert seen[-1][:3] == (found.num_documents, found.num_bytes, found.num_tokens)
    assert seen[0].tokens_per_second == 0  # found finished
    assert seen[-1].tokens_per_second > 0
