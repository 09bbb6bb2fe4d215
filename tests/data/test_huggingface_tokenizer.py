import copy
import json
import pickle

import jinja2.sandbox
import pytest

from gptjax.data import chat, huggingface, pieces, tokenizer
from gptjax.data.huggingface import Description
from gptjax.model import Model

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "",
    " ",
    "Hello,  world!\n\tdon't",
    "naïve e\u0301 天地玄黃 👩‍🚀 \u200b",
    "a<|end|>b <tool> c",
    "\x00\x7f\xff",
]
TRAINING = ["Hello world, don't stop", "naïve 天地玄黃", "    indented\n\ttwice", "  two  spaces"] * 3


def byte_level(**options):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    return trained(backend, trainer, **options)


def metaspace(**options):
    """As Llama 2's: byte fallback, and a space before the text."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, special_tokens=names, show_progress=False)
    content = trained(backend, trainer, **options)
    # Byte pieces are no special tokens.
    content["added_tokens"] = [each for each in content["added_tokens"] if not each["content"].startswith("<0x")]
    return content


def unigram(**options):
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    return trained(backend, trainer, **options)


def trained(backend, trainer, *, start=True):
    backend.train_from_iterator(TRAINING, trainer)
    backend.add_special_tokens(["<|start|>", "<|end|>"])
    backend.add_tokens(["<tool>"])
    if start:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", backend.token_to_id("<|start|>"))]
        )
    return json.loads(backend.to_str())


def described(content, **options):
    names = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    return huggingface.make(Description(tokenizer=content, special_tokens=names, **options))


@pytest.fixture(scope="module", params=[byte_level, metaspace, unigram])
def content(request):
    return request.param()


def test_ids_and_text_are_those_of_the_package(content):
    ours, theirs = described(content), tokenizers.Tokenizer.from_str(json.dumps(content))
    for text, found in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        wanted = theirs.encode(text, add_special_tokens=False).ids
        assert found.tolist() == wanted == ours.encode(text)
        # As they read it; where byte pieces are no text they write another number of U+FFFD.
        if "\ufffd" not in theirs.decode(wanted):
            assert ours.decode(wanted) == theirs.decode(wanted)
    assert [each.tolist() for each in ours.encode_batch(TEXTS, num_threads=1)] == [ours.encode(x) for x in TEXTS]


def test_pieces_are_the_bytes_of_each_id(content):
    ours, theirs = described(content), tokenizers.Tokenizer.from_str(json.dumps(content))
    assert ours.vocab_size == theirs.get_vocab_size()
    special = {id for id, token in theirs.get_added_tokens_decoder().items() if token.special}
    assert special <= ours.special_ids
    for id in set(range(ours.vocab_size)) - ours.special_ids:
        # Before a text they take a space off, so not at the front.
        wanted = theirs.decode([theirs.token_to_id("<tool>"), id], skip_special_tokens=False)
        if not wanted.startswith("<tool> <tool>"):
            assert b"<tool>" + ours.pieces[id] == wanted.encode() or "\ufffd" in wanted, id


def test_every_byte_has_its_piece():
    assert sorted(pieces.byte_characters().values()) == list(range(256))
    ours = described(byte_level())
    assert set(ours.pieces) >= {bytes([value]) for value in range(256)}
    assert set(described(metaspace()).pieces) >= {bytes([value]) for value in range(256)}


def test_special_tokens(content):
    ours = described(content)
    assert (ours.bos_id, ours.eos_id) == (ours.encode("<|start|>")[-1], ours.encode("<|end|>")[-1])
    assert ours.start_id == ours.bos_id and ours.encode_prompt("Hello")[0] == ours.bos_id
    assert ours.pieces[ours.bos_id] == b"" and b"<tool>" in {piece.strip() for piece in ours.pieces}
    assert ours.eos_ids == (ours.eos_id,)
    more = described(content, other_eos_ids=(ours.eos_id, ours.bos_id))
    assert more.eos_ids == (ours.eos_id, ours.bos_id)
    # Their text is text, if the folder says so.
    text = described(content, split_special_tokens=True)
    assert text.eos_id not in text.encode("a<|end|>b")


def test_a_model_stops_at_each_end_token():
    ours = described(byte_level(), other_eos_ids=(7, 9))
    assert Model(None, {}, ours).options().eos_ids == (ours.eos_id, 7, 9)
    assert Model(None, {}, tokenizer.characters("ab")).options().eos_ids == ()


def test_no_start_token_unless_the_post_processor_puts_one():
    ours = described(byte_level(start=False))
    assert ours.start_id is None and ours.bos_id is not None
    assert ours.encode_prompt("Hello") == ours.encode("Hello")


def test_bytes_reads_back_equal(content):
    ours = described(content, chat_template="{{ messages[0].content }}", other_eos_ids=(3,))
    again = tokenizer.from_bytes(ours.to_bytes())
    assert again.fingerprint == ours.fingerprint and again.pieces == ours.pieces
    assert again.eos_ids == ours.eos_ids and again.chat_template == ours.chat_template
    assert pickle.loads(pickle.dumps(ours)).encode(TEXTS[2]) == ours.encode(TEXTS[2])
    assert huggingface.description_of(ours).tokenizer == content


def test_truncation_and_padding_of_the_file_drop_no_text():
    backend = tokenizers.Tokenizer.from_str(json.dumps(byte_level()))
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    ours = described(json.loads(backend.to_str()))
    assert ours.decode(ours.encode("Hello world")) == "Hello world" and len(ours.encode("a")) == 1


def test_lone_surrogates_are_refused(content):
    with pytest.raises(ValueError, match="lone surrogate"):
        described(content).encode("ab\ud800")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "model.type: got 'WordPiece', expected BPE or Unigram"),
        ({"model": None}, "model: missing"),
        ({"decoder": {"type": "WordPiece"}}, "decoder: 'WordPiece' cannot be expressed"),
        ({"decoder": None}, "decoder: missing"),
        ({"decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 0}}, "decoder: 'Strip' cannot be expressed"),
        ({"pre_tokenizer": {"type": "New"}}, 'cannot run it: .* it could without pre_tokenizer: {"type": "New"}'),
        ({"decoder": {"type": "Sequence", "decoders": 7}}, "decoder: missing"),
    ],
)
def test_what_cannot_be_expressed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        described(byte_level() | change)


@pytest.mark.parametrize("name", ["continuing_subword_prefix", "end_of_word_suffix", "dropout"])
def test_models_whose_pieces_are_not_the_text_are_refused(name):
    content = byte_level()
    content["model"][name] = 0.1 if name == "dropout" else "##"
    with pytest.raises(ValueError, match=f"model.{name}"):
        described(content)


def test_a_start_token_that_is_not_bos_is_refused():
    content = byte_level()
    with pytest.raises(ValueError, match="post_processor: puts the ids"):
        huggingface.make(Description(tokenizer=content, special_tokens={"bos_token": "<|end|>"}))


@pytest.mark.parametrize("ids", [(-1,), (100_000,), ("3",), (True,)])
def test_end_tokens_out_of_the_vocabulary_are_refused(ids):
    with pytest.raises(ValueError, match="eos_token_id: got"):
        described(byte_level(), other_eos_ids=ids)


def small():
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3}, "merges": ["a b"], "unk_token": None}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    normalizer = {"type": "Replace", "pattern": {"Regex": "x+"}, "content": "b"}
    return {
        "version": "1.0",
        "added_tokens": [{"id": 4, "content": "<s>", "special": True, **dict.fromkeys(FLAGS, False)}],
        "normalizer": normalizer,
        "pre_tokenizer": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}},
        },
        "decoder": level,
        "model": model,
    }


FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
JUNK = [None, [], {}, "", "(", "\ud800", -1, 1 << 31, 1 << 70, 1e300, True, [[]], {"type": "BPE"}, ["a b c"]]


def places(value, path=()):
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def changed(value, path, junk):
    if not path:
        return junk
    copied = copy.copy(value)
    copied[path[0]] = changed(value[path[0]], path[1:], junk)
    return copied


def test_whatever_a_file_holds_it_is_read_or_refused():
    values = json.loads(
        huggingface.make(Description(tokenizer=small(), special_tokens={"bos_token": "<s>"})).to_bytes()
    )
    refused = 0
    for path in places(values):
        for junk in JUNK:
            content = json.dumps(changed(values, path, junk)).encode()
            try:
                found = tokenizer.from_bytes(content)
                assert len(found.pieces) < 10
                found.encode("xab <s>")
            except ValueError:
                refused += 1
    assert refused > 300


def test_ids_that_the_package_gives_otherwise_are_refused():
    content = small()
    content["added_tokens"][0]["id"] = 2
    with pytest.raises(ValueError, match="added_tokens: '<s>': got id 2, expected 4"):
        described(content)
    content = small()
    content["model"]["vocab"]["b"] = 0
    with pytest.raises(ValueError, match="two pieces have the same id"):
        described(content)


@pytest.mark.parametrize("depth", [400, 900])
def test_deep_nesting_of_a_part_is_refused(depth):
    content = small()
    for _ in range(depth):
        content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"]]}
    with pytest.raises(ValueError, match="recursion"):
        described(content)


def test_deep_nesting_is_refused():
    with pytest.raises(ValueError, match="not a tokenizer"):
        tokenizer.from_bytes(b'{"kind": ' * 200_000)


def with_template(template):
    return described(byte_level(), chat_template=template)


HELLO = [{"role": "user", "content": "Hi"}]


def test_a_chat_template_sees_messages_and_special_tokens():
    ours = with_template("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] }}\n{% endfor %}{{ x }}")
    assert ours.apply_chat_template(HELLO, x=7) == "<|start|>[user] Hi\n7"
    ids = ours.encode(ours.apply_chat_template(HELLO))
    assert ids[0] == ours.bos_id


def test_a_chat_template_begins_the_answer_when_told():
    ours = with_template("{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}")
    assert ours.apply_chat_template(HELLO) == "Hi"
    assert ours.apply_chat_template(HELLO, add_generation_prompt=True) == "Hi>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% set ns = namespace(a=1) %}{{ ns.__init__.__globals__ }}",
        "{{ raise_exception('only users') }}",
        "{{ messages[0].content + 1 }}",
        "{{ undefined_name.attribute }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% if %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "x" * (chat.MAX_TEMPLATE_CHARACTERS + 1),
    ],
)
def test_a_chat_template_can_do_no_harm(template):
    with pytest.raises(ValueError, match="chat template: "):
        with_template(template).apply_chat_template(HELLO)


def test_templates_see_plain_values_only():
    class Thing:
        def write(self):
            raise AssertionError("called")

    ours = with_template("{{ messages[0].content }}")
    assert ours.apply_chat_template([{"role": "user", "content": Thing()}]) == "<Thing>"
    with pytest.raises(ValueError, match="messages: got none"):
        ours.apply_chat_template([])
    with pytest.raises(ValueError, match=r"messages\[0\]: got str"):
        ours.apply_chat_template(["Hi"])
    with pytest.raises(ValueError, match="bytes tokenizer came without a chat template"):
        tokenizer.byte_level().apply_chat_template(HELLO)
    assert issubclass(jinja2.sandbox.ImmutableSandboxedEnvironment, jinja2.Environment)
