"""A character-level model of Shakespeare, nanoGPT's example for a laptop.

Command   python -m experiments.prepare_data --source=text:<tinyshakespeare.txt> --tokenizer=characters
              --eval_fraction=0.1 --out=data/shakespeare_char
          python -m experiments.pretrain --config=configs/shakespeare_char.py --workdir=runs/shakespeare_char
Hardware  2 CPU cores.
Time      70 seconds.
Metric    held-out loss 1.75 after 2,000 steps, `eval/loss` of summary.json, whose windows overlap by half;
          1.77 in windows that do not, as nanoGPT's 1.88.
Source    nanoGPT README, "I only have a macbook": 4 layers, 4 heads, width 128, context 64, batch 12, 1.88.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(data_dir: str = "data/shakespeare_char") -> ConfigDict:
    config = base.get_config()
    config.name = "shakespeare_char"
    config.model = base.gpt2(vocab_size=65, seq_len=64, d_model=128, num_layers=4, num_heads=4, bias=False)
    config.data = base.data(data_dir, batch_size=12)
    config.optim = base.adamw(learning_rate=1e-3, warmup_steps=100, b2=0.99)
    config.train.num_steps = 2000
    config.train.eval_every = 500
    config.train.eval_batches = 0  # all of the held-out tenth
    config.train.checkpoint_every = 1000
    return config.lock()
