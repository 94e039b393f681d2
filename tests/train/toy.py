"""A small regression model whose loss has two terms with unequal weights."""

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 32


def parameters(width: int = 16, layers: int = 1) -> dict:
    keys = iter(jax.random.split(jax.random.key(0), 2 * layers + 2))

    def dense(rows: int, columns: int) -> dict:
        kernel = jax.random.normal(next(keys), (rows, columns)) / rows**0.5
        return {"kernel": kernel, "bias": jnp.zeros(columns)}

    stack = {
        f"layer_{i}": {"mlp_norm": {"scale": jnp.ones(width)}, "mlp": {"wi": dense(width, width)}}
        for i in range(layers)
    }
    return {"encoder": stack, "classifier": dense(width, 2)}


def batch(seed: int = 0, rows: int = ROWS, width: int = 16) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(rows, width)).astype(np.float32),
        "y": rng.normal(size=(rows, 2)).astype(np.float32),
        # Very unequal, so that the mean of the microbatches' means differs from the mean.
        "first_weights": (rng.uniform(size=rows) ** 4).astype(np.float32),
        "second_weights": (rng.uniform(size=rows) < 0.3).astype(np.float32),
    }


def predict(params: dict, x: jax.Array, rng: jax.Array | None = None) -> jax.Array:
    for layer in params["encoder"].values():
        dense = layer["mlp"]["wi"]
        x = jnp.tanh((x * layer["mlp_norm"]["scale"]) @ dense["kernel"] + dense["bias"])
        if rng is not None:
            x = x * jax.random.bernoulli(rng, 0.9, x.shape) / 0.9
    return x @ params["classifier"]["kernel"] + params["classifier"]["bias"]


def loss(params: dict, batch: dict, rng: jax.Array | None = None):
    """A loss of two terms, each with its own weights."""
    errors = (predict(params, batch["x"], rng) - batch["y"]) ** 2
    weights = {"first": batch["first_weights"], "second": batch["second_weights"]}
    sums = {name: (errors[:, i] * w).sum() for i, (name, w) in enumerate(weights.items())}
    metrics = {"error": (errors.sum(), errors.size)}
    return sums, {name: w.sum() for name, w in weights.items()}, metrics


def one_term(params: dict, batch: dict, rng: jax.Array | None = None):
    sums, weights, metrics = loss(params, batch, rng)
    return sums["first"], weights["first"], metrics


class Stream:
    """A checkpointable iterator of endless random batches, like a Grain iterator."""

    def __init__(self, seed: int = 0):
        self.seed, self.position = seed, 0

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        self.position += 1
        return batch(seed=1000 * self.seed + self.position)

    def get_state(self) -> dict:
        return {"position": self.position}

    def set_state(self, state: dict) -> None:
        self.position = state["position"]
