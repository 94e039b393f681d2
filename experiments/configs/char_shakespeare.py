"""Character GPT on tiny Shakespeare, nanoGPT's CPU setting: 4 layers, d_model 128, context 64.

    python experiments/pretrain.py char_shakespeare --data input.txt

`input.txt` is the file of karpathy/char-rnn; its last tenth is held out, and the model is evaluated
on all of it. 2 AMD EPYC cores: 165 s, about 10,000 tokens/s, held-out loss 1.821 after 2,000 steps
(nanoGPT reports 1.88). The learning rate is twice nanoGPT's 1e-3, which gives a loss of 1.889.
"""

from pathlib import Path

from transformer_jax.models import presets
from transformer_jax.recipes.config import OptimizerConfig
from transformer_jax.recipes.pretraining import PretrainConfig

CONFIG = PretrainConfig(
    out=Path("runs/char_shakespeare"),
    data="input.txt", document_separator="file", validation_fraction=0.1,
    model=presets.gpt2(num_layers=4, d_model=128, num_heads=4, mlp_dim=512, max_length=64,
                       dropout_rate=0.0, attention_dropout_rate=0.0),
    objective="causal_lm", tokenizer="chars", max_length=64, batch_size=12, num_steps=2000,
    optimizer=OptimizerConfig(peak_lr=2e-3, end_lr=1e-4, warmup_steps=100, weight_decay=0.1,
                              b2=0.99, eps=1e-8),
    eval_every=500, save_every=1000, log_every=100)
