"""What `make demo` trains: a small GPT on the source of the Python standard library.

Command   make demo
Hardware  2 CPU cores.
Time      11 minutes of training, as many steps as the machine does in them (experiments/demo.py); 13 in all.
Metric    1.187 bits per byte on held-out modules after 1,631 steps, where xz -9e needs 1.687.
Source    own measurements, docs/log.md; the architecture is Qwen3's, so that others load it.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(data_dir: str = "runs/demo/data") -> ConfigDict:
    config = base.get_config()
    config.name = "demo"
    config.model = base.llama(
        vocab_size=4096, seq_len=512, d_model=256, num_layers=4, num_heads=4, num_kv_heads=4, d_ff=384,
        tie_embeddings=True, rope_theta=10_000.0, qk_norm=True,
    )  # fmt: skip
    config.data = base.data(data_dir, batch_size=4)
    config.optim = base.muon(learning_rate=0.02, warmup_steps=20, decay_fraction=0.3, weight_decay=0.0, b1=0.8)
    config.train.num_steps = 1350
    config.train.checkpoint_every = 60
    config.train.eval_every = 240
    return config.lock()
