"""The process that measures a torch library for `tools/bench.py`; needs torch and nothing of gptjax.

Usage: bench_peers_torch.py transformers|nanogpt <checkout of nanoGPT or empty> <task as JSON>

In float32, eager and without dropout, as both run on a CPU unless told otherwise. nanoGPT brings its
own AdamW, which is torch's fused one only on a GPU; transformers is given the fused one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import bench_worker
import torch


def main() -> None:
    peer, checkout, task = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.manual_seed(0)
    model, optimizer, loss_fn = _nanogpt(task, checkout) if peer == "nanogpt" else _transformers(task)
    run = _decoding(task, model) if "new_tokens" in task else _training(task, model, optimizer, loss_fn)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    packages = ("torch",) if peer == "nanogpt" else ("torch", "transformers")
    bench_worker.serve(run, num_params=num_params, packages=packages)


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


def _training(task: dict[str, Any], model: Any, optimizer: Any, loss_fn: Callable) -> bench_worker.Run:
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


def _decoding(task: dict[str, Any], model: Any) -> bench_worker.Run:
    prompts = torch.randint(0, task["vocab_size"], (task["batch_size"], task["prompt_tokens"]))
    length = dict(max_new_tokens=task["new_tokens"], min_new_tokens=task["new_tokens"])
    options = dict(do_sample=False, use_cache=True, return_dict_in_generate=True, pad_token_id=0, **length)
    model.eval()

    def run() -> None:
        with torch.inference_mode():
            output = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        cache = output["cache" if "cache" in output else "past_key_values"]  # The older name.
        # The last token is chosen and never read, so it has no place in the cache.
        cached = cache.get_seq_length()
        expected = task["prompt_tokens"] + task["new_tokens"] - 1
        assert cached == expected, f"generate cached {cached} positions, expected {expected}: no fair comparison"

    return run


if __name__ == "__main__":
    main()
