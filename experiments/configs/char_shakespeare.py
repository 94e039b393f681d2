"""Character GPT on tiny Shakespeare, nanoGPT's CPU setting: 4 layers, 128 wide, context 64.

    python experiments/pretrain.py char_shakespeare --data input.txt

`input.txt` is karpathy/char-rnn's file; the last tenth is held out and evaluated whole.
2 AMD EPYC cores: 165 s, about 10,000 tokens/s, held-out loss 1.821 after 2,000 steps (nanoGPT
states 1.88). The learning rate is twice nanoGPT's 1e-3, under which this reaches 1.889.
"""

from pathlib import Path

from settings import Optimizer, Pretrain

from transformer_jax.models import presets


def config() -> Pretrain:
    return Pretrain(
        out=Path("runs/char_shakespeare"),
        data="input.txt", unit="file", validation_share=0.1,
        model=presets.gpt2(num_layers=4, d_model=128, num_heads=4, mlp_dim=512, max_length=64,
                           dropout_rate=0.0, attention_dropout_rate=0.0),
        objective="causal_lm", tokenizer="chars", length=64, batch_size=12, num_steps=2000,
        optimizer=Optimizer(peak_lr=2e-3, end=1e-4, warmup_steps=100, weight_decay=0.1, b2=0.99,
                            eps=1e-8),
        eval_every=500, save_every=1000, log_every=100,
    )
