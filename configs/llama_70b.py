"""Llama 3 70B, 70,553,706,496 parameters.

Command   python -m experiments.pretrain --config=configs/llama_70b.py --workdir=gs://<bucket>/llama_70b
Hardware  TPU v5p-2048 (1,024 chips) or 1,024 x H100: 4-way tensor parallelism inside 256-way full sharding.
Time      1.7e5 steps of 8 M tokens (1.4 T) are 6.4e23 FLOPs: 35 days on 1,024 v5p chips at 45 % MFU.
Metric    no published loss at this length; the released model saw 15 T tokens.
Source    "The Llama 3 Herd of Models", arXiv:2407.21783, table 3 and section 3.4 (peak rate 1.5e-4).
"""

from ml_collections import ConfigDict

from configs import base, llama_8b


def get_config(data_dir: str = "data/web") -> ConfigDict:
    config = llama_8b.get_config(data_dir)
    config.name = "llama_70b"
    config.model = base.llama(
        vocab_size=128_256, seq_len=8192, d_model=8192, num_layers=80, num_heads=64, num_kv_heads=8, d_ff=28_672,
        remat="full",
    )  # fmt: skip
    config.data.batch_size = 1024
    config.optim.learning_rate = 1.5e-4
    config.mesh = base.mesh(fsdp=-1, tensor=4)
    config.mesh.rules = "sequence"
    return config.lock()
