"""Llama 3 8B, 8,030,261,248 parameters.

Command   python -m experiments.pretrain --config=configs/llama_8b.py --workdir=gs://<bucket>/llama_8b
Hardware  TPU v5p-512 (256 chips) or 256 x H100; fully sharded, no tensor parallelism needed.
Time      1.7e5 steps of 4 M tokens (0.7 T) are 3.7e22 FLOPs: 8 days on 256 v5p chips at 45 % MFU.
Metric    no published loss at this length; the released model saw 15 T tokens.
Source    "The Llama 3 Herd of Models", arXiv:2407.21783, table 3 and section 3.4 (peak rate 3e-4, 8,000 warm-up
          steps, batches of 4 M tokens at first).
"""

from ml_collections import ConfigDict

from configs import base


def get_config(data_dir: str = "data/web") -> ConfigDict:
    config = base.get_config()
    config.name = "llama_8b"
    config.model = base.llama(
        vocab_size=128_256, seq_len=8192, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, d_ff=14_336,
        remat="full",
    )  # fmt: skip
    config.data = base.data(data_dir, batch_size=512)
    config.optim = base.adamw(learning_rate=3e-4, warmup_steps=8000)
    config.train.num_steps = 170_000
    config.train.checkpoint_every = 1000
    config.train.eval_every = 2000
    config.mesh = base.mesh(fsdp=-1)
    return config.lock()
