"""A Llama 3.2 1B, 1,235,814,400 parameters, trained from scratch to 30 tokens a parameter.

Command   python -m experiments.pretrain --config=configs/llama_1b.py --workdir=gs://<bucket>/llama_1b
Hardware  TPU v5e-64 or v5p-32, 16 x H100; with --config.mesh.fsdp=8 one host of 8 does as well, slower.
Time      37 G tokens are 3.3e20 FLOPs with attention: 17 hours on v5e-64 at 43 % MFU.
Metric    no published figure at this length; Llama 3.2's own 1B saw up to 9 T tokens and was distilled.
Source    sizes: Llama 3.2 model card; optimizer: "The Llama 3 Herd of Models", arXiv:2407.21783, section 3.4.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(data_dir: str = "data/web") -> ConfigDict:
    config = base.get_config()
    config.name = "llama_1b"
    config.model = base.llama(
        vocab_size=128_256, seq_len=8192, d_model=2048, num_layers=16, num_heads=32, num_kv_heads=8, d_ff=8192,
        tie_embeddings=True, remat="dots",
    )  # fmt: skip
    config.data = base.data(data_dir, batch_size=128)
    config.optim = base.adamw(learning_rate=1e-3, warmup_steps=1000)
    config.train.num_steps = 35_000
    config.train.checkpoint_every = 1000
    config.train.eval_every = 1000
    config.mesh = base.mesh(fsdp=-1)
    return config.lock()
