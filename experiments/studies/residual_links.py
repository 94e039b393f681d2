"""Residual connections: with them, 32 layers train as well as one; without them, 4 do not train.

    python experiments/study.py residual_links

Claims (He et al. 2016, "Deep Residual Learning"; Li et al. 2018, "Visualizing the Loss Landscape of
Neural Nets"; Veit et al. 2016, "Residual Networks Behave Like Ensembles of Relatively Shallow
Networks"): residual connections let the gradient reach the first layers, make the loss around a
solution smooth, and make a deep model an ensemble of shallow ones, so that a single layer can be
removed at little cost.

The models are character-level GPTs with pre-LN sublayers, x + f(norm(x)), or f(norm(x)) without
residual connections. The loss landscape is on a plane of two filter-normalized random directions:
each filter (the weights of one output) has the same norm as that of the model.

Hardware and time: one core of an AMD EPYC, 11 minutes.

Result: the claims hold, except for the gradient. After 400 steps, the training loss is 2.45 to 2.47
nats per character for 1 to 32 layers with residual connections. Without them, it is 2.48 with 1
layer, 2.62 with 2, and 3.10 with 4 or more: these models predict the character frequencies and
ignore the context. Removing one of 16 layers raises the loss by less than 0.06 nats, except for the
first (0.82); without residual connections, by 0 or by 5.5. A vanishing gradient is not the reason
why models without residual connections do not train: with normalization before each sublayer, the
gradient reaches their first layer, too. Plotted on the same scale, the loss around the trained
parameters is bowl-shaped with residual connections; without them, it is flat with steep steps.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from studies import training
from studies.figures import Line, Lines, save_panels, save_surfaces
from transformer_jax import tree
from transformer_jax.models import GPT, init_params, presets
from transformer_jax.objectives import causal_lm
from transformer_jax.recipes.config import OptimizerConfig

VARIANTS = {"with residual connections": True, "without": False}


@dataclass(frozen=True, kw_only=True)
class ResidualLinks:
    """Settings of the study.

    Attributes:
        out: folder for the figures and the results.
        depths: numbers of layers.
        d_model: width of the models.
        length: characters per row.
        batch_size: rows per step.
        num_steps: training steps.
        peak_lr: peak learning rate.
        landscape_depth: one of `depths`, for which the loss landscape is plotted and layers are
            removed.
        grid: number of points of the landscape along each direction.
        span: half width of the landscape, relative to the filter norms.
        test_rows: number of held-out rows on which losses are computed.
        seed: seed of the initialization, the data order and the directions.
    """

    out: Path = Path("runs/residual_links")
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    d_model: int = 64
    length: int = 64
    batch_size: int = 16
    num_steps: int = 400
    peak_lr: float = 2e-3
    landscape_depth: int = 16
    grid: int = 17
    span: float = 1.0
    test_rows: int = 16
    seed: int = 0


SIZES = {
    "default": ResidualLinks(),
    "large": ResidualLinks(
        depths=(4, 8, 16, 32, 64), d_model=512, length=256, batch_size=64, num_steps=5000,
        landscape_depth=32, grid=41, test_rows=64),
    "smallest": ResidualLinks(
        depths=(2,), d_model=16, length=8, batch_size=2, num_steps=3, landscape_depth=2, grid=3,
        test_rows=2),
}


def make_model(config: ResidualLinks, depth: int, residual: bool, vocab_size: int) -> GPT:
    return GPT(presets.gpt2(
        num_layers=depth, d_model=config.d_model, num_heads=4, mlp_dim=4 * config.d_model,
        vocab_size=vocab_size, max_length=config.length, dropout_rate=0.0,
        attention_dropout_rate=0.0, initializer="xavier_uniform", init_std=0.1, residual=residual))


def make_loss(model: GPT) -> Callable:
    """Returns `loss(params, batch)`, the mean loss over targets in nats."""

    def loss(params, batch):
        total, weight, _ = causal_lm.loss(model.apply, params, batch)
        return total / weight

    return loss


def gradient_norms(loss: Callable, params: dict, batch: dict) -> np.ndarray:
    """Returns the gradient norm of each layer; the layers in `params` are stacked."""
    grads = jax.jit(jax.grad(lambda p: loss(p, batch)))(params)["decoder"][tree.LAYERS]
    squares = [jnp.square(x).sum(tuple(range(1, x.ndim))) for x in jax.tree.leaves(grads)]
    return np.asarray(jnp.sqrt(sum(squares)))


def filter_axes(path: str) -> tuple[int, ...] | None:
    """Returns the axes of a parameter that form one filter, or None if it has no filters.

    A filter is the weights of one output, or a row of an embedding. Directions do not change biases
    and normalization parameters, which have no filters (Li et al. 2018, section 4).
    """
    if path.endswith("embedding"):
        return (1,)
    if not path.endswith("kernel"):
        return None
    first = int(f"/{tree.LAYERS}/" in path)  # axis 0 is that of the stacked layers
    return (first, first + 1) if "/out/" in path else (first,)


def random_direction(params: dict, rng: jax.Array) -> dict:
    """Returns a random direction whose filters have the same norms as those of `params`."""
    rngs = iter(jax.random.split(rng, len(jax.tree.leaves(params))))

    def draw(path, leaf):
        axes, leaf_rng = filter_axes(path), next(rngs)
        if axes is None:
            return jnp.zeros_like(leaf)
        noise = jax.random.normal(leaf_rng, leaf.shape)
        norm, noise_norm = (
            jnp.sqrt(jnp.square(x).sum(axes, keepdims=True)) for x in (leaf, noise))
        return noise * norm / noise_norm

    return tree.map_paths(draw, params)


def loss_landscape(
    config: ResidualLinks, loss: Callable, params: dict, batch: dict
) -> np.ndarray:
    """Returns the losses [grid, grid] on a plane through `params`."""
    direction_1, direction_2 = (
        random_direction(params, jax.random.key(config.seed + i)) for i in (1, 2))
    coordinates = jnp.linspace(-config.span, config.span, config.grid)

    # Parameters are arguments: if they were constants, XLA would fold operations at compile time.
    @jax.jit
    def losses_at(points, params, direction_1, direction_2):
        def loss_at(point):
            moved = jax.tree.map(lambda p, x, y: p + point[0] * x + point[1] * y,
                                 params, direction_1, direction_2)
            return loss(moved, batch)

        return jax.lax.map(loss_at, points)

    points = jnp.stack(jnp.meshgrid(coordinates, coordinates), -1).reshape(-1, 2)
    return np.asarray(losses_at(points, params, direction_1, direction_2)).reshape(
        config.grid, config.grid)


def losses_without_each_layer(
    config: ResidualLinks, depth: int, residual: bool, vocab_size: int, params: dict, batch: dict
) -> np.ndarray:
    """Returns the loss after removing each single layer, [depth]."""
    loss = make_loss(make_model(config, depth - 1, residual, vocab_size))
    remaining = jnp.array([[j for j in range(depth) if j != i] for i in range(depth)])

    @jax.jit
    def losses(params, remaining):
        def loss_of(layer_ids):
            layers = jax.tree.map(lambda x: x[layer_ids], params["decoder"][tree.LAYERS])
            return loss({**params, "decoder": {**params["decoder"], tree.LAYERS: layers}}, batch)

        return jax.lax.map(loss_of, remaining)

    return np.asarray(losses(params, remaining))


def run(config: ResidualLinks) -> dict[str, Any]:
    if config.landscape_depth not in config.depths:
        raise ValueError(f"landscape_depth is {config.landscape_depth}; it must be one of the "
                         f"depths {config.depths}")
    corpus = training.load_characters(config.length, config.batch_size, config.num_steps)
    vocab_size = corpus.tokenizer.vocab_size
    test = corpus.held_out.evaluation_batches(config.test_rows, max_batches=1)[0]
    rows, curves, gradients, landscapes, increases = [], {}, {}, {}, {}
    for depth in config.depths:
        for name, residual in VARIANTS.items():
            model = make_model(config, depth, residual, vocab_size)
            loss = make_loss(model)
            params = jax.jit(lambda rng, model=model: tree.stack_layers(init_params(model, rng)))(
                jax.random.key(config.seed))
            norms = gradient_norms(loss, params, test)
            result = training.train(
                f"{depth} layers {name}", functools.partial(causal_lm.loss, model.apply), params,
                corpus.train.loader(config.batch_size, seed=config.seed), config.num_steps,
                OptimizerConfig(peak_lr=config.peak_lr, warmup_steps=config.num_steps // 10,
                                clip_norm=1.0), seed=config.seed)
            held_out = float(jax.jit(loss)(result.params, test))
            row = {"layers": depth, "residual": residual, "held_out": held_out,
                   "gradient_of_first_layer": norms[0], "gradient_of_last_layer": norms[-1]}
            curves[depth, name] = result.curve()
            if depth == config.landscape_depth:
                landscapes[name] = loss_landscape(config, loss, result.params, test)
                increases[name] = losses_without_each_layer(
                    config, depth, residual, vocab_size, result.params, test) - held_out
                row["loss_increase_without_layer"] = increases[name]
            if depth == max(config.depths):
                gradients[name] = norms
            rows.append(row)
    save_curves(config, curves, gradients, increases)
    save_landscapes(config, landscapes, limit=2 * np.log(vocab_size))
    center = config.grid // 2
    return {"models": rows,
            "landscape": {name: {"center": losses[center, center], "median": np.median(losses)}
                          for name, losses in landscapes.items()},
            "planes": landscapes,
            "curves": {f"{depth} {name}": curve for (depth, name), curve in curves.items()}}


def save_landscapes(
    config: ResidualLinks, landscapes: dict[str, np.ndarray], limit: float
) -> None:
    limit = min(limit, max(float(np.nanmax(losses)) for losses in landscapes.values()))
    save_surfaces(
        config.out / "landscape.png",
        {f"{config.landscape_depth} layers {name}": losses for name, losses in landscapes.items()},
        config.span, limit=limit,
        title="Held-out loss around the trained parameters, filter-normalized directions")


def save_curves(config: ResidualLinks, curves: dict[tuple[int, str], training.Curve],
                gradients: dict[str, np.ndarray], increases: dict[str, np.ndarray]) -> None:
    dashed = {name: not residual for name, residual in VARIANTS.items()}
    save_panels(config.out / "residual_links.png", {
        "Training": Lines({
            f"{depth} layers {name}": Line(
                *curve, color=f"C{config.depths.index(depth)}", dashed=dashed[name])
            for (depth, name), curve in curves.items()}, ylabel="training loss (nats)"),
        f"Gradient before training, {max(config.depths)} layers": Lines({
            name: Line(range(len(norms)), norms, dashed=dashed[name])
            for name, norms in gradients.items()},
            xlabel="layer", ylabel="gradient norm of the layer", yscale="log"),
        f"One of {config.landscape_depth} layers removed after training": Lines({
            name: Line(range(len(x)), x, dashed=dashed[name], markers=True)
            for name, x in increases.items()}, xlabel="removed layer",
            ylabel="increase of the loss (nats)"),
    }, title="Residual connections")
