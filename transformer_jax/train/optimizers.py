"""Learning-rate schedules, and AdamW with weight decay on matrices only."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from transformer_jax.errors import did_you_mean
from transformer_jax.train import transforms
from transformer_jax.tree import PyTree, map_paths

Schedule = Callable[[jax.Array | int], jax.Array]

# Schedule name -> function (peak_lr, number of steps after the warm-up, end_lr, number of warm-up
# steps) that returns a schedule of the steps after the warm-up, counted from 0.
DECAYS: dict[str, Callable[[float, int, float, int], Schedule]] = {
    "constant": lambda peak, steps, end, warmup: optax.constant_schedule(peak),
    "linear": lambda peak, steps, end, warmup: optax.linear_schedule(peak, end, steps),
    "cosine": lambda peak, steps, end, warmup: optax.cosine_decay_schedule(
        peak, steps, alpha=end / peak if peak else 0.0),
    "inverse_sqrt": lambda peak, steps, end, warmup: lambda step: (
        end + (peak - end) * jnp.sqrt(max(warmup, 1) / (step + warmup + 1))),
}


def make_schedule(
    name: str, peak_lr: float, num_steps: int, warmup_steps: int = 0, end_lr: float = 0.0
) -> Schedule:
    """Makes a learning-rate schedule: a linear warm-up to `peak_lr`, then a decay to `end_lr`.

    As in Optax, `step` counts from 0. The n-th update, n = step + 1, has the learning rate

        warm-up (n <= warmup_steps)   peak_lr n / warmup_steps
        constant                      peak_lr
        linear                        end_lr + (peak_lr - end_lr) (1 - p)
        cosine                        end_lr + (peak_lr - end_lr) (1 + cos(pi p)) / 2
        inverse_sqrt                  end_lr + (peak_lr - end_lr) sqrt(max(warmup_steps, 1) / n)

    where p = (step - warmup_steps) / (num_steps - warmup_steps), at most 1. The first update
    therefore has a learning rate above 0, and without warm-up it has exactly `peak_lr`.

    "inverse_sqrt" with `end_lr` 0 is the schedule of Vaswani et al. 2017, section 5.3, where
    peak_lr = (d_model warmup_steps)^-0.5.

    Args:
        num_steps: the total number of updates, warm-up included.
        end_lr: the learning rate from step `num_steps` on; for "inverse_sqrt", its limit after
            infinitely many steps. Not used by "constant".

    Raises:
        ValueError: `name` is unknown, `num_steps` is below 1, `warmup_steps` is not in
            [0, num_steps - 1], or `end_lr` is not in [0, peak_lr].

    Example:
        >>> schedule = make_schedule("linear", peak_lr=1.0, num_steps=10, warmup_steps=2)
        >>> [float(schedule(step)) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if name not in DECAYS:
        raise ValueError(f"unknown schedule {name!r}; {did_you_mean(name, DECAYS)}")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps}; it must be from 0 to {num_steps - 1}, less than the "
            f"{num_steps} steps of the run")
    if not 0 <= end_lr <= peak_lr:
        raise ValueError(f"end_lr is {end_lr}; it must be from 0 to peak_lr = {peak_lr}")
    decay = DECAYS[name](peak_lr, num_steps - warmup_steps, end_lr, warmup_steps)
    if warmup_steps:
        # `optax.linear_schedule` rounds the first values to multiples of peak_lr * 2^-24.
        decay = optax.join_schedules(
            [lambda step: peak_lr * (step + 1) / warmup_steps, decay], [warmup_steps])
    return lambda step: jnp.asarray(decay(step), jnp.float32)


def decay_mask(params: PyTree) -> PyTree:
    """Returns the mask of the parameters with weight decay: kernels and embeddings.

    Biases and normalization scales have none, because shrinking an offset or a scale does not make
    a model simpler. Parameters are selected by name, because kernels have head axes, and stacked
    layers have one more axis. Of the PEFT parameters, only the kernels of bottleneck adapters have
    weight decay, as in Houlsby et al. 2019: the vectors of IA3 and the magnitudes of DoRA are
    scales, and the matrices of LoRA, prefixes and prompts are limited by their rank or length. (In
    the released code of LoRA, its matrices have weight decay.)
    """
    return map_paths(lambda path, leaf: path.rpartition("/")[2] in ("kernel", "embedding"), params)


