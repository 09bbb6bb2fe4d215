import json
import logging
import pathlib
import sys
import zipfile

import pytest
import sentencepiece

from gptjax.data import huggingface
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.interop import tokenizer_folder, tokenizer_json, tokenizers
from gptjax.interop.certificate import STRINGS

pytest.importorskip("tokenizers")

RUNS = [character * n for character in "a \n天" for n in (2, 3, 5, 8, 33)]
TEXTS = [*STRINGS, *RUNS, "\u2581", "\u2581a", " \u2581", " \n ", "a<s>b</s>", "<|im_end|>x<tool_call>"]
CALL = {"function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2.5, True, None]}}}
CONVERSATIONS = [
    [{"role": "user", "content": "Hello?"}],
    [
        {"role": "system", "content": "Be brief. 天地 <html>"},
        {"role": "user", "content": "1 + 1"},
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"},
        {"role": "user", "content": "  and more\n"},
    ],
    [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "reasoning": "ask", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "warm"},
    ],
]


@pytest.fixture(scope="module")
def every_line(shared_data):
    """Each line, once, of every text."""
    lines: set[str] = set(TEXTS)
    for path in sorted((shared_data / "text").rglob("*")):
        if path.suffix == ".txt":
            lines.update(path.read_text().split("\n"))
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    lines.update(archive.read(name).decode().split("\n"))
        elif path.suffix in (".json", ".jsonl"):
            rows = path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
            lines.update(text for row in rows if row for text in strings(json.loads(row)))
    assert len(lines) > 100_000
    return sorted(lines)


def strings(value):
    if isinstance(value, str):
        yield from value.split("\n")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(each)


@pytest.fixture
def folder(shared_data, tmp_path):
    """Makes a folder of files of the shared data and of JSON values."""

    def make(files, **values):
        for name, source in files.items():
            (tmp_path / name).write_bytes((shared_data / source).read_bytes())
        for name, value in values.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return make


GPT2 = {"vocab.json": "tokenizers/gpt2/encoder.json", "merges.txt": "tokenizers/gpt2/vocab.bpe"}
MINIMIND = {name: f"tokenizers/minimind/{name}" for name in ("tokenizer.json", "tokenizer_config.json")}
MISTRAL = {"tokenizer.model": "tokenizers/mistral_v1/tokenizer.model.v1"}
STORIES = {
    name: f"models/stories260K/hf/{name}" for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
}


def auto(path):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(path)


