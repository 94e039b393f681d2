"""Learning-rate schedules and AdamW with weight decay only where it belongs."""

import difflib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from transformer_jax.train import transforms
from transformer_jax.train.transforms import clip_by_global_norm
from transformer_jax.tree import PyTree, first_match, map_paths

Schedule = Callable[[jax.Array | int], jax.Array]

# What a schedule does after warm-up, as a function of (step, warm-up steps, last step):
# `decay` is 1 at the end of warm-up, and the schedule runs from peak_lr (decay 1) to end (decay 0).
DECAYS: dict[str, Callable[[jax.Array, int, int], jax.Array]] = {
    "constant": lambda step, warmup, last: jnp.ones_like(step),
    "linear": lambda step, warmup, last: 1 - _progress(step, warmup, last),
    "cosine": lambda step, warmup, last: (1 + jnp.cos(jnp.pi * _progress(step, warmup, last))) / 2,
    "inverse_sqrt": lambda step, warmup, last: jnp.sqrt(max(warmup, 1) / (step + 1)),
}


def _progress(step: jax.Array, warmup: int, last: int) -> jax.Array:
    """0 at the end of warm-up, 1 from `last` on."""
    return jnp.clip((step - warmup) / (last - warmup), 0.0, 1.0)


def make_schedule(
    name: str, peak_lr: float, num_steps: int, warmup_steps: int = 0, end_lr: float = 0.0
) -> Schedule:
    """A learning rate by step: a linear warm-up to `peak_lr`, then a decay from the table `DECAYS`.

    Step counts from 0, as Optax counts; the n-th update, n = step + 1, has the rate

      warm-up (n <= warmup_steps)   peak_lr n / warmup_steps
      constant                      peak_lr
      linear, cosine                from peak_lr at step warmup_steps to `end` at step num_steps
      inverse_sqrt                  end_lr + (peak_lr - end) sqrt(warmup_steps / n)

    so the first update already moves, and without warm-up step 0 has exactly the peak_lr.
    inverse_sqrt with end 0 is the schedule of Vaswani et al. 2017, section 5.3, where
    peak_lr = (d_model warmup_steps)^-0.5. constant has no use for `end`.

    Raises:
      ValueError: an unknown name, num_steps below 1, warmup_steps outside 0 ... num_steps - 1, or
        not 0 <= end <= peak_lr.
    """
    if name not in DECAYS:
        near = difflib.get_close_matches(name, DECAYS, n=1)
        raise ValueError(
            f"unknown schedule {name!r}{f', did you mean {near[0]!r}?' if near else ';'} "
            f"choose from {', '.join(DECAYS)}"
        )
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; train for at least 1 step")
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps}, outside 0 to {num_steps - 1}; "
            f"warm up for less than the {num_steps} steps of the run"
        )
    if not 0 <= end <= peak_lr:
        raise ValueError(f"end_lr is {end_lr}, outside 0 to the peak_lr {peak_lr}; choose it in between")
    decay = DECAYS[name]

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        after = end_lr + (peak_lr - end) * decay(step, warmup_steps, num_steps)
        warming = peak_lr * (step + 1) / max(warmup_steps, 1)
        return jnp.where(step < warmup_steps, warming, after)

    return schedule


DECAY_RULES = ((r"(^|/)(kernel|embedding)$", True), (r"", False))
"""Which parameters weight decay pulls to zero: matrices. Biases and norm scales it never touches
(they set offsets and units, and shrinking them is no simplicity). Decided by name and not by rank:
a kernel keeps its head axes, and stacked layers give every leaf one more.

Of deltas, the kernels of adapters decay, as Houlsby et al. 2019 train them, by BERT's optimizer.
IA3's factors and DoRA's magnitudes are scales. LoRA's factors, prefixes and prompts do not decay
either, though LoRA's released code decays its factors: rank and length bound them already."""


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies, by `DECAY_RULES`. Gaps (None) stay gaps."""
    return map_paths(lambda path, leaf: first_match(DECAY_RULES, path), params)


def make_optimizer(
    schedule: Schedule | float,
    *,
    weight_decay: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    clip_norm: float | None = 1.0,
    layer_decay: float | None = None,
    head_lr_multiplier: float = 1.0,
    head: str = transforms.HEAD,
    unfreeze_every: int | None = None,
    l2_sp: float | None = None,
    new: str = transforms.NEW,
    ema: float | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) behind clipping by the global norm; BERT's defaults.

    Everything here sees only the tree that it is given. `make_train_step` gives it what trains, so
    the norm that is clipped is the norm of what trains, and only that has moments. What fine-tuning
    adds is in `train.transforms`.

    Args:
      schedule: from `make_schedule`, or a constant rate.
      weight_decay: decoupled, multiplied by the learning rate, where `decay_mask` is true.
      clip_norm: gradients with a larger global norm are scaled down to it; None never clips.
      layer_decay: each layer's rate is this times the rate of the layer above it.
      head_lr_multiplier: factor of the rate of what has the regular expression `head` in its path, the
        classifier by default.
      unfreeze_every: release a layer every so many updates, from the top down. The schedule and
        `ema` run on meanwhile.
      l2_sp: strength of a decay toward the parameters at `init`, of biases too; what has the
        regular expression `new` in its path, classifier and deltas by default, keeps
        `weight_decay`.
      ema: decay of an average of what trains, below 1, for `finetuning.ema_params`.

    Raises:
      ValueError: a value out of range.
    """
    for name, value, fits, limit in (
        ("layer_decay", layer_decay, lambda x: 0 < x <= 1, "above 0 and at most 1"),
        ("head_lr_multiplier", head_lr_multiplier, lambda x: 0 < x < math.inf, "above 0"),
        ("l2_sp", l2_sp, lambda x: 0 < x < math.inf, "above 0"),
        ("ema", ema, lambda x: 0 < x < 1, "above 0 and below 1"),
    ):
        if value is not None and not fits(value):
            raise ValueError(f"{name} is {value}; it must be {limit}")
    if unfreeze_every is not None and unfreeze_every < 1:
        raise ValueError(f"unfreeze_every is {unfreeze_every}; release a layer every step at most")
    moments = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    decay = (optax.add_decayed_weights(weight_decay, decay_mask) if l2_sp is None
             else transforms.l2_sp(l2_sp, weight_decay, decay_mask, new))
    if unfreeze_every is not None:
        chain = [transforms.gradual_unfreezing(optax.chain(moments, decay), unfreeze_every, clip_norm),
                 optax.scale_by_learning_rate(schedule)]
    elif l2_sp is not None:
        chain = [moments, decay, optax.scale_by_learning_rate(schedule)]
    else:
        chain = [optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay,
                             mask=decay_mask)]
    if clip_norm is not None and unfreeze_every is None:
        chain = [clip_by_global_norm(clip_norm), *chain]
    if layer_decay is not None or head_lr_multiplier != 1.0:
        chain.append(transforms.scale_by_path(
            lambda tree: transforms.layerwise_lr_multipliers(tree, layer_decay, head_lr_multiplier, head)))
    if ema is not None:
        chain.append(transforms.params_ema(ema))
    return chain[0] if len(chain) == 1 else optax.chain(*chain)