@dataclass(frozen=True)
class FinetuningOptions:
    """Options of an optimizer for fine-tuning, off if None; `train.transforms` has the formulas.

    Attributes:
        layer_decay: ratio of the learning rates of a layer and the layer above it, in (0, 1].
        head_lr_multiplier: factor of the learning rate of parameters that match `head_pattern`.
        head_pattern: a regular expression for paths; by default the classifier.
        unfreeze_every: gradual unfreezing: number of updates after which one more layer is
            unfrozen, from the top layer down. The schedule and the average of `ema` also advance in
            updates in which a layer is still frozen.
        l2_sp: strength of the decay of parameters, including biases, toward their values at `init`.
            Parameters whose path matches `new_pattern` have weight decay instead.
        new_pattern: a regular expression for paths; by default classifier and PEFT parameters.
        ema: decay of an exponential moving average of the trainable parameters, in (0, 1); see
            `transforms.get_ema_params`.

    Raises:
        ValueError: a value is out of range.
    """

    layer_decay: float | None = None
    head_lr_multiplier: float = 1.0
    head_pattern: str = transforms.HEAD_PARAMS
    unfreeze_every: int | None = None
    l2_sp: float | None = None
    new_pattern: str = transforms.NEW_PARAMS
    ema: float | None = None

    def __post_init__(self):
        for name, is_valid, allowed in (
            ("layer_decay", lambda x: 0 < x <= 1, "above 0 and at most 1"),
            ("head_lr_multiplier", lambda x: 0 < x < math.inf, "above 0"),
            ("unfreeze_every", lambda x: x >= 1, "at least 1 step"),
            ("l2_sp", lambda x: 0 < x < math.inf, "above 0"),
            ("ema", lambda x: 0 < x < 1, "above 0 and below 1"),
        ):
            value = getattr(self, name)
            if value is not None and not is_valid(value):
                raise ValueError(f"{name} is {value}; it must be {allowed}")


def make_optimizer(
    schedule: Schedule | float, *, weight_decay: float = 0.01, b1: float = 0.9, b2: float = 0.999,
    eps: float = 1e-6, clip_norm: float | None = 1.0, finetuning: FinetuningOptions | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping by the global norm.

    The default values are those of BERT. `make_train_step` applies the optimizer to the trainable
    parameters only. The global norm therefore excludes frozen parameters, which have no moments.

    Args:
        schedule: a schedule, for instance from `make_schedule`, or a constant learning rate.
        weight_decay: decoupled weight decay, multiplied by the learning rate, on the parameters
            that `decay_mask` selects.
        b1, b2: decay rates of the first and second moment.
        clip_norm: larger global norms of the gradients are scaled down to it; None does not clip.
        finetuning: options for fine-tuning.

    Example:
        >>> optimizer = make_optimizer(make_schedule("cosine", 1e-3, num_steps=100))
        >>> opt_state = optimizer.init({"kernel": jnp.ones((2, 3))})
        >>> optax.tree.get(opt_state, "mu")["kernel"].shape
        (2, 3)
    """
    options = finetuning or FinetuningOptions()
    moments = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    decay = (optax.add_decayed_weights(weight_decay, decay_mask) if options.l2_sp is None
             else transforms.l2_sp(options.l2_sp, weight_decay, decay_mask, options.new_pattern))
    # The structure of the chain determines the paths of the optimizer state in checkpoints.
    if options.unfreeze_every is not None:
        chain = [transforms.gradual_unfreezing(
                     optax.chain(moments, decay), options.unfreeze_every, clip_norm),
                 optax.scale_by_learning_rate(schedule)]
    elif options.l2_sp is not None:
        chain = [moments, decay, optax.scale_by_learning_rate(schedule)]
    else:
        chain = [optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay,
                             mask=decay_mask)]
    if clip_norm is not None and options.unfreeze_every is None:
        chain = [transforms.clip_by_global_norm(clip_norm), *chain]
    if options.layer_decay is not None or options.head_lr_multiplier != 1.0:
        chain.append(optax.stateless(lambda updates, params: jax.tree.map(
            jnp.multiply, updates, transforms.layerwise_lr_multipliers(
                updates, options.layer_decay, options.head_lr_multiplier, options.head_pattern))))
    if options.ema is not None:
        chain.append(transforms.params_ema(options.ema))
    return chain[0] if len(chain) == 1 else optax.chain(*chain)
