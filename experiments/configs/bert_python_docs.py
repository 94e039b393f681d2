"""BERT of 2 layers on the embedded corpus: the quickstart's model.

    python experiments/pretrain.py bert_python_docs

Two liberties against the paper, both for a run of a minute: LayerNorm stands before the sublayers,
which bears the high learning rate that so few steps need, and 40 % of the tokens are masked instead
of 15 % (Wettig et al. 2022), which gives each step more to learn from.
"""

from pathlib import Path

from configs.gpt_python_docs import SMALL
from settings import Optimizer, Pretrain
from transformer_jax import presets


def config() -> Pretrain:
    return Pretrain(
        out=Path("runs/bert_python_docs"),
        model=presets.bert_tiny(**SMALL, norm_first=True, norm_epsilon=1e-6),
        objective="mlm_nsp", tokenizer="wordpiece", length=48, batch_size=48, num_steps=700,
        mask_rate=0.4,
        optimizer=Optimizer(peak=3e-3, warmup_steps=50, b2=0.99),
        eval_every=100, save_every=700, log_every=25,
    )