def ids_of(peer, texts):
    """What `peer(texts, add_special_tokens=False)` computes, without its lists of masks."""
    return [each.ids for each in peer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def different(ours, peer, texts):
    found = ours.encode_batch(texts)
    return [text for text, a, b in zip(texts, found, ids_of(peer, texts), strict=True) if a.tolist() != b]


@pytest.mark.parametrize("files", [GPT2, MINIMIND], ids=["gpt2", "minimind"])
def test_every_line_has_the_ids_of_transformers_and_is_read_back(folder, every_line, files):
    path = folder(files, config={"model_type": "gpt2"})
    ours, peer = tokenizers.read(path), auto(path)
    assert ours.kind == "huggingface" and ours.vocab_size == len(peer)
    assert peer.encode(STRINGS[5]) == ours.encode_prompt(STRINGS[5])
    assert not different(ours, peer, every_line)
    some = every_line[::20]
    for text, ids in zip(some, ours.encode_batch(some), strict=True):
        assert ours.decode(ids.tolist()) == text or "<|" in text


def test_every_line_of_mistral_has_the_ids_of_sentencepiece_and_exported_of_transformers(folder, every_line, tmp_path):
    path = folder(MISTRAL)
    ours = tokenizers.read(path)
    assert ours.kind == "sentencepiece" and ours.fingerprint == tokenizer_lib.load(path).fingerprint
    peer = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    lines = [line for line in every_line if "\u2581" not in line]
    found = ours.encode_batch(lines)
    for text, a, b in zip(lines, found, peer.encode(lines, num_threads=2), strict=True):
        assert a.tolist() == b and ours.decode(b) == text
    tokenizers.write(ours, tmp_path)
    exported = ids_of(auto(tmp_path), lines)
    assert all(a.tolist() == b for a, b in zip(found, exported, strict=True))


def test_stories_take_tokenizer_json_and_say_that_the_model_file_differs(folder, every_line, caplog):
    transformers = pytest.importorskip("transformers")
    path = folder(STORIES, config={"model_type": "llama"})
    with caplog.at_level(logging.WARNING):
        ours = tokenizers.read(path)
    assert "make different ids of 3 of 19 texts, such as ' '" in caplog.text
    assert (ours.bos_id, ours.eos_id, ours.start_id, ours.kind) == (1, 2, 1, "huggingface")
    # One and the same file in one and the same package: a part of the lines will do.
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    assert not different(ours, peer, [*TEXTS, *every_line[::10]])


@pytest.fixture(scope="module")
def trained():
    corpus = [path.read_text() for path in sorted(pathlib.Path(tokenizer_lib.__file__).parent.glob("*.py"))]
    return tokenizer_lib.train_bpe(corpus, 500)


def own(name, trained, shared_data):
    if name == "bytes":
        return tokenizer_lib.byte_level()
    if name == "characters":
        return tokenizer_lib.characters("".join(TEXTS))
    if name == "ours":
        return trained
    files = STORIES if name == "stories" else MISTRAL
    return tokenizer_lib.load(shared_data / files["tokenizer.model"])


@pytest.mark.parametrize("name", ["ours", "stories"])
def test_lines_of_an_exported_sentencepiece_model(name, trained, shared_data, every_line, tmp_path):
    ours = own(name, trained, shared_data)
    tokenizers.write(ours, tmp_path)
    assert not different(ours, auto(tmp_path), [*TEXTS, *every_line[:: 1 if name == "stories" else 10]])


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "qwen3", "gemma3_text", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("name", ["ours", "bytes", "characters", "stories"])
def test_exports_load_as_they_are_whatever_the_model(name, model_type, trained, shared_data, tmp_path):
    ours = own(name, trained, shared_data)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizers.write(ours, tmp_path)
    peer = auto(tmp_path)
    assert not different(ours, peer, TEXTS) and len(peer) == ours.vocab_size
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    for text in TEXTS:
        assert peer(text)["input_ids"] == ours.encode_prompt(text)
        if name != "stories":  # whose model takes spaces off
            assert peer.decode(ours.encode(text)) == ours.decode(ours.encode(text)) == text
    again = tokenizers.read(tmp_path)
    assert (again.kind, again.fingerprint) == (ours.kind, ours.fingerprint)


@pytest.mark.parametrize(
    ("files", "values"),
    [
        (GPT2, {"config": {"model_type": "gpt2"}}),
        (MINIMIND, {"generation_config": {"eos_token_id": [2, 0]}}),
        (STORIES, {"config": {"model_type": "llama", "eos_token_id": 2}}),
    ],
    ids=["gpt2", "minimind", "stories"],
)
def test_imported_exported_and_imported_it_is_the_same(folder, tmp_path, files, values):
    ours = tokenizers.read(folder(files, **values))
    other = tmp_path / "exported"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 7}))
    tokenizers.write(ours, other)
    assert not different(ours, auto(other), TEXTS)
    assert auto(other)("Hi")["input_ids"] == ours.encode_prompt("Hi")
    again = tokenizers.read(other)
    assert again.fingerprint == ours.fingerprint and again.eos_ids == ours.eos_ids
    assert json.loads((other / "config.json").read_text())["vocab_size"] == 7
    assert not list(other.glob("*.partial"))


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "several", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_chats_are_written_as_transformers_writes_them(folder, messages, add_generation_prompt):
    path = folder(MINIMIND)
    ours, peer = tokenizers.read(path), auto(path)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    for more in ({}, {"tools": tools}, {"open_thinking": True}):
        options = {"add_generation_prompt": add_generation_prompt, **more}
        text = ours.apply_chat_template(messages, **options)
        assert text == peer.apply_chat_template(messages, tokenize=False, **options)
        assert ours.encode(text) == peer.apply_chat_template(messages, **options)["input_ids"]


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{%- set ns = namespace(n=0) %}\n  {% for m in messages %}\n{% set ns.n = ns.n + 1 %}\n  {{ ns.n }}\n{% endfor %}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ tools }}{{ documents }}{{ eos_token }}",
    "{{ messages | tojson(indent=2) }}{{ dict(a=1) }}{{ strftime_now('%Y') }}{{ pad_token is defined }}",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{% for m in messages if m.role == 'user' %}{{ f(m.content) }}{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_templates_use_is_there_as_in_transformers(folder, template):
    path = folder(MINIMIND)
    (path / "chat_template.jinja").write_text(template)
    ours, peer = tokenizers.read(path), auto(path)
    assert ours.chat_template == template  # and not that of tokenizer_config.json
    for messages in CONVERSATIONS:
        assert ours.apply_chat_template(messages) == peer.apply_chat_template(messages, tokenize=False)


def test_a_sentencepiece_model_with_a_chat_template_reads_special_tokens(folder):
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    values = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": [{"name": "default", "template": template}]}
    path = folder(MISTRAL, tokenizer_config=values, config={"model_type": "mistral", "eos_token_id": [2, 5]})
    ours, peer = tokenizers.read(path), auto(path)
    assert ours.kind == "huggingface" and ours.eos_ids == (2, 5)
    for messages in CONVERSATIONS[:2]:
        ids = ours.encode(ours.apply_chat_template(messages))
        assert ids[0] == 1 and ids == peer.apply_chat_template(messages)["input_ids"]
    assert different(ours, peer, TEXTS) == [text for text in TEXTS if "\u2581" in text]


def test_special_ids_come_from_the_models_configs_where_the_tokenizer_says_nothing(folder):
    path = folder(
        {"tokenizer.json": MINIMIND["tokenizer.json"]},
        config={"model_type": "llama", "bos_token_id": 1, "eos_token_id": 0},
        generation_config={"eos_token_id": [2, 5]},
    )
    ours = tokenizers.read(path)
    assert (ours.bos_id, ours.eos_id, ours.eos_ids, ours.start_id) == (1, 2, (2, 5), None)
    assert tokenizers.special_ids(ours) == {"bos_token_id": 1, "eos_token_id": [2, 5]}
    assert ours.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_add_bos_token_counts_where_no_post_processor_says_so(folder):
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
    path = folder(GPT2, tokenizer_config=config, config={"model_type": "gpt2"})
    ours = tokenizers.read(path)
    assert ours.encode_prompt("Hi") == auto(path)("Hi")["input_ids"] == [50256, *ours.encode("Hi")]
    path = folder(MINIMIND, tokenizer_config=config)
    assert tokenizers.read(path).start_id is None
    assert auto(path)("Hi")["input_ids"] == tokenizers.read(path).encode_prompt("Hi")


def test_tokens_that_only_the_config_adds(folder):
    config = json.loads((folder(MINIMIND) / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["6400"] = {"content": "<new>", "special": True, "normalized": False}
    path = folder(MINIMIND, tokenizer_config=config)
    ours = tokenizers.read(path)
    assert ours.encode("a<new>b")[1] == 6400 and ours.encode("a<new>b") == auto(path).encode("a<new>b")


def test_a_model_file_of_another_library_is_passed_over(folder, caplog):
    path = folder(MINIMIND)
    (path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with caplog.at_level(logging.WARNING):
        assert tokenizers.read(path).kind == "huggingface"
    assert "tokenizer.model is passed over" in caplog.text


def test_without_the_package_the_model_file_is_taken_with_a_warning(folder, caplog, monkeypatch):
    path = folder(STORIES)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with caplog.at_level(logging.WARNING):
        assert tokenizers.read(path).kind == "sentencepiece"
    assert "tokenizer.model is taken instead of tokenizer.json" in caplog.text
    (path / "tokenizer.model").unlink()
    with pytest.raises(ImportError, match=r"pip install 'gptjax\[tokenizers\]'"):
        tokenizers.read(path)


def test_what_an_asset_says_beside_its_tokenizer_is_not_all_written(trained, tmp_path):
    content, _ = tokenizer_json.of(trained)
    settings = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "model_max_length": 7}
    description = huggingface.Description(tokenizer=content, settings=settings)
    tokenizers.write(huggingface.make(description), tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written == {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 7}
    with pytest.raises(ValueError, match="special_tokens: auto_map: expected x_token"):
        huggingface.make(huggingface.Description(tokenizer=content, special_tokens={"auto_map": "x"}))


def test_no_tokenizer_is_none(tmp_path):
    assert tokenizers.read(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: is not JSON"),
        ("tokenizer.json", "[" * 200_000, "tokenizer.json: is not JSON"),
        ("tokenizer.json", "[]", "tokenizer.json: expected a JSON object, got list"),
        ("tokenizer.json", '{"added_tokens": 7}', "added_tokens: expected a list of objects"),
        ("tokenizer.json", '{"model": {"type": "WordLevel", "vocab": {"a": 0}}}', "model.type: got 'WordLevel'"),
        (
            "tokenizer.json",
            '{"model": {"type": "Unigram", "vocab": [[[0], 1]]}, "decoder": {"type": "Fuse"}}',
            "expected a string",
        ),
        ("tokenizer.model", "garbage", "not a tokenizer"),
        ("tokenizer_config.json", "\ufeff", "tokenizer_config.json: is not JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', r"added_tokens_decoder\['x'\]"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"%s": {"content": "x"}}}' % ("9" * 5000),
            "expected an id",
        ),
        ("tokenizer_config.json", '{"tokenizer_class": "Qwen2Tokenizer"}', "tokenizer_class: got 'Qwen2Tokenizer'"),
        ("generation_config.json", '{"eos_token_id": ["2"]}', "generation_config.json: eos_token_id: got"),
        ("generation_config.json", '{"eos_token_id": [99]}', "eos_token_id: got 99"),
        ("vocab.json", '{"a": "b"}', "vocab.json: expected an id for each piece"),
        ("vocab.json", '{"a": 1, "b": 1}', "two pieces have the same id"),
        ("vocab.json", '{"a": 4194304}', "expected 1 to 4,194,304, with ids below that"),
        ("merges.txt", "a b c", "the tokenizers package cannot run it"),
        ("merges.txt", "\udcff", "merges.txt: is not UTF-8"),
        ("chat_template.jinja", "\udcff", "chat_template.jinja: is not UTF-8"),
    ],
)
def test_hostile_folders_are_refused(tmp_path, name, content, message):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert tokenizers.read(tmp_path).encode("ab") == [0, 1]
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        tokenizers.read(tmp_path)


def test_files_too_large_are_not_read(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(tokenizer_folder._MAX_BYTES + 1)
    with pytest.raises(ValueError, match="tokenizer.json: 268,435,457 bytes, expected at most 268,435,456"):
        tokenizers.read(tmp_path)


def test_only_what_can_be_expressed_is_exported(trained):
    with pytest.raises(ValueError, match="it is a tokenizer.json already"):
        content, names = tokenizer_json.of(trained)
        tokenizer_json.of(huggingface.make(huggingface.Description(tokenizer=content)))


@pytest.mark.parametrize("legacy", [True, False])
def test_legacy_says_whether_a_space_is_put_behind_special_tokens(folder, legacy):
    values = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "x", "legacy": legacy}
    path = folder(MISTRAL, tokenizer_config=values, config={"model_type": "mistral"})
    ours, peer = tokenizers.read(path), auto(path)
    texts = [text for text in [*TEXTS, "a<s>b</s> c", "<s> hi", "  <s>\nhi  </s>"] if "\u2581" not in text]
    assert not different(ours, peer, texts)
    assert ours.encode("<s>b")[1] == ours.pieces.index(b"b" if not legacy else b" b", 259)
