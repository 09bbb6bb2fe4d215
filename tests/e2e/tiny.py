"""The demo's config at a size that trains in seconds."""

from configs import demo


def get_config(data_dir):
    config = demo.get_config(data_dir)
    config.model.update(vocab_size=400, seq_len=128, d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16)
    config.model.d_ff = 64
    config.data.batch_size = 8
    config.train.update(num_steps=40, checkpoint_every=4, eval_every=20, eval_batches=2, log_every=1)
    return config
