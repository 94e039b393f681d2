"""BART of 3 + 3 layers on WikiText-2 by denoising.

    python experiments/pretrain.py bart_wikitext --data wikitext-2
"""

from pathlib import Path

from settings import Optimizer, Pretrain

from transformer_jax import presets


def config() -> Pretrain:
    return Pretrain(
        out=Path("runs/bart_wikitext"), data="wikitext-2", sentence_end=" . ",
        model=presets.bart_base(
            num_layers=3, d_model=192, num_heads=4, mlp_dim=512, vocab_size=6000, max_length=256,
            dropout_rate=0.1, attention_dropout_rate=0.0),
        objective="denoising", tokenizer="bpe", length=96, batch_size=32, num_steps=1500,
        optimizer=Optimizer(schedule="cosine", peak=1e-3, warmup_steps=150, b2=0.98),
        eval_every=250, eval_batches=20, save_every=250, log_every=50,
    )
