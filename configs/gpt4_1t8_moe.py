"""The scale this project is named for: 1.78 T parameters, of which a token uses 259 G.

Command   python -m experiments.pretrain --config=configs/gpt4_1t8_moe.py --workdir=gs://<bucket>/gpt4_1t8_moe
Hardware  TPU v5p-8192 (4,096 chips): experts over 16 devices, 4-way tensor parallelism, 64-way full sharding.
Time      13 T tokens are 2.2e25 FLOPs: 13 months on 4,096 v5p chips at 35 % MFU; 400,000 steps of 32 M tokens.
Metric    none is known.
Source    no publication states GPT-4's sizes. Press and analysts report about 1.8 T parameters, 120 layers, 16 experts,
          two of them per token, 13 T tokens; width, heads and d_ff here are ours, chosen to meet that total.
          Optimizer moments are factored (Adafactor, arXiv:1804.04235): two float32 ones would take 14 TB.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(data_dir: str = "data/web") -> ConfigDict:
    config = base.get_config()
    config.name = "gpt4_1t8_moe"
    config.model = base.llama(
        vocab_size=100_352, seq_len=8192, d_model=12_288, num_layers=120, num_heads=96, num_kv_heads=8, d_ff=24_576,
        remat="full", moe=base.moe(num_experts=16, num_experts_per_token=2, d_ff=24_576),
    )  # fmt: skip
    config.data = base.data(data_dir, batch_size=4096)
    config.optim = base.adamw(learning_rate=6e-5, warmup_steps=4000, name="adafactor", b1=0.0, b2=0.99)
    config.train.num_steps = 400_000
    config.train.checkpoint_every = 500
    config.train.eval_every = 2000
    config.mesh = base.mesh(fsdp=-1, expert=16, tensor=4)
    return config.lock()
