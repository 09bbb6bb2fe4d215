"""The tokenizer's files of a Hugging Face folder, read with bounds and written whole.

Only files of fixed names directly in the folder are opened.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from absl import logging

from gptjax.data import tokenizer as tokenizer_lib
from gptjax.interop.tokenizer_json import special
from gptjax.json_files import read_json, write_json

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_FILE = "special_tokens_map.json"
_MODEL_FILES = ("generation_config.json", "config.json")
_VOCABULARY_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
FILES = (
    TOKENIZER_FILE,
    CONFIG_FILE,
    TEMPLATE_FILE,
    _SPECIAL_FILE,
    _MODEL_FILES[0],
    tokenizer_lib.FILE_NAME,
    *(name for names in _VOCABULARY_FILES for name in names),
)
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_NAMES = ("additional_special_tokens", "extra_special_tokens")
# What a folder of ours repeats of tokenizer_config.json. The rest concerns classes and paths of whoever wrote it, or is
# said by tokenizer.json.
SETTINGS = (
    "add_eos_token",
    "clean_up_tokenization_spaces",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "truncation_side",
    *_MORE_NAMES,
)
# Of a vocabulary; the largest in use are a tenth of it.
_MAX_BYTES = 1 << 28
_MAX_CONFIG_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What the files say.

    Attributes:
      tokenizer: the content of tokenizer.json.
      sentencepiece: the content of tokenizer.model.
      vocabulary: ids by piece, and merges in order.
      config: the content of tokenizer_config.json.
      special_tokens: texts by name, such as `bos_token`.
      special_ids: ids by name that the model's configs give where the tokenizer's say nothing.
      eos_ids: where generation ends.
      settings: what to repeat of `config`.
    """

    path: pathlib.Path
    tokenizer: Mapping[str, Any] | None
    sentencepiece: bytes | None
    vocabulary: tuple[dict[str, int], list[str]] | None
    config: Mapping[str, Any]
    special_tokens: Mapping[str, str]
    special_ids: Mapping[str, int]
    eos_ids: list[int]
    chat_template: str | None
    settings: Mapping[str, Any]


def read(path: pathlib.Path) -> Folder:
    """Raises:
    ValueError: naming the file that is too large, or not what its name says.
    """
    config = _json(path / CONFIG_FILE) or {}
    named = (_json(path / _SPECIAL_FILE) or {}) | config
    eos_ids: list[int] = []
    special_ids: dict[str, int] = {}
    for file in _MODEL_FILES:
        values = _json(path / file) or {}
        for name in ("bos_token", "eos_token", "pad_token"):
            ids = _ids(values.get(f"{name}_id"), f"{path / file}: {name}_id")
            if ids and name not in named:
                special_ids.setdefault(name, ids[0])
            if name == "eos_token":
                eos_ids = eos_ids or ids
    return Folder(
        path=path,
        tokenizer=_json(path / TOKENIZER_FILE, max_bytes=_MAX_BYTES),
        sentencepiece=_bytes(path / tokenizer_lib.FILE_NAME, _MAX_BYTES),
        vocabulary=_vocabulary(path),
        config=config,
        special_tokens=dict(_special_tokens(named)),
        special_ids=special_ids,
        eos_ids=eos_ids,
        chat_template=_chat_template(path, config),
        # What the versions of transformers do not agree on is said.
        settings={"clean_up_tokenization_spaces": False} | {name: config[name] for name in SETTINGS if name in config},
    )


