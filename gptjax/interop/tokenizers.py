"""Tokenizers of Hugging Face folders, both ways.

A folder's files, the first of these that is there:

    tokenizer.json             as the `tokenizers` package runs it: the kind `huggingface`
    tokenizer.model            SentencePiece; rewritten as a `tokenizer.json` where other files say what it cannot
    vocab.json, merges.txt     GPT-2's, also as encoder.json and vocab.bpe

and `tokenizer_config.json`, `special_tokens_map.json`, `config.json`, `generation_config.json` and
`chat_template.jinja` for special tokens and the chat template. What `write` wrote is read back as what it was.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from gptjax.data import huggingface
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.data.tokenizer import Tokenizer
from gptjax.interop import tokenizer_folder, tokenizer_json
from gptjax.interop.certificate import STRINGS
from gptjax.interop.tokenizer_folder import Folder

# Any class of transformers that has tokenizer.json run as it is; this one, all its versions know.
_CLASS = "PreTrainedTokenizerFast"
_GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
_GPT2_SPECIAL = "<|endoftext|>"


def read(folder: pathlib.Path) -> Tokenizer | None:
    """The tokenizer of a folder; None if it has none.

    Where both are there, `tokenizer.json` is what `transformers` opens; a warning names texts of which
    `tokenizer.model` makes other ids. It is run as it is written, as `PreTrainedTokenizerFast` does: for some
    `tokenizer_class`es (LlamaTokenizer and GPT2Tokenizer among them) `AutoTokenizer` of transformers 5 takes only
    the vocabulary from it and cuts text in a way of its own, which need not be the way that the model was trained with.

    Raises:
      ValueError: naming the file, and what is wrong with it or not supported.
      ImportError: if it needs the `tokenizers` package, which is not there.
    """
    files = tokenizer_folder.read(folder)
    try:
        if files.tokenizer is not None:
            return _from_json(files)
        if files.sentencepiece is not None:
            return _from_sentencepiece(files)
        return None if files.vocabulary is None else _from_vocabulary(files)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def write(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Writes what `AutoTokenizer.from_pretrained` loads, and special ids into the model's configs."""
    write_files(tokenizer, folder)
    tokenizer_folder.write_ids(folder, special_ids(tokenizer))


def write_files(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Writes tokenizer.json and what belongs to it, with the same ids; tokenizer.model too if it is SentencePiece's.

    A SentencePiece model that no tokenizer.json expresses is written alone, and a warning says so.
    """
    if tokenizer.kind == "huggingface":
        description = huggingface.description_of(tokenizer)
        content, names = dict(description.tokenizer), dict(description.special_tokens)
        known = tokenizer_folder.SETTINGS
        settings: dict[str, Any] = {name: each for name, each in description.settings.items() if name in known}
        settings |= {"split_special_tokens": True} if description.split_special_tokens else {}
    else:
        if tokenizer.kind == "sentencepiece":
            tokenizer_folder.write_bytes(folder / tokenizer_lib.FILE_NAME, tokenizer.serialized)
        try:
            content, names = tokenizer_json.of(tokenizer)
        except ValueError as error:
            logging.warning("%s: only tokenizer.model is written: %s; ids may differ in transformers", folder, error)
            return
        # Ours takes their texts for text.
        settings = {"clean_up_tokenization_spaces": False, "split_special_tokens": True}
    tokenizer_folder.write(
        folder,
        content,
        settings={"tokenizer_class": _CLASS, **settings, **names},
        chat_template=tokenizer.chat_template,
    )


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """Those that `read` opens, of the tokenizer's own; in order of names."""
    return sorted(path for name in tokenizer_folder.FILES if (path := folder / name).is_file())


def special_ids(tokenizer: Tokenizer) -> dict[str, int | list[int]]:
    """The keys of `config.json` and `generation_config.json` for special tokens."""
    eos = list(tokenizer.eos_ids)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": tokenizer.pad_id,
    }
    return {name: id for name, id in ids.items() if id is not None}


def _from_json(files: Folder) -> Tokenizer:
    assert files.tokenizer is not None
    known = _written_by_us(files)
    if known is not None:
        return known
    original = _original(files)
    try:
        found = _make(files, files.tokenizer)
    except ImportError as error:
        if not original:
            raise
        logging.warning("%s: tokenizer.model is taken instead of tokenizer.json: %s", files.path, error)
        return original
    if original:
        _compare(files, found, original)
    return found


def _original(files: Folder) -> Tokenizer | None:
    """Of `tokenizer.model` beside a tokenizer.json; some hold that of another library."""
    try:
        return None if files.sentencepiece is None else tokenizer_lib.from_bytes(files.sentencepiece)
    except ValueError as error:
        logging.warning("%s: tokenizer.model is passed over, tokenizer.json is taken: %s", files.path, error)
        return None


