r"""BART of 3 + 3 layers, d_model 128: denoising of plain text, then dialogue summarization.

    python experiments/denoise.py bart_dialogsum --pretrain.data wikitext-2 \
        --finetune.data dialogsum

The folders contain train.txt of WikiText-2, and train.jsonl and dev.jsonl of DialogSum (or .gz).
Pre-training lowers the denoising loss on held-out rows from 8.44 to 2.69 nats per token. After 600
steps on dialogues, ROUGE-L on the 500 held-out summaries is 25.4, compared with 19.6 for the same
model from scratch (ROUGE-1 31.6 and 22.7; loss 2.94 and 3.66 nats per token). 38 minutes on 2 busy
AMD EPYC cores.
"""

from pathlib import Path

from transformer_jax.models import presets
from transformer_jax.recipes.config import OptimizerConfig
from transformer_jax.recipes.pretraining import PretrainConfig
from transformer_jax.recipes.sequence_to_sequence import DenoiseConfig, PairsConfig

CONFIG = DenoiseConfig(
    out=Path("runs/bart_dialogsum"),
    pretrain=PretrainConfig(
        out=Path("runs/bart_dialogsum/pretraining"), data="wikitext-2", sentence_end=" . ",
        model=presets.bart_base(
            num_layers=3, d_model=128, num_heads=4, mlp_dim=512, vocab_size=4000,
            max_length=256, dropout_rate=0.1, attention_dropout_rate=0.0,
            positions="sinusoidal", init_std=0.05),
        objective="denoising", tokenizer="bpe", max_length=64, batch_size=32, num_steps=1000,
        optimizer=OptimizerConfig(schedule="linear", peak_lr=2e-3, warmup_steps=100, b2=0.98),
        eval_every=200, eval_batches=20, save_every=200, log_every=50),
    finetune=PairsConfig(
        data="dialogsum", source="dialogue", target="summary", validation_split="dev",
        num_steps=600, batch_size=16,
        optimizer=OptimizerConfig(schedule="linear", peak_lr=1e-3, warmup_steps=60, b2=0.98)))
