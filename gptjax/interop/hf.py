"""Hugging Face folders: `config.json`, safetensors, tokenizer files."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from gptjax.checkpoint import reading
from gptjax.data import tokenizer as tokenizer_lib
from gptjax.interop import packed, safetensors, stream, tokenizers
from gptjax.interop.checkpoint import CheckpointTensors
from gptjax.interop.families import FAMILIES, MULTIMODAL
from gptjax.interop.reader import ConfigReader
from gptjax.interop.safetensors import SafetensorsFolder, SafetensorsWriter
from gptjax.interop.source import Readable, Source, digest
from gptjax.interop.table import Family, family_of, read_config
from gptjax.json_files import read_json, write_json
from gptjax.nn.config import ModelConfig

CONFIG_FILE = "config.json"
DEFAULT_SHARD_BYTES = 5_000_000_000
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def is_folder(path: pathlib.Path) -> bool:
    """Whether a directory is such a folder; a workdir of ours has a `config.json` too, of its run."""
    config = path / CONFIG_FILE
    return config.is_file() and (b'"model_type"' in config.read_bytes() or any(path.glob("*.safetensors")))


def open_source(folder: pathlib.Path) -> Source:
    """A folder as `save_pretrained` leaves it.

    Raises:
      ValueError: naming the file, and the key or tensor, that is missing, damaged or not supported.
    """
    path = folder / CONFIG_FILE
    values = _read_json(path)
    name, where = values.get("model_type"), str(path)
    known = [*FAMILIES, *MULTIMODAL]
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{path}: model_type: got {name!r:.80}, expected one of {', '.join(known)}")
    around = MULTIMODAL.get(name)
    _check_format(folder)
    stored = SafetensorsFolder(folder)
    tensors = packed.unpacked(stored, ConfigReader(values, path=where).section(packed.KEY))
    config: Mapping[str, Any] = {key: value for key, value in values.items() if key != packed.KEY}
    if around is not None:
        config = around.text_config(config, path=where)
        tensors = around.text_tensors(tensors, path=str(folder))
    family = FAMILIES[name] if around is None else around.family
    model = read_config(family, config, path=where)
    tensors = _normal(folder, tensors, family, model)
    return Source(
        path=folder,
        format="hf",
        family=family,
        model=model,
        tensors=family.adapt(tensors, model),
        tokenizer=tokenizers.read(folder),
        files=(path, *sorted({tensor.file for tensor in stored.values()}), *tokenizers.files_of(folder)),
        raw_config=values,
    )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: missing; expected a Hugging Face folder with it")
    try:
        values = read_json(path)
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deeply for a config") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _check_format(folder: pathlib.Path) -> None:
    if (folder / safetensors.SINGLE_FILE).exists() or (folder / safetensors.INDEX_FILE).exists():
        return
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder / pickled[0]}: a pickle, which runs code when it is opened, so it is not; save the model with "
            "safe_serialization=True, or fetch its .safetensors files"
        )
    raise ValueError(f"{folder / safetensors.SINGLE_FILE}: missing; expected it or {safetensors.INDEX_FILE}")


def _normal(
    folder: pathlib.Path, tensors: Mapping[str, Readable], family: Family, model: ModelConfig
) -> Mapping[str, Readable]:
    """The tensors under their full names, and without the copy of a tied head that some folders hold."""
    embedding, head = family.name_of("embed/tokens"), family.name_of("head/kernel")
    found = dict(tensors)
    if not any(name.startswith(family.prefix) for name in found):
        found = {name if name == head else family.prefix + name: tensor for name, tensor in found.items()}
    if model.tie_embeddings and head in found and embedding in found:
        if not _equal(found[head], found[embedding]):
            raise ValueError(
                f"{folder}: {head} differs from {embedding}, but config.json says that they are tied "
                "(tie_word_embeddings); set it to false if the head is the model's own"
            )
        del found[head]
    return found


def _equal(first: Readable, second: Readable) -> bool:
    same = first.shape == second.shape and first.dtype == second.dtype
    return same and digest(first.read()) == digest(second.read())


def write(
    checkpoint: epath.PathLike,
    folder: pathlib.Path,
    *,
    family_name: str | None = None,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    num_threads: int | None = None,
) -> Family:
    """Writes the folder of a checkpoint, without its certificate; goes on with what an earlier call left.

    Args:
      family_name: as `model_type` names it; None takes the first that expresses the model.
      dtype: of the tensors; None keeps the stored one.

    Raises:
      ValueError: if no family expresses the model, or the checkpoint is damaged.
    """
    meta = reading.read_meta(epath.Path(checkpoint))
    family = family_of(meta.model, FAMILIES, name=family_name)
    tensors = CheckpointTensors(checkpoint, family, meta.model, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"dtype": None if dtype is None else dtype.name, "family": family.name, "shard": max_shard_bytes}
    journal = stream.Journal(folder / stream.JOURNAL_FILE, job={"checkpoint": meta.checksums, **settings})
    shards = safetensors.plan_shards(
        {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, max_shard_bytes=max_shard_bytes
    )
    writer = SafetensorsWriter(folder, shards)

    def convert(task: stream.Tensor) -> list[int]:
        value, sums = tensors[task.name].read_with_sums()
        writer.write(task.name, value)
        return sums

    # In the order of our arrays: what training saved is read in chunks of many layers.
    names = sorted(tensors, key=lambda name: (tensors[name].unit.ours[0].path, tensors[name].unit.ours[0].index))
    tasks = [stream.Tensor(name, tensors[name].shape, tensors[name].dtype) for name in names]
    stream.run(tasks, convert, journal, label="export", num_threads=num_threads)
    tensors.verify(journal.notes)
    _write_config(folder, family, meta.model, next(iter(tensors.values())).dtype)
    _write_tokenizer(folder, checkpoint)
    journal.close()
    return family


def _write_config(folder: pathlib.Path, family: Family, model: ModelConfig, dtype: np.dtype) -> None:
    keys: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.name}
    write_json(folder / CONFIG_FILE, keys | family.write_config(model) | {"torch_dtype": dtype.name})


def _write_tokenizer(folder: pathlib.Path, checkpoint: epath.PathLike) -> None:
    content = reading.read_assets(epath.Path(checkpoint)).get(tokenizer_lib.FILE_NAME)
    if content is not None:
        tokenizers.write(tokenizer_lib.from_bytes(content), folder)