def _compare(files: Folder, found: Tokenizer, original: Tokenizer) -> None:
    """Warns of texts that the two make other ids of. Those that spell special tokens always do, if they are parsed."""
    names = set(found.special_tokens.values())
    texts = [text for text in STRINGS if not any(name in text for name in names) and "\u2581" not in text]
    different = [text for text in texts if found.encode(text) != original.encode(text)]
    if different:
        logging.warning(
            "%s: tokenizer.json, which is taken, and tokenizer.model make different ids of %d of %d texts, such as %r; "
            "if the model was trained with tokenizer.model, delete tokenizer.json",
            files.path,
            len(different),
            len(texts),
            different[0],
        )


def _written_by_us(files: Folder) -> Tokenizer | None:
    """The tokenizer that `write` made these files of, if it was not of kind `huggingface`."""
    if files.chat_template is not None or files.config.get("tokenizer_class") != _CLASS:
        return None
    candidate = _candidate(files)
    if candidate is None:
        return None
    try:
        content, names = tokenizer_json.of(candidate)
    except ValueError:
        return None
    own_eos = [] if candidate.eos_id is None else [candidate.eos_id]
    same = content == files.tokenizer and names == files.special_tokens and files.eos_ids in ([], own_eos)
    return candidate if same else None


def _candidate(files: Folder) -> Tokenizer | None:
    if files.sentencepiece is not None:
        return _original(files)
    model = (files.tokenizer or {}).get("model")
    if not isinstance(model, dict) or model.get("merges") != [] or not isinstance(model.get("vocab"), dict):
        return None
    if files.special_tokens:
        return tokenizer_lib.byte_level()
    return tokenizer_lib.characters("".join(model["vocab"])) if model["vocab"] else None


def _from_sentencepiece(files: Folder) -> Tokenizer:
    assert files.sentencepiece is not None
    found = tokenizer_lib.from_bytes(files.sentencepiece)
    if found.kind != "sentencepiece":
        return found
    try:
        content, names = tokenizer_json.of(found)
    except ValueError as error:
        logging.warning("%s: what files beside tokenizer.model say is passed over: %s", files.path, error)
        return found
    own_eos = [] if found.eos_id is None else [found.eos_id]
    says_no_more = (
        files.chat_template is None
        and files.eos_ids in ([], own_eos)
        and files.config.get("add_bos_token", found.has_start) == found.has_start
        and files.config.get("legacy") is not False
        and all(names.get(name) == text for name, text in files.special_tokens.items())
    )
    if says_no_more:
        return found
    if files.config.get("add_bos_token") is False:
        content["post_processor"] = None
    if files.config.get("legacy") is False and found.has_dummy_prefix:
        content = tokenizer_json.with_first_space_alone(content)
    return _make(dataclasses.replace(files, special_tokens={**names, **files.special_tokens}), content)


def _from_vocabulary(files: Folder) -> Tokenizer:
    """GPT-2's files, which do not say how text is cut before merges; other models that have them cut it otherwise."""
    name = files.config.get("tokenizer_class")
    assert files.vocabulary is not None
    if name not in _GPT2_CLASSES:
        raise ValueError(
            f"tokenizer_class: got {name!r} with vocab.json and merges.txt, expected {_GPT2_CLASSES[1]}, or a "
            "tokenizer.json: save the tokenizer with transformers' save_pretrained"
        )
    vocabulary, merges = files.vocabulary
    add_prefix_space = files.config.get("add_prefix_space", False) is True
    content = tokenizer_json.byte_level_bpe(vocabulary, merges, add_prefix_space=add_prefix_space)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _GPT2_SPECIAL) if _GPT2_SPECIAL in vocabulary else {}
    names = {**names, **files.special_tokens}
    start = names.get("bos_token")
    if files.config.get("add_bos_token") is True and start in vocabulary:
        content["post_processor"] = tokenizer_json.start_template(vocabulary[start], start)
    return _make(dataclasses.replace(files, special_tokens=names), content)


def _make(files: Folder, content: Mapping[str, Any]) -> Tokenizer:
    names = dict(files.special_tokens)
    content, ids = tokenizer_folder.with_added(files, content)
    text_of = {id: text for text, id in ids.items()}
    for name, stated in files.special_ids.items():
        if name not in names and stated in text_of:
            names[name] = text_of[stated]
    for name, text in names.items():
        if text not in ids:
            logging.warning("%s: %s=%r is not in the vocabulary, so no id of the model's", files.path, name, text)
    description = huggingface.Description(
        tokenizer=content,
        special_tokens=names,
        other_eos_ids=tuple(id for id in files.eos_ids if id != ids.get(names.get("eos_token", ""))),
        split_special_tokens=files.config.get("split_special_tokens") is True,
        chat_template=files.chat_template,
        settings=files.settings,
    )
    return huggingface.make(description)
