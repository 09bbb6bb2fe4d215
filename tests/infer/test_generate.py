"""Laws of generation: the cache changes nothing, batching changes nothing, streaming changes nothing."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from gptjax.infer import generate as generation
from gptjax.infer.generate import GenerateConfig, generate, stream
from gptjax.infer.sampling import SamplingConfig
from gptjax.nn import transformer
from gptjax.parallel import mesh as mesh_lib
from gptjax.parallel import rules
from tests.infer.conftest import MOE, VARIANTS, build

PROMPTS = [[5, 9, 33], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [60], [44, 2, 44, 2, 44, 2, 44]]
DRAWN = SamplingConfig(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.1)


def decode_text(tokens):
    """Pieces of one to three bytes, some of which are parts of characters."""
    pieces = ["é".encode()[:1], "é".encode()[1:], "日".encode()[:2], "日".encode()[2:]]
    pieces += [bytes([97 + i % 26]) * (1 + i % 3) for i in range(63)]
    return b"".join(pieces[token] for token in tokens).decode("utf-8", errors="replace")


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, params, tokens_BT):
    return transformer.logits(cfg, params, transformer.forward(cfg, params, tokens_BT).hidden_BTD)


def full_logits(cfg, params, rows):
    """Float32 logits of each row, by forward passes without a cache."""
    tokens_BT = np.array([list(row) + [0] * (48 - len(row)) for row in rows], np.int32)
    logits_BTV = np.asarray(forward(cfg, params, tokens_BT))
    return [logits_TV[: len(row)] for logits_TV, row in zip(logits_BTV, rows, strict=True)]


def test_greedy_is_the_argmax_of_full_forwards_for_every_kind_of_layer(variant):
    cfg, params = variant
    completions = generate(cfg, params, prompts=PROMPTS, config=GenerateConfig(max_new_tokens=14))
    rows = [prompt + list(c.tokens) for prompt, c in zip(PROMPTS, completions, strict=True)]
    for prompt, completion, logits_TV in zip(PROMPTS, completions, full_logits(cfg, params, rows), strict=True):
        assert len(completion.tokens) == 14 and completion.finish_reason == "length" and completion.text is None
        predicted_NV = logits_TV[len(prompt) - 1 : -1]
        chosen_N = predicted_NV[np.arange(14), completion.tokens]
        np.testing.assert_array_less(predicted_NV.max(-1) - chosen_N, 1e-4)
        logprobs_N = chosen_N - np.asarray(jax.nn.logsumexp(predicted_NV, axis=-1))
        np.testing.assert_allclose(completion.logprobs, logprobs_N, atol=1e-4)


@pytest.mark.parametrize("sampling", [SamplingConfig(), DRAWN], ids=["greedy", "drawn"])
def test_a_row_does_not_depend_on_its_neighbours(tiny, sampling):
    config = GenerateConfig(max_new_tokens=10, sampling=sampling)
    alone = [generate(*tiny, prompts=[prompt], config=config)[0] for prompt in PROMPTS[:1] * 3]
    first = generate(*tiny, prompts=PROMPTS, config=config)[0]
    assert alone[0].tokens == alone[1].tokens == first.tokens
    np.testing.assert_allclose(first.logprobs, alone[0].logprobs, atol=1e-5)


def test_rows_of_different_length_equal_each_alone(tiny):
    config = GenerateConfig(max_new_tokens=10)
    together = generate(*tiny, prompts=PROMPTS, config=config)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        assert generate(*tiny, prompts=[prompt], config=config)[0].tokens == completion.tokens


@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
@pytest.mark.parametrize("kind", ["gqa", "window", "mla", "moe"])
def test_a_model_spread_over_devices_generates_the_same(kind, sizes):
    cfg, params = build(**VARIANTS[kind])
    config = GenerateConfig(max_new_tokens=6)
    alone = generate(cfg, params, prompts=PROMPTS, config=config)
    with mesh_lib.use(dataclasses.replace(mesh_lib.all_devices("data"), **{"data": 1} | sizes)) as mesh:
        layouts = rules.tree_shardings(mesh, transformer.param_axes(cfg), params)
        spread = generate(cfg, jax.device_put(params, layouts), prompts=PROMPTS, config=config)
    for one, other in zip(alone, spread, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_experts_with_a_capacity_take_every_token_when_generating():
    limited = dataclasses.replace(MOE, capacity_factor=0.5)
    cfg, params = build(moe=limited)
    config = GenerateConfig(max_new_tokens=6)
    prompts = [PROMPTS[1], list(range(40))]  # the second is padded to more than the first is alone
    together = generate(cfg, params, prompts=prompts, config=config)
    assert generate(cfg, params, prompts=prompts[:1], config=config)[0].tokens == together[0].tokens
    dropless, _ = build(moe=MOE)
    assert generate(dropless, params, prompts=prompts, config=config) == together


def test_draws_depend_on_the_seed_and_the_row_alone(tiny):
    config = GenerateConfig(max_new_tokens=12, sampling=SamplingConfig(temperature=1.5))
    first = generate(*tiny, prompts=[[7, 8]] * 3, config=config)
    again = generate(*tiny, prompts=[[7, 8]] * 3, config=config)
    other = generate(*tiny, prompts=[[7, 8]] * 3, config=dataclasses.replace(config, seed=1))
    assert first == again and first != other
    assert len({completion.tokens for completion in first}) == 3


def test_generation_ends_at_eos_row_by_row(tiny):
    free = generate(*tiny, prompts=PROMPTS, config=GenerateConfig(max_new_tokens=10))
    eos = free[0].tokens[3]
    config = GenerateConfig(max_new_tokens=10, eos_ids=(eos, 66))
    ended = generate(*tiny, prompts=PROMPTS, config=config, decode_fn=decode_text)
    for before, after in zip(free, ended, strict=True):
        cut = next((i + 1 for i, token in enumerate(before.tokens) if token in (eos, 66)), None)
        assert after.tokens == before.tokens[:cut]
        assert after.finish_reason == ("length" if cut is None else "eos")
        assert after.text == decode_text(after.tokens if cut is None else after.tokens[:-1])
    assert ended[0].finish_reason == "eos"


def test_repetition_penalty_covers_prompt_and_completion(tiny):
    config = GenerateConfig(max_new_tokens=20, sampling=SamplingConfig(repetition_penalty=1e6))
    for prompt, completion in zip(PROMPTS, generate(*tiny, prompts=PROMPTS, config=config), strict=True):
        # So strong a penalty turns every positive logit of a seen token to nearly zero.
        (logits,) = full_logits(*tiny, [prompt + list(completion.tokens)])
        for i, token in enumerate(completion.tokens):
            seen = set(prompt) | set(completion.tokens[:i])
            scores = logits[len(prompt) - 1 + i].copy()
            scores[list(seen)] = np.where(scores[list(seen)] < 0, scores[list(seen)] * 1e6, scores[list(seen)] / 1e6)
            assert scores.max() - scores[token] < 1e-4


@pytest.mark.parametrize("sampling", [SamplingConfig(), DRAWN], ids=["greedy", "drawn"])
def test_streamed_text_is_the_text_and_never_half_a_character(tiny, sampling):
    for seed in range(4):
        config = GenerateConfig(max_new_tokens=30, sampling=sampling, seed=seed)
        prompt = [2, 3, 10 + seed]
        whole = generate(*tiny, prompts=[prompt], config=config, decode_fn=decode_text)[0]
        pieces = list(stream(*tiny, prompt=prompt, config=config, decode_fn=decode_text))
        assert "".join(pieces) == whole.text
        assert len(pieces) > 1


def test_stop_strings_across_tokens_end_a_row_in_both_modes(tiny):
    free = generate(*tiny, prompts=PROMPTS, config=GenerateConfig(max_new_tokens=30), decode_fn=decode_text)
    # Two neighbouring characters of different tokens.
    text = free[1].text
    stop = next(text[i : i + 2] for i in range(10, len(text)) if text[i] != text[i + 1])
    config = GenerateConfig(max_new_tokens=30, stop=(stop,))
    stopped = generate(*tiny, prompts=PROMPTS, config=config, decode_fn=decode_text)
    for before, after in zip(free, stopped, strict=True):
        assert after.text == before.text.split(stop)[0]
        assert after.tokens == before.tokens[: len(after.tokens)]
        if stop in before.text:
            assert after.finish_reason == "stop" and stop in decode_text(after.tokens)
            assert stop not in decode_text(after.tokens[:-1])
    assert stopped[1].finish_reason == "stop"
    assert "".join(stream(*tiny, prompt=PROMPTS[1], config=config, decode_fn=decode_text)) == stopped[1].text


def test_one_program_serves_prompts_of_a_bucket_and_every_setting_of_a_stage(tiny):
    def run(prompt, temperature, seed, num):
        sampling = SamplingConfig(temperature=temperature, min_p=temperature / 10)
        generate(*tiny, prompts=[prompt], config=GenerateConfig(max_new_tokens=num, sampling=sampling, seed=seed))

    run([1, 2], 0.5, 0, 5)
    sizes = generation.decode.prefill._cache_size(), generation.decode.decode._cache_size()
    run([1] * 14, 0.9, 3, 9)
    run([1] * 3, 1.9, 4, 40)
    assert (generation.decode.prefill._cache_size(), generation.decode.decode._cache_size()) == sizes


def test_few_lengths_of_buffers_are_compiled_and_little_is_read_past_the_end():
    lengths = [generation._buffer_len(length) for length in range(1, 8193)]
    assert all(length <= found < length + max(64, length / 4) for length, found in enumerate(lengths, 1))
    assert len(set(lengths)) == 8 + 4 * 4  # up to 512 in steps of 64, then four a doubling


@pytest.mark.parametrize("learned", [True, False])
def test_the_context_is_a_limit(tiny, learned):
    cfg, params = tiny
    cfg = dataclasses.replace(cfg, learned_positions=learned)
    with pytest.raises(ValueError, match="12 tokens.*max_new_tokens=54.*seq_len=64.*at most 53") as raised:
        generate(cfg, params, prompts=PROMPTS, config=GenerateConfig(max_new_tokens=54))
    assert ("larger seq_len" in str(raised.value)) != learned
    with pytest.raises(ValueError, match="shorten the prompt and ask for fewer tokens, at most 65 together"):
        generate(cfg, params, prompts=[[1] * 65], config=GenerateConfig(max_new_tokens=200))
    for new_tokens, at_most in ((1, 64), (24, 41)):
        with pytest.raises(ValueError, match=f"shorten the prompt to at most {at_most} tokens"):
            generate(cfg, params, prompts=[[1] * 65], config=GenerateConfig(max_new_tokens=new_tokens))
    if not learned:
        (last,) = generate(cfg, params, prompts=[[1] * 64], config=GenerateConfig(max_new_tokens=1))
        assert len(last.tokens) == 1
        longer = dataclasses.replace(cfg, seq_len=100)
        (completion,) = generate(longer, params, prompts=[[1, 2]], config=GenerateConfig(max_new_tokens=63))
        assert len(completion.tokens) == 63


@pytest.mark.parametrize(
    "prompts,changes,message",
    [
        ([], {}, "at least one"),
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1, 67]], {}, "vocab_size=67"),
        ([[-1]], {}, "vocab_size=67"),
        ([[1]], {"stop": ("x",)}, "decode"),
    ],
)
def test_bad_input_is_named(tiny, prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(*tiny, prompts=prompts, config=GenerateConfig(max_new_tokens=2, **changes))


def test_a_bidirectional_model_and_no_tokens_are_refused(tiny):
    cfg, params = tiny
    with pytest.raises(ValueError, match="causal=False"):
        generate(dataclasses.replace(cfg, causal=False), params, prompts=[[1]], config=GenerateConfig(max_new_tokens=2))
    for number in (0, 2.5):
        with pytest.raises(ValueError, match=f"max_new_tokens={number}: expected a whole number"):
            GenerateConfig(max_new_tokens=number)
    with pytest.raises(ValueError, match="seed=2147483648: expected 0 to"):
        GenerateConfig(max_new_tokens=1, seed=2**31)


def test_a_stream_refuses_bad_input_before_the_first_piece(tiny):
    """Whoever streams to a terminal has shown the prompt by then."""
    for prompt, stop, message in (([], (), "has no tokens"), ([1], ("",), "empty stop string")):
        config = GenerateConfig(max_new_tokens=2, stop=stop)
        with pytest.raises(ValueError, match=message):
            stream(*tiny, prompt=prompt, config=config, decode_fn=lambda ids: "x" * len(ids))
