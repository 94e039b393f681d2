"""Pre-training and fine-tuning objectives.

An objective is a module with two pure functions, connected only by the arrays of a batch: `prepare`
(host, NumPy) converts one example to one row, and `loss` (device, JAX) computes the loss of stacked
rows.

| module               | objective                                            | models            |
|----------------------|------------------------------------------------------|-------------------|
| `causal_lm`          | predict the next token                               | GPT               |
| `mlm_nsp`            | predict masked tokens and the next sentence          | BERT              |
| `seq2seq`            | predict a target text from a source text; denoising  | Transformer, BART |
| `contrastive`        | sentence embeddings, with in-batch negatives         | BERT              |
| `classification`     | classify texts or words, regression, multiple choice | all               |
| `question_answering` | find the answer to a question in a context           | all               |

`classification` has one `prepare_<task>` and `<task>_loss` per task; its `TASK_TYPES` lists the
functions of all fine-tuning tasks, with a `predict` for each. `input_format` (special tokens,
truncation, padding) and `cross_entropy` (losses as sums and weights) are shared. The batch keys
with dtype, shape and meaning are in `transformer_jax/README.md` of the repository.

## `prepare(example, rng, **options) -> row`

Converts one example, usually token ids, to a dict of NumPy arrays of fixed shape. All randomness
(masking, corruption, random sentence pairs) comes from `rng`, a `np.random.Generator`; objectives
without any ignore it. Invalid examples (a label outside the classes, a text that does not fit)
raise `ValueError` here, before anything is compiled.

## `loss(apply, params, batch, rng) -> (sum, weight, metrics)`

Args:
    apply: `apply` method of a Flax model, called as `apply({"params": params}, tokens, ...)`.
    batch: stacked rows of `prepare`. A row of zeros has weight 0 and does not change the loss; the
        last batch of an evaluation is padded with such rows.
    rng: key of the dropout masks; None disables dropout.

Returns:
    sum: weighted sum of the losses of all tokens or examples, in nats (squared errors for
        regression). An objective of several terms returns a dict with one sum per term.
    weight: sum of the weights, with the structure of `sum`. Weights never depend on `params`.
    metrics: dict from a metric's name to its own `(sum, weight)`.

The scalar loss of a batch is

    L = sum over terms k of  sum_k / weight_k,    where a term of weight 0 contributes 0

`train.step` adds sums and weights over microbatches, devices and processes, and divides once at the
end. Therefore every split of a batch gives exactly the loss of the unsplit batch, even if the parts
have different weights; the average of their mean losses would not. (The exception is `contrastive`:
the loss of a row depends on the other rows.) The loss function of a training step has `apply` and
options bound: `make_train_step(functools.partial(seq2seq.loss, model.apply), optimizer)`.

Example:
    >>> import jax.numpy as jnp
    >>> from types import SimpleNamespace
    >>> from transformer_jax.objectives import causal_lm, cross_entropy
    >>> row = causal_lm.prepare({"tokens": [5, 3, 7, 4]}, length=6)
    >>> batch = {name: values[None] for name, values in row.items()}  # a batch of one row
    >>> def apply(variables, tokens, **options):  # in place of model.apply: uniform over 8 tokens
    ...     return SimpleNamespace(logits=jnp.zeros((*tokens.shape, 8)))
    >>> loss_sum, weight, metrics = causal_lm.loss(apply, {}, batch)
    >>> float(weight)  # the number of targets
    3.0
    >>> print(cross_entropy.mean_loss(loss_sum, weight).round(3))  # log 8, in nats
    2.079
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["causal_lm", "classification", "contrastive", "cross_entropy", "input_format",
                "mlm_nsp", "question_answering", "seq2seq"],
)
