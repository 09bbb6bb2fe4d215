"""GPT-2 small, 124,439,808 parameters, on web text.

Command   python -m experiments.prepare_data --source=<jsonl.zst> --vocab_size=50257 --out=data/openwebtext
          python -m experiments.pretrain --config=configs/gpt2_124m.py --workdir=gs://<bucket>/gpt2_124m
Hardware  one host of 8 x A100 or TPU v5p-16; any number of devices that divides 480 rows.
Time      300 G tokens are 2.4e20 FLOPs: 4 days on 8 x A100 (nanoGPT), 2 days on v5p-16 at 35 % MFU.
Metric    held-out loss 2.85 (nanoGPT's README; the released GPT-2 has 3.11 without training on this set).
Source    Radford et al. 2019; hyperparameters of nanoGPT config/train_gpt2.py: 0.5 M tokens a step, 600,000 steps.
          Unlike there, the embedding does not decay.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(data_dir: str = "data/openwebtext") -> ConfigDict:
    config = base.get_config()
    config.name = "gpt2_124m"
    config.model = base.gpt2(vocab_size=50_257, seq_len=1024, d_model=768, num_layers=12, num_heads=12)
    config.data = base.data(data_dir, batch_size=480)
    config.optim = base.adamw(learning_rate=6e-4, warmup_steps=2000)
    config.train.num_steps = 600_000
    config.train.checkpoint_every = 2000
    config.train.eval_every = 2000
    return config.lock()
