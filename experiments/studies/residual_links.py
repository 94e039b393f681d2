"""Residual links: with them 32 layers train like one; without them 4 do not train at all.

    python experiments/study.py residual_links

Claims (He et al. 2016, "Deep Residual Learning"; Li et al. 2018, "Visualizing the Loss Landscape of
Neural Nets"; Veit et al. 2016, "Residual Networks Behave Like Ensembles of Relatively Shallow
Networks"): links let the gradient reach the first layers, make the loss around a solution smooth,
and make a deep model an ensemble of shallow ones, so that one layer fewer hardly matters.

Character GPTs, norm before each sublayer, with x + f(norm(x)) and with f(norm(x)) alone. The plane
of the landscape is spanned by two random directions whose filters, here the weights of one output,
have the norms of the model's own.

One core of an AMD EPYC: 11 minutes. After 400 steps the training loss is 2.45 to 2.47 nats a
character with links, whatever the depth; without, it is 2.48 with 1 layer, 2.62 with 2, and 3.10
with 4 and more: those have learnt how often each character comes, and nothing of what stands before
it. Leaving out one of 16 layers costs less than 0.06 nats but for the first (0.82); without links
it costs nothing, or 5.5. The gradient is not what fails: under norms in front of every sublayer it
reaches the first layer without links too. The loss around the model with links is a bowl, around
the other a plateau with cliffs, on one scale.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from studies import small
from studies.pictures import Line, Lines, show, surfaces
from transformer_jax import tree
from transformer_jax.models import GPT, init_params, presets
from transformer_jax.objectives import causal_lm
from transformer_jax.recipes.config import OptimizerConfig
from transformer_jax.recipes.pretraining import PretrainConfig

LINKS = {"with links": True, "without": False}


@dataclass(frozen=True, kw_only=True)
class ResidualLinks:
    """Attributes:
        depths: layers; landscape_depth: of the model whose surroundings are drawn, one of them.
        grid: points of the landscape on a side; span: how far it goes, in norms of the parameters.
        test_rows: held-out rows that the landscape and the models with a layer less are scored on.
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


def config() -> ResidualLinks:
    return ResidualLinks()


def large() -> ResidualLinks:
    return ResidualLinks(depths=(4, 8, 16, 32, 64), d_model=512, length=256, batch_size=64,
                         num_steps=5000, landscape_depth=32, grid=41, test_rows=64)


def smallest() -> ResidualLinks:
    return ResidualLinks(depths=(2,), d_model=16, length=8, batch_size=2, num_steps=3,
                         landscape_depth=2, grid=3, test_rows=2)


def make_model(c: ResidualLinks, depth: int, links: bool, vocab_size: int) -> GPT:
    return GPT(presets.gpt2(
        num_layers=depth, d_model=c.d_model, num_heads=4, mlp_dim=4 * c.d_model,
        vocab_size=vocab_size, max_length=c.length, dropout_rate=0.0, attention_dropout_rate=0.0,
        initializer="xavier_uniform", init_std=0.1, residual=links))


def gradient_by_depth(loss, params, batch) -> np.ndarray:
    """The norm of the gradient of each layer's parameters; `params` are stacked."""
    gradient = jax.jit(jax.grad(lambda p: loss(p, batch)))(params)["decoder"][tree.LAYERS]
    squares = [jnp.square(x).sum(tuple(range(1, x.ndim))) for x in jax.tree.leaves(gradient)]
    return np.asarray(jnp.sqrt(sum(squares)))


def filter_axes(path: str, ndim: int) -> tuple[int, ...] | None:
    """The axes over which one filter extends: what leads to one output, a row of an embedding. None
    for biases and norms, which do not move (Li et al. 2018, section 4)."""
    if path.endswith("embedding"):
        return (1,)
    if not path.endswith("kernel"):
        return None
    first = int(f"/{tree.LAYERS}/" in path)
    return (first, first + 1) if "/out/" in path else (first,)


def direction(params, key: jax.Array):
    """A random direction whose filters have the norms of those of `params`."""
    keys = iter(jax.random.split(key, len(jax.tree.leaves(params))))

    def one(path, leaf):
        axes, key = filter_axes(path, leaf.ndim), next(keys)
        if axes is None:
            return jnp.zeros_like(leaf)
        noise = jax.random.normal(key, leaf.shape)
        ours, drawn = (jnp.sqrt(jnp.square(x).sum(axes, keepdims=True)) for x in (leaf, noise))
        return noise * ours / drawn

    return tree.map_paths(one, params)


