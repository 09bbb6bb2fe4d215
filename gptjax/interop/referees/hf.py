"""transformers on torch, in float32 on the CPU, as the referee of Hugging Face folders."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from gptjax.interop.certificate import STRINGS
from gptjax.json_files import read_json

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tokenizer_config.json")


class TransformersRunner:
    """A `Runner` of the folder that `save_pretrained`, or an export, left; nothing else is read, and nothing fetched.

    Raises:
      ImportError: without torch and transformers.
      ValueError: naming a tensor that transformers misses in the folder, or has no place for.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        torch, transformers = _import()
        if not folder.is_dir():  # transformers would take the name for one of a model on the network
            raise ValueError(f"{folder}: no such folder; expected one with config.json and safetensors files")
        self.name = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self._torch = torch
        # Packed weights are what they are unpacked to, which for transformers is the dtype that is asked for.
        is_packed = read_json(folder / "config.json").get("quantization_config") is not None
        self._model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=torch.bfloat16 if is_packed else torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        # What is missing was drawn at random, with no more than a warning.
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if loading[kind]:
                raise ValueError(f"{folder}: {sorted(map(str, loading[kind]))[0]}: {kind} for {self.name}")
        self._model.float().eval()
        # The folder's own could sample, penalise repetition, or stop at an end token.
        self._model.generation_config = transformers.GenerationConfig()
        self._tokenizer = _tokenizer(transformers, folder)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        with self._torch.no_grad():
            return self._model(input_ids=self._ids(tokens), use_cache=False).logits[0].float().numpy()

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        ids = self._ids(tokens)
        with self._torch.no_grad():
            output = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                do_sample=False,
                use_cache=True,
                max_new_tokens=num_tokens,
                pad_token_id=0,  # of shorter rows in a batch, of which there are none; without it comes a warning
            )
        return output[0, len(tokens) :].tolist()

    def encode(self, text: str) -> list[int] | None:
        if self._tokenizer is None:
            return None
        return _ids(self._tokenizer, text)

    def hidden(self, tokens: Sequence[int]) -> list[np.ndarray]:
        # `output_hidden_states` gives the last layer's output after the final norm, so the layers are asked.
        found: list[np.ndarray] = []

        def before(module: Any, args: tuple, kwargs: dict) -> None:
            found.append((args[0] if args else kwargs["hidden_states"])[0].numpy().copy())

        def after(module: Any, args: tuple, output: Any) -> None:
            found.append((output[0] if isinstance(output, tuple) else output)[0].numpy().copy())

        base = getattr(self._model.base_model, "language_model", self._model.base_model)  # where it sees images too
        layers = base.layers if hasattr(base, "layers") else base.h
        hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [layer.register_forward_hook(after) for layer in layers]
        try:
            self.logits(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _ids(self, tokens: Sequence[int]) -> Any:
        return self._torch.tensor([list(tokens)], dtype=self._torch.long)


def _tokenizer(transformers: Any, folder: pathlib.Path) -> Any:
    """What cuts text as the folder says; None if it has no tokenizer.

    For some `tokenizer_class`es (LlamaTokenizer among them) `AutoTokenizer` of transformers 5 takes no more than the
    vocabulary from tokenizer.json, and cuts text in a way of its own. The file is then run as it is.
    """
    if not any((folder / file).exists() for file in _TOKENIZER_FILES):
        return None
    auto = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    file = folder / "tokenizer.json"
    if not file.exists() or type(auto) is transformers.PreTrainedTokenizerFast:
        return auto
    as_written = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    different = [text for text in STRINGS if _ids(auto, text) != _ids(as_written, text)]
    if different:
        logging.warning(
            "%s: AutoTokenizer (%s) makes other ids of %d of %d texts, such as %r, than its tokenizer.json says; the "
            "file is compared with",
            folder,
            type(auto).__name__,
            len(different),
            len(STRINGS),
            different[0],
        )
    return as_written


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _import() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(
            f"{error.name or error}: not installed; the referee of Hugging Face folders needs torch and transformers: "
            "pip install 'gptjax[referees]'"
        ) from error
    return torch, transformers
