"""What is learnt: for each objective a `prepare` for the host and a `loss` for the device.

`prepare(example, rng, ...)` is NumPy: one example in, one row of a batch out, the same for the same
seed. `loss(apply, params, batch, rng)` is pure: `apply` is a model's `apply`, `rng` None means no
dropout. It returns `(sum, weight, metrics)`: sums and weights add over microbatches, devices and
hosts and are divided once, so every split of a batch gives the same loss. Objectives of several
terms return dicts with one sum and weight a term; the loss is then the sum of the terms' means.
`metrics` maps a name to its own (sum, weight).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "causal_lm", "chunked_cross_entropy", "classification", "contrastive", "cross_entropy",
        "denoising", "fused_cross_entropy", "input_format", "mlm_nsp", "question_answering",
        "seq2seq", "token_classification",
    ],
    submod_attrs={
    },
)
