"""The proof of a conversion: what two implementations compute from the same tokens, side by side.

Compared are logits (the largest absolute difference, and the mean Kullback-Leibler divergence of
the next token's distribution in nats), greedy continuations with a cache, and token ids of
fixed strings. Each has a tolerance by dtype; outside of it a conversion is rejected.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gptjax.interop.runner import Runner
from gptjax.nn.config import ModelConfig, MoEConfig
from gptjax.progress import Line

NUM_GREEDY_TOKENS = 64
_LONG_TOKENS = 192
_PAST_WINDOW_TOKENS = 33
_LAYER_TOLERANCE = 1e-3

TEXTS: dict[str, str] = {
    "short": "The",
    "prose": "Once upon a time there was a little girl who lived near a forest, and every morning she",
    "code": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "non-latin": "Ἐν ἀρχῇ ἦν ὁ λόγος. 天地玄黃，宇宙洪荒。 Привет, мир! これは",
}
STRINGS: tuple[str, ...] = (
    "",
    " ",
    "   leading and trailing   ",
    "tabs\tand\nnew lines\r\n\n\n",
    "    indented\n        twice",
    "Hello, world!",
    "don't we'll I'VE",
    "12345 3.14159 1,000,000",
    "naïve café Ångström ﬁ ①",
    "e\u0301 against \u00e9",
    "天地玄黃，宇宙洪荒",
    "これはテストです。",
    "Привет, мир!",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇳",
    "\u200b\u00a0\ufeff",
    "a\u2581b",
    "<s> </s> <|endoftext|> <|im_start|>",
    "https://example.org/?q=a%20b&c=d#e",
    "x" * 300,
)


@dataclass(frozen=True)
class Tolerance:
    """What a conversion may change; `greedy` is the share of prompts' tokens that must agree before the first tie."""

    max_logit: float
    mean_kl: float
    greedy: float


# What two implementations with the same values may differ by. Float32: sums in another order. Where weights are
# narrower, some peers round activations to match, up to 8 bits (llama.cpp), and how far single logits then move depends
# on the model: the mean over a text is judged.
ANY_LOGIT = 30.0
TOLERANCES: dict[str, Tolerance] = {
    "float32": Tolerance(2e-3, 1e-6, 1.0),
    "float16": Tolerance(ANY_LOGIT, 1e-4, 0.9),
    "bfloat16": Tolerance(ANY_LOGIT, 2e-3, 0.5),
    "q8_0": Tolerance(ANY_LOGIT, 0.03, 0.0),
    "q4_0": Tolerance(ANY_LOGIT, 0.05, 0.0),
}
# What rounding the weights may do to a model, in nats a token: more is no rounding.
ROUNDING_KL: dict[str, float] = {"float16": 0.02, "f16": 0.02, "bfloat16": 0.05, "bf16": 0.05, "q8_0": 0.1, "q4_0": 3.0}

# Which experts a token goes to is a step: where two are as good as tied, rounding sends it to the other one, and all
# that follows differs. Few tokens do in float32, most in a deep model of 8 bits, so of a mixture the mean is judged:
# one layer of two with experts, gate and up, or heads in a wrong order gave 0.7 to 4 nats.
_MIXTURE_KL: dict[str, float] = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.05, "q8_0": 0.1, "q4_0": 0.1}


def tolerance(dtype: str, model: ModelConfig) -> Tolerance:
    """What values of a dtype, one of `TOLERANCES`, may change in a model."""
    if not any(isinstance(block.mlp, MoEConfig) for block in model.blocks):
        return TOLERANCES[dtype]
    return Tolerance(ANY_LOGIT, _MIXTURE_KL[dtype], 0.0)


