"""Mixtral 8x7B, 46,702,792,704 parameters, of which a token uses 12,879,925,248.

Command   python -m experiments.pretrain --config=configs/moe_8x7b.py --workdir=gs://<bucket>/moe_8x7b
Hardware  TPU v5p-512 (256 chips) or 256 x H100: experts over 8 devices inside 32-way full sharding.
Time      1.2e5 steps of 8 M tokens (1 T) are 8.4e22 FLOPs: 21 days on 256 v5p chips at 40 % MFU.
Metric    no published loss; the released model's data is not known.
Source    sizes: "Mixtral of Experts", arXiv:2401.04088, table 1; balance loss 0.01 as Switch, arXiv:2101.03961;
          router z-loss 0.001 as ST-MoE, arXiv:2202.08906; the learning rate is ours.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(data_dir: str = "data/web") -> ConfigDict:
    config = base.get_config()
    config.name = "moe_8x7b"
    config.model = base.llama(
        vocab_size=32_000, seq_len=8192, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=8, d_ff=14_336,
        rope_theta=1e6, remat="full", moe=base.moe(num_experts=8, num_experts_per_token=2, d_ff=14_336),
    )  # fmt: skip
    config.data = base.data(data_dir, batch_size=1024)
    config.optim = base.adamw(learning_rate=3e-4, warmup_steps=2000)
    config.train.num_steps = 120_000
    config.train.checkpoint_every = 1000
    config.train.eval_every = 2000
    config.mesh = base.mesh(fsdp=-1, expert=8)
    return config.lock()
