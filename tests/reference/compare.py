"""Our model, loss and gradient on what a golden holds, each held to 1e-5 of its scale."""

import json

import jax
import numpy as np
from small_models import optimized_jit

from transformer_jax.models import build_model, config_from_dict
from transformer_jax.objectives import causal_lm, cross_entropy, mlm_nsp

TOLERANCE = 1e-5
OBJECTIVES = {"gpt": causal_lm, "bert": mlm_nsp}
INPUTS = {"gpt": (), "bert": ("segment_ids", "padding_mask")}


def group(golden: dict, name: str) -> dict:
    return {key.partition("/")[2]: value for key, value in golden.items()
            if key.startswith(name + "/")}


def nested(flat: dict) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flattened(tree: dict) -> dict:
    return {"/".join(key.key for key in path): np.asarray(leaf)
            for path, leaf in jax.tree.leaves_with_path(tree)}


def assert_close(actual, expected, name: str, real=True, tolerance=TOLERANCE) -> None:
    assert actual.shape == expected.shape, name
    error = np.abs(np.where(real, actual - expected, 0)).max()
    scale = np.abs(np.where(real, expected, 0)).max()
    assert error <= tolerance * scale, f"{name}: off by {error:.2e} of {scale:.2e}"


def compare(golden: dict, gradient_tolerance: float = TOLERANCE) -> None:
    """Raises AssertionError if outputs, loss or gradients differ from the reference (float64)."""
    values = json.loads(str(golden["config"]))
    family = values["family"]
    model = build_model(config_from_dict(values))
    params, batch, expected = (group(golden, name) for name in ("params", "batch", "out"))
    real = batch["padding_mask"]
    inputs = {name: batch[name] for name in INPUTS[family]}
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch["tokens"])["params"]
    ours = flattened(jax.tree.map(lambda leaf: np.empty(leaf.shape), shapes))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in params.items()}

    @optimized_jit
    def run(params):
        def loss(params):
            total, weight, _ = OBJECTIVES[family].loss(model.apply, params, batch)
            return cross_entropy.mean_loss(total, weight)

        out = model.apply({"params": params}, batch["tokens"], **inputs, output_attentions=True)
        return out, *jax.value_and_grad(loss)(params)

    out, loss, gradient = run(nested(params))
    assert_close(np.asarray(loss), expected.pop("loss"), "loss")
    for name, value in expected.items():
        if name.startswith("attention_"):
            actual = out.attention[int(name.removeprefix("attention_"))]
            mask = real[:, None, :, None]
        else:
            # Padding attends to padding in ours; nobody reads it.
            actual = getattr(out, name)
            mask = real[..., None] if value.ndim == 3 else True
        assert_close(np.asarray(actual), value, name, mask)
    gradient = flattened(gradient)
    scale = max(np.abs(leaf).max() for leaf in group(golden, "gradient").values())
    for path, value in group(golden, "gradient").items():
        # A key's bias shifts all scores of a query alike: its gradient is nought but rounding.
        if path.endswith("key/bias"):
            assert np.abs(gradient[path]).max() <= TOLERANCE * scale, path
        else:
            assert_close(gradient[path], value, f"gradient of {path}",
                         tolerance=gradient_tolerance)
