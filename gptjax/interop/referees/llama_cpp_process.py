"""llama.cpp in a process of its own: `python llama_cpp_process.py FILE.gguf CONTEXT`, for `llama_cpp.LlamaCppRunner`.

The library is that of the `xllamacpp` wheel, whose Python interface gives away neither logits nor token ids, but
whose C functions are visible. Structures are passed as bytes, in which only the few fields of `_FIELDS` are set; that
they are where they are expected is checked against the library's defaults first.

A request is a line of JSON; the answer is a line of JSON, then as many bytes as it says. Imports nothing of gptjax.

Source: llama.cpp, `include/llama.h`.
"""

import ctypes
import importlib.metadata
import json
import os
import sys

import numpy as np
import xllamacpp

_BATCH = 256
# Of llama_context_params: where, and the default that proves that it is there.
_FIELDS = {
    "n_ctx": (0, 512),
    "n_batch": (4, 2048),
    "n_ubatch": (8, 512),
    "n_seq_max": (12, 1),
    "n_threads": (28, 4),
    "n_threads_batch": (32, 4),
    "rope_scaling_type": (40, -1),
    "pooling_type": (44, -1),
    "attention_type": (48, -1),
    "flash_attn_type": (52, -1),
    "type_k": (104, 1),
    "type_v": (108, 1),
}
_FLOAT32, _DISABLED = 0, 0


class _Params(ctypes.Structure):
    """More than any parameters of the library; passed on the stack, where the rest does no harm."""

    _fields_ = [("raw", ctypes.c_uint8 * 1024)]

    def get(self, name: str) -> int:
        return ctypes.c_int32.from_buffer(self, _FIELDS[name][0]).value

    def set(self, name: str, value: int) -> None:
        ctypes.c_int32.from_buffer(self, _FIELDS[name][0]).value = value


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    pointer, int32, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    for name, result, arguments in (
        ("llama_model_default_params", _Params, ()),
        ("llama_context_default_params", _Params, ()),
        ("llama_model_load_from_file", pointer, (ctypes.c_char_p, _Params)),
        ("llama_init_from_model", pointer, (pointer, _Params)),
        ("llama_model_get_vocab", pointer, (pointer,)),
        ("llama_vocab_n_tokens", ctypes.c_int32, (pointer,)),
        ("llama_vocab_type", ctypes.c_int32, (pointer,)),
        ("llama_model_n_ctx_train", ctypes.c_int32, (pointer,)),
        ("llama_tokenize", int32, (pointer, ctypes.c_char_p, int32, pointer, int32, flag, flag)),
        ("llama_batch_init", _Batch, (ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
        ("llama_decode", ctypes.c_int32, (pointer, _Batch)),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), (pointer,)),
        ("llama_get_memory", pointer, (pointer,)),
        ("llama_memory_clear", None, (pointer, ctypes.c_bool)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class LlamaCpp:
    """One model, in float32 where llama.cpp leaves the choice: keys and values, no flash attention."""

    def __init__(self, file: str, max_context: int) -> None:
        self._library = _library()
        params = self._library.llama_context_default_params()
        found = {name: params.get(name) for name in _FIELDS}
        expected = {name: default for name, (_, default) in _FIELDS.items()}
        if found != expected:
            raise RuntimeError(f"xllamacpp {version()}: its structures are not those known here: {found}")
        self._library.llama_backend_init()
        self._model = self._library.llama_model_load_from_file(
            file.encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"{file}: llama.cpp cannot load it; the reason is above, on standard error")
        trained = self._library.llama_model_n_ctx_train(self._model)
        self.context = min(trained, max_context)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Its threads wait for each other in a loop, which takes for ever beside other work.
        threads = max(1, cores // 2)
        for name, value in {
            "n_ctx": self.context,
            "n_batch": _BATCH,
            "n_ubatch": _BATCH,
            "n_threads": threads,
            "n_threads_batch": threads,
            "flash_attn_type": _DISABLED,
            "type_k": _FLOAT32,
            "type_v": _FLOAT32,
        }.items():
            params.set(name, value)
        self._context = self._library.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"{file}: llama.cpp cannot make a context of {self.context} tokens for it")
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self.vocab_size = self._library.llama_vocab_n_tokens(self._vocab)
        self.has_tokenizer = self._library.llama_vocab_type(self._vocab) != 0
        self._batch = self._library.llama_batch_init(_BATCH, 0, 1)
        self._position = 0

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Float32 `[T, V]`."""
        self._restart(len(tokens))
        parts = [self._decode(tokens[at : at + _BATCH]) for at in range(0, len(tokens), _BATCH)]
        return np.concatenate(parts)

    def greedy(self, tokens: list[int], num_tokens: int) -> np.ndarray:
        """Int32 `[num_tokens]`."""
        self._restart(len(tokens) + num_tokens)
        for at in range(0, len(tokens), _BATCH):
            last = self._decode(tokens[at : at + _BATCH])[-1]
        found = []
        for _ in range(num_tokens):
            found.append(int(last.argmax()))
            if len(found) < num_tokens:
                last = self._decode(found[-1:])[-1]
        return np.array(found, np.int32)

    def encode(self, text: str, parse_special: bool) -> np.ndarray:
        """Int32 ids, without special tokens around."""
        content = text.encode()
        ids = np.zeros(len(content) + 16, np.int32)
        arguments = (self._vocab, content, len(content), ids.ctypes.data, len(ids), False, parse_special)
        count = self._library.llama_tokenize(*arguments)
        if count < 0:
            raise RuntimeError(f"llama_tokenize: {count} for {len(content)} bytes")
        return ids[:count]

    def _restart(self, num_tokens: int) -> None:
        if num_tokens > self.context:
            raise ValueError(f"{num_tokens} tokens, expected at most the context of {self.context}")
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._position = 0

    def _decode(self, tokens: list[int]) -> np.ndarray:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token}: expected 0 to {self.vocab_size - 1}")
            batch.token[i], batch.pos[i], batch.logits[i] = token, self._position + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode: {status} for {len(tokens)} tokens at {self._position}")
        self._position += len(tokens)
        values = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(values, (len(tokens), self.vocab_size)).copy()


def version() -> str:
    """Of the wheel, which names the build of llama.cpp."""
    return importlib.metadata.version("xllamacpp")


def main() -> None:
    """Answers requests until standard input ends."""
    # llama.cpp prints to standard output too; the answers keep a copy of it to themselves.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def answer(description: dict, content: bytes = b"") -> None:
        answers.write(json.dumps(description | {"bytes": len(content)}).encode() + b"\n" + content)
        answers.flush()

    try:
        model = LlamaCpp(sys.argv[1], int(sys.argv[2]))
    except (ValueError, RuntimeError, AttributeError, OSError) as error:
        answer({"error": str(error)})
        return
    answer({"version": version(), "has_tokenizer": model.has_tokenizer, "vocab_size": model.vocab_size})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            found = getattr(model, request["call"])(*request["arguments"])
        except (ValueError, RuntimeError) as error:
            answer({"error": str(error)})
            continue
        answer({"dtype": found.dtype.name, "shape": found.shape}, found.tobytes())


if __name__ == "__main__":
    main()