def check_dtype(dtype: np.dtype | None) -> None:
    """Whether values may be cast to it.

    Raises:
      ValueError: if parameters are not of that dtype.
    """
    if dtype is not None and dtype.name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype={dtype.name}: expected float32, bfloat16 or float16")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One prompt. What an implementation does not give away is None.

    Attributes:
      greedy_agreement: tokens of the continuations that agree before the first that does not, over their number.
      margin: the difference of the two best logits, by the source, where the continuations part.
    """

    prompt: str
    num_tokens: int
    max_logit_difference: float | None = None
    mean_kl_nats: float | None = None
    greedy_agreement: float
    margin: float | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizerComparison:
    """How many fixed strings both tokenizers turned into ids, and those whose ids differ.

    Attributes:
      different: without those of `known`.
      known: strings that the peer's own code is known to read otherwise, whatever the conversion did, and why.
    """

    num_strings: int
    different: tuple[str, ...]
    known: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Perplexities:
    """Of one text, all targets of the same rows.

    Attributes:
      checkpoint: by the checkpoint.
      written: by ours with the values that were written.
      peer: by the peer, of what was written.
    """

    text: str
    num_targets: int
    checkpoint: float
    written: float
    peer: float


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What is written to `certificate.json`.

    Attributes:
      accepted: whether all that could be compared is within the tolerance.
      source, target: what each is and the hashes of its files.
      referees: who ran the two; where a peer's own implementation is missing, that is said.
      tokenizer: None without a tokenizer on both sides.
      perplexities: None unless a text was given.
      values: how the values were compared without running anything.
      problems: why it was not accepted.
      notes: what a peer is known to compute otherwise than the model, and how far off that is.
    """

    accepted: bool
    kind: str
    source: Mapping[str, Any]
    target: Mapping[str, Any]
    num_params: int
    dtype: str
    referees: Mapping[str, str]
    tolerance: Tolerance
    comparisons: tuple[Comparison, ...] = ()
    tokenizer: TokenizerComparison | None = None
    perplexities: Perplexities | None = None
    values: str = ""
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    first_different_layer: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def prompts(source: Runner, model: ModelConfig) -> dict[str, list[int]]:
    """Token prompts by name: fixed texts where there is a tokenizer, and numbers that fill the context or a window."""
    found: dict[str, list[int]] = {}
    for name, text in TEXTS.items():
        ids = [id for id in source.encode(text) or () if id < model.vocab_size]
        if ids:
            found[name] = ids[: max(1, model.seq_len // 2)]
    random = np.random.default_rng(0)
    windows = [block.attention.window for block in model.blocks if block.attention.window is not None]
    longest = max(1, model.seq_len - min(NUM_GREEDY_TOKENS, model.seq_len // 2))
    sizes = {"one token": 1, "long": min(_LONG_TOKENS, longest)}
    if windows:
        sizes["past the window"] = min(max(windows) + _PAST_WINDOW_TOKENS, longest)
    for name, size in sizes.items():
        found[name] = random.integers(0, model.vocab_size, size).tolist()
    return found


@dataclass(frozen=True)
class Record:
    """What one implementation computes; the other runs after it, when this one's memory is free.

    Attributes:
      prompts: their tokens, by name.
      logits: `[T, V]` of each prompt with its continuation, or None.
      greedy: the continuation of each.
      ids: of each string; None without a tokenizer.
    """

    runner: str
    prompts: Mapping[str, list[int]]
    logits: Mapping[str, np.ndarray | None]
    greedy: Mapping[str, list[int]]
    ids: tuple[list[int] | None, ...] | None


def record(runner: Runner, tokens: Mapping[str, list[int]], *, seq_len: int) -> Record:
    """Runs every prompt, and its continuation as far as the context has room."""
    line = Line("compare")
    greedy = {}
    for number, (name, prompt) in enumerate(tokens.items()):
        line.show(f"{runner.name}: prompt {number + 1} of {len(tokens)} ({name})")
        greedy[name] = runner.greedy(prompt, max(1, min(NUM_GREEDY_TOKENS, seq_len - len(prompt))))
    line.close()
    ids = None if runner.encode("a") is None else tuple(runner.encode(text) for text in STRINGS)
    logits = {name: runner.logits([*prompt, *greedy[name]][:seq_len]) for name, prompt in tokens.items()}
    return Record(runner.name, tokens, logits, greedy, ids)


def compare(source: Record, target: Record) -> tuple[Comparison, ...]:
    """The figures of each prompt."""
    return tuple(_compare_prompt(source, target, name) for name in source.prompts)


def _compare_prompt(source: Record, target: Record, name: str) -> Comparison:
    """Logits are compared as far as both saw the same tokens: to where the continuations part."""
    pairs = list(zip(source.greedy[name], target.greedy[name], strict=False))
    fork = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    wanted, got = source.logits[name], target.logits[name]
    largest = mean_kl = margin = None
    last = len(source.prompts[name]) + fork
    if wanted is not None and fork < len(pairs):
        second, first = np.sort(wanted[last - 1])[-2:]
        margin = float(first - second)
    if wanted is not None and got is not None:
        size = min(wanted.shape[-1], got.shape[-1])  # some pad the vocabulary
        wanted, got = wanted[:last, :size], got[:last, :size]
        largest, mean_kl = float(np.abs(wanted - got).max()), _mean_kl(wanted, got)
    return Comparison(
        prompt=name,
        num_tokens=len(source.prompts[name]),
        max_logit_difference=largest,
        mean_kl_nats=mean_kl,
        greedy_agreement=fork / len(source.greedy[name]),
        margin=margin,
    )


def compare_tokenizers(
    source: Record, target: Record, *, reason_of: Callable[[str], str | None] = lambda text: None
) -> TokenizerComparison | None:
    """None unless both have a tokenizer; `reason_of` knows why the ids of a string have to differ."""
    if source.ids is None or target.ids is None:
        return None
    pairs = zip(STRINGS, source.ids, target.ids, strict=True)
    reasons = {text: reason_of(text) for text, a, b in pairs if a != b}
    return TokenizerComparison(
        num_strings=len(STRINGS),
        different=tuple(text for text, reason in reasons.items() if reason is None),
        known={text: reason for text, reason in reasons.items() if reason is not None},
    )


def _mean_kl(wanted_TV: np.ndarray, got_TV: np.ndarray) -> float:
    """Mean over positions of `sum_v p_v (log p_v - log q_v)`, in float64."""
    log_p, log_q = _log_softmax(wanted_TV), _log_softmax(got_TV)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def _log_softmax(x_TV: np.ndarray) -> np.ndarray:
    x = x_TV.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def problems(
    comparisons: Sequence[Comparison], tokenizer: TokenizerComparison | None, tolerance: Tolerance
) -> Iterator[str]:
    """A line for each figure outside of the tolerance.

    Continuations that part where the two best tokens are as near as the logits' own difference are a tie, which
    rounding decides.
    """
    for found in comparisons:
        difference = found.max_logit_difference
        # Not a number compares false to everything, so it must be what is asked for that is true.
        if difference is not None and not difference <= tolerance.max_logit:
            yield f"{found.prompt}: logits differ by {difference:.3g}, expected at most {tolerance.max_logit:g}"
        if found.mean_kl_nats is not None and not found.mean_kl_nats <= tolerance.mean_kl:
            yield f"{found.prompt}: mean KL {found.mean_kl_nats:.3g} nats, expected at most {tolerance.mean_kl:g}"
        tie = found.margin is not None and found.margin <= 2 * max(difference or 0.0, 1e-6)
        if found.greedy_agreement < tolerance.greedy and not tie:
            yield (
                f"{found.prompt}: greedy tokens agree for {found.greedy_agreement:.0%}, expected {tolerance.greedy:.0%}"
            )
    if tokenizer is not None and tokenizer.different:
        shown = ", ".join(map(repr, tokenizer.different[:4]))
        yield f"tokenizer: ids of {len(tokenizer.different)} of {tokenizer.num_strings} strings differ: {shown}"


def layer_differences(source: Runner, target: Runner, tokens: Sequence[int]) -> list[float] | None:
    """The largest difference of the residual stream relative to its largest value, of the embedding and each layer.

    None where an implementation does not show it.
    """
    wanted, got = source.hidden(tokens), target.hidden(tokens)
    if wanted is None or got is None:
        return None
    return [float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in zip(wanted, got, strict=True)]


def layer_lines(differences: Sequence[float] | None) -> list[str]:
    """A line for each layer."""
    if differences is None:
        return ["the peer does not show its layers"]
    return [f"{_layer_name(layer):>14}  {difference:.2e}" for layer, difference in enumerate(differences)]


def first_difference(differences: Sequence[float] | None) -> str:
    """Which layer is the first to differ by more than rounding; empty if none does."""
    for layer, difference in enumerate(differences or ()):
        if not difference <= _LAYER_TOLERANCE:
            return f"the first to differ is {_layer_name(layer)}, by {difference:.2g} of its largest value"
    return ""


def _layer_name(layer: int) -> str:
    return "the embedding" if layer == 0 else f"layer {layer - 1}"


def versions() -> dict[str, str]:
    """Of what could matter to the figures, where installed."""
    found = {"python": platform.python_version()}
    for package in (
        "gptjax",
        "jax",
        "numpy",
        "torch",
        "transformers",
        "tokenizers",
        "sentencepiece",
        "gguf",
        "xllamacpp",
    ):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