def write(folder: pathlib.Path, content: Mapping[str, Any], *, settings: Any, chat_template: str | None) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, where there is one, the chat template."""
    write_bytes(folder / TOKENIZER_FILE, json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode())
    write_json(folder / CONFIG_FILE, settings)
    if chat_template is not None:
        write_bytes(folder / TEMPLATE_FILE, chat_template.encode())


def write_ids(folder: pathlib.Path, ids: Mapping[str, int | list[int]]) -> None:
    """Puts ids of special tokens into config.json and generation_config.json, beside what they say already."""
    for file in _MODEL_FILES:
        write_json(folder / file, read_json(folder / file) | dict(ids))


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def with_added(files: Folder, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """The content with the special tokens that only tokenizer_config.json names, and the id of each token.

    Special tokens are matched before the vocabulary is, so they must be among `added_tokens`.
    """
    model, added = content.get("model"), content.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        ids = {
            entry[0]: id
            for id, entry in enumerate(vocabulary)
            if isinstance(entry, list) and entry and isinstance(entry[0], str)
        }
    else:
        ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    if not isinstance(added, list) or not all(isinstance(each, dict) and "content" in each for each in added):
        raise ValueError(f"{TOKENIZER_FILE}: added_tokens: expected a list of objects with `content`")
    for each in added:
        ids.setdefault(str(each["content"]), each.get("id"))
    known = {str(each["content"]) for each in added}
    declared = files.config.get("added_tokens_decoder")
    more = dict(_declared(declared if isinstance(declared, dict) else {}))
    for text in (*files.special_tokens.values(), *_more_tokens(files.config)):
        if text in ids:
            more.setdefault(text, special(ids[text], text))
    more = {text: entry for text, entry in more.items() if text not in known}
    ids.update({text: entry["id"] for text, entry in more.items() if text not in ids})
    return {**content, "added_tokens": [*added, *more.values()]}, ids


def _declared(declared: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of `added_tokens_decoder`, by id."""
    for id, entry in sorted(declared.items(), key=lambda item: (len(item[0]), item[0])):
        if (
            not re.fullmatch("[0-9]{1,9}", id)
            or not isinstance(entry, dict)
            or not isinstance(entry.get("content"), str)
        ):
            raise ValueError(f"{CONFIG_FILE}: added_tokens_decoder[{id!r}]: expected an id with a token's `content`")
        flags = {name: entry.get(name) is True for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        yield entry["content"], {"id": int(id), "content": entry["content"], **flags}


def _special_tokens(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in _NAMES:
        text = _token_text(values.get(name))
        if text is not None:
            yield name, text


def _more_tokens(config: Mapping[str, Any]) -> Iterator[str]:
    for name in _MORE_NAMES:
        values = config.get(name)
        for value in values if isinstance(values, list) else ():
            text = _token_text(value)
            if text is not None:
                yield text


def _token_text(value: Any) -> str | None:
    """A token is written as its text, or as an object that holds it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _ids(value: Any, where: str) -> list[int]:
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in found):
        raise ValueError(f"{where}: got {value!r:.80}, expected an id or a list of them")
    return found


def _chat_template(path: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    file = _text(path / TEMPLATE_FILE, _MAX_CONFIG_BYTES)
    if file is not None:
        return file
    value = config.get("chat_template")
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    named = {each.get("name"): each.get("template") for each in value if isinstance(each, dict)}
    if not isinstance(named.get("default"), str):
        logging.warning("%s: no chat template is named default, among %s; none is taken", path, sorted(map(str, named)))
        return None
    return named["default"]


def _vocabulary(path: pathlib.Path) -> tuple[dict[str, int], list[str]] | None:
    for vocabulary_name, merges_name in _VOCABULARY_FILES:
        vocabulary = _json(path / vocabulary_name, max_bytes=_MAX_BYTES)
        merges = _text(path / merges_name, _MAX_BYTES)
        if vocabulary is None or merges is None:
            continue
        if not all(isinstance(id, int) and id >= 0 for id in vocabulary.values()):
            raise ValueError(f"{path / vocabulary_name}: expected an id for each piece")
        lines = merges.split("\n")
        return vocabulary, [line for at, line in enumerate(lines) if line and not (at == 0 and line.startswith("#"))]
    return None


def _json(path: pathlib.Path, *, max_bytes: int = _MAX_CONFIG_BYTES) -> dict[str, Any] | None:
    content = _bytes(path, max_bytes)
    if content is None:
        return None
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _text(path: pathlib.Path, max_bytes: int) -> str | None:
    content = _bytes(path, max_bytes)
    try:
        return None if content is None else content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error})") from error


def _bytes(path: pathlib.Path, max_bytes: int) -> bytes | None:
    if not path.is_file():
        return None
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path}: {size:,} bytes, expected at most {max_bytes:,}")
    return path.read_bytes()