def landscape(c: ResidualLinks, loss, params, batch) -> np.ndarray:
    """Losses [grid, grid] on the plane through `params`."""
    one, other = (direction(params, jax.random.key(c.seed + i)) for i in (1, 2))
    at = jnp.linspace(-c.span, c.span, c.grid)

    @jax.jit
    def over(plane, params, one, other):  # arguments: of constants XLA would compute all it can
        def there(ab):
            return loss(jax.tree.map(lambda p, x, y: p + ab[0] * x + ab[1] * y, params, one, other),
                        batch)

        return jax.lax.map(there, plane)

    plane = jnp.stack(jnp.meshgrid(at, at), -1).reshape(-1, 2)
    return np.asarray(over(plane, params, one, other)).reshape(c.grid, c.grid)


def without_each(c: ResidualLinks, depth: int, links: bool, vocab_size: int, params, batch):
    """The loss with layer 0 left out, with layer 1 left out, ..."""
    loss = loss_of(make_model(c, depth - 1, links, vocab_size))
    others = jnp.array([[j for j in range(depth) if j != i] for i in range(depth)])

    @jax.jit
    def leave_out(params, others):
        def score(rest):
            layers = jax.tree.map(lambda x: x[rest], params["decoder"][tree.LAYERS])
            return loss({**params, "decoder": {**params["decoder"], tree.LAYERS: layers}}, batch)

        return jax.lax.map(score, others)

    return np.asarray(leave_out(params, others))


def loss_of(model: GPT):
    """`loss(params, batch)`: the mean over targets, in nats."""

    def loss(params, batch):
        total, weight, _ = causal_lm.loss(model.apply, params, batch)
        return total / weight

    return loss


def run(c: ResidualLinks) -> dict:
    if c.landscape_depth not in c.depths:
        raise ValueError(f"landscape_depth is {c.landscape_depth}; it must be one of the depths "
                         f"{c.depths}")
    corpus = small.read(PretrainConfig(
        model=presets.gpt2(), objective="causal_lm", tokenizer="chars", max_length=c.length,
        batch_size=c.batch_size, num_steps=c.num_steps, out=c.out))
    size = corpus.tokenizer.vocab_size
    test = corpus.held_out.evaluation_batches(c.test_rows, max_batches=1)[0]
    found, curves, gradients, planes, fewer = [], {}, {}, {}, {}
    for depth in c.depths:
        for name, links in LINKS.items():
            model = make_model(c, depth, links, size)
            loss = loss_of(model)
            params = jax.jit(lambda key, m=model: tree.stack_layers(init_params(m, key)))(
                jax.random.key(c.seed))
            gradient = gradient_by_depth(loss, params, test)
            trained = small.train(
                f"{depth} layers {name}", functools.partial(causal_lm.loss, model.apply), params,
                corpus.train.loader(c.batch_size, seed=c.seed), c.num_steps,
                OptimizerConfig(peak_lr=c.peak_lr, warmup_steps=c.num_steps // 10, clip_norm=1.0), seed=c.seed)
            held_out = float(jax.jit(loss)(trained.params, test))
            found.append({"layers": depth, "links": links, "held_out": held_out,
                          "gradient_of_first_layer": gradient[0],
                          "gradient_of_last_layer": gradient[-1]})
            curves[depth, name] = trained.curve()
            if depth == c.landscape_depth:
                planes[name] = landscape(c, loss, trained.params, test)
                fewer[name] = without_each(c, depth, links, size, trained.params, test) - held_out
                found[-1]["loss_without_a_layer"] = fewer[name]
            if depth == max(c.depths):
                gradients[name] = gradient
    picture(c, curves, gradients, fewer)
    limit = min(2 * np.log(size), max(float(np.nanmax(x)) for x in planes.values()))
    surfaces(c.out / "landscape.png", {f"{c.landscape_depth} layers {name}": plane
                                       for name, plane in planes.items()}, c.span, limit=limit,
             title="Held-out loss around what was trained, in filter-normalised directions")
    flat = {name: {"centre": plane[c.grid // 2, c.grid // 2], "median": np.median(plane)}
            for name, plane in planes.items()}
    return {"models": found, "landscape": flat, "planes": planes,
            "curves": {f"{depth} {name}": curve for (depth, name), curve in curves.items()}}


def picture(c: ResidualLinks, curves, gradients, fewer) -> None:
    dashed = {name: not links for name, links in LINKS.items()}
    show(c.out / "residual_links.png", {
        "Training": Lines({
            f"{depth} layers {name}": Line(*curve, color=f"C{c.depths.index(depth)}",
                                           dashed=dashed[name])
            for (depth, name), curve in curves.items()}, ylabel="training loss (nats)"),
        f"Gradient before training, {max(c.depths)} layers": Lines({
            name: Line(range(len(x)), x, dashed=dashed[name]) for name, x in gradients.items()},
            xlabel="layer", ylabel="norm of the layer's gradient", yscale="log"),
        f"One layer less at test time, of {c.landscape_depth}": Lines({
            name: Line(range(len(x)), x, dashed=dashed[name], points=True)
            for name, x in fewer.items()}, xlabel="the layer that is left out",
            ylabel="rise of the loss (nats)"),
    }, title="Residual links")
