"""What is learnt: for each objective a `prepare` for the host and a `loss` for the device.

`prepare(example, rng, ...)` is NumPy: one example in, one row of a batch out, the same for the same
seed. `loss(apply, params, batch, rng)` is pure: `apply` is a model's `apply`, `rng` None means no
dropout. It returns `(sum, weight, metrics)`: sums and weights add over microbatches, devices and
hosts and are divided once, so every split of a batch gives the same loss. Objectives of several
terms return dicts with one sum and weight a term; the loss is then the sum of the terms' means.
`metrics` maps a name to its own (sum, weight).
"""

from transformer_jax.objectives import (
    causal_lm,
    contrastive,
    denoising,
    layout,
    losses,
    mlm_nsp,
    seq2seq,
    spans,
    tags,
    tasks,
)

__all__ = [
    "causal_lm", "contrastive", "denoising", "layout", "losses", "mlm_nsp", "seq2seq", "spans",
    "tags", "tasks",
]
