"""The process that measures another library for `tools/bench.py`; needs torch and nothing of gptjax.

Usage: bench_peers.py transformers|nanogpt <checkout of nanoGPT or empty> <task as JSON>
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

STARTED = time.perf_counter()

import torch  # noqa: E402

_MIN_MEASUREMENT_SECONDS = 0.2


def main() -> None:
    peer, checkout, task = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.manual_seed(0)
    model, optimizer, loss_fn = _nanogpt(task, checkout) if peer == "nanogpt" else _transformers(task)
    run = _decoding(task, model) if "new_tokens" in task else _training(task, model, optimizer, loss_fn)
    run()
    _answer(first_step_seconds=time.perf_counter() - STARTED)
    run()
    start = time.perf_counter()
    run()
    repeats = max(1, round(_MIN_MEASUREMENT_SECONDS / (time.perf_counter() - start)))
    for request in sys.stdin:
        if request.strip() == "finish":
            break
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            run()
        _answer(
            wall_seconds=(time.perf_counter() - wall) / repeats,
            processor_seconds=(time.process_time() - processor) / repeats,
        )
    _answer(peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _answer(**values: float) -> None:
    print(json.dumps(values), flush=True)


def _nanogpt(task: dict[str, Any], checkout: str) -> tuple[Any, Any, Callable]:
    sys.path.insert(0, checkout)
    from model import GPT, GPTConfig

    model = GPT(
        GPTConfig(
            n_layer=task["num_layers"],
            n_head=task["num_heads"],
            n_embd=task["d_model"],
            block_size=task["seq_len"],
            vocab_size=task["vocab_size"],
            dropout=0.0,
            bias=False,
        )
    )
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    return model, optimizer, lambda x, y: model(x, y)[1]


def _transformers(task: dict[str, Any]) -> tuple[Any, Any, Callable]:
    import transformers

    tokens = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if task["kind"] == "gpt2":
        config = transformers.GPT2Config(
            n_layer=task["num_layers"],
            n_head=task["num_heads"],
            n_embd=task["d_model"],
            n_positions=task["seq_len"],
            vocab_size=task["vocab_size"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **tokens,
        )
    else:
        sizes = dict(
            vocab_size=task["vocab_size"],
            hidden_size=task["d_model"],
            intermediate_size=task["d_ff"],
            num_hidden_layers=task["num_layers"],
            num_attention_heads=task["num_heads"],
            num_key_value_heads=task["num_kv_heads"],
            max_position_embeddings=task["seq_len"],
            **tokens,
        )
        if task["kind"] == "llama":
            config = transformers.LlamaConfig(**sizes)
        else:
            experts = dict(num_local_experts=task["num_experts"], num_experts_per_tok=task["num_experts_per_token"])
            config = transformers.MixtralConfig(**sizes, **experts)
    model = transformers.AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    return model, optimizer, lambda x, y: model(input_ids=x, labels=y).loss


def _training(task: dict[str, Any], model: Any, optimizer: Any, loss_fn: Callable) -> Callable[[], None]:
    tokens = torch.randint(0, task["vocab_size"], (task["batch_size"], task["seq_len"]))
    targets = torch.roll(tokens, -1, 1)
    model.train()

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def _decoding(task: dict[str, Any], model: Any) -> Callable[[], None]:
    prompts = torch.randint(0, task["vocab_size"], (task["batch_size"], task["prompt_tokens"]))
    mask = torch.ones_like(prompts)
    length = dict(max_new_tokens=task["new_tokens"], min_new_tokens=task["new_tokens"])
    model.eval()

    def run() -> None:
        with torch.inference_mode():
            model.generate(prompts, attention_mask=mask, do_sample=False, pad_token_id=0, **length)

    return run


if __name__ == "__main__":
    main()
