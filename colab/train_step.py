# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/transformer-jax/transformer_jax/blob/main/colab/train_step.ipynb)
#
# # One pure training step under jit, pmap and shard_map
#
# For your own research code: the library's training step is a pure function of
# `(state, batch, rng)`, not jitted and not tied to any device. The same function runs under `jax.jit`
# on one device, under `jit` with a mesh that cuts batch and parameters, under `jax.pmap` and under
# `jax.shard_map`; under `vmap`, it trains several models at once. We run them all on the same data and
# see that they agree.

# %%
# What is needed, where it is missing; and the devices that are here.
import importlib.util

if importlib.util.find_spec("transformer_jax") is None:
    # %pip install -q "transformer_jax @ git+https://github.com/transformer-jax/transformer_jax"
    pass

import jax

if not any(d.platform != "cpu" for d in jax.devices()):
    # No accelerator: let the CPU stand for eight devices.
    import jax.extend.backend

    jax.extend.backend.clear_backends()
    jax.config.update("jax_num_cpu_devices", 8)

from transformer_jax import distributed

distributed.print_devices();

# %%
import functools
import os

import numpy as np
from IPython.display import Image, Markdown
from jax.sharding import PartitionSpec as P

from transformer_jax import sharding
from transformer_jax.models import GPT, init_params, presets
from transformer_jax.objectives import causal_lm
from transformer_jax.report import plots
from transformer_jax.train import optimizers, step

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"  # for tests
model = GPT(presets.gpt2(num_layers=1 if SMALLEST else 2, d_model=64, num_heads=4, mlp_dim=256, vocab_size=512,
                         max_length=32, dropout_rate=0.0, attention_dropout_rate=0.0))
loss = functools.partial(causal_lm.loss, model.apply)
optimizer = optimizers.make_optimizer(1e-3)
rng = np.random.default_rng(0)
text = np.cumsum(rng.integers(0, 3, (5, 16, 33)), axis=-1) % 512  # rows that can be learnt
batches = [{"tokens": t[:, :-1].astype(np.int32), "targets": t[:, 1:].astype(np.int32),
            "weights": np.ones((16, 32), np.float32)} for t in text]
found = {}


def fresh():
    return step.init_state(init_params(model, jax.random.key(0)), optimizer)


# %% [markdown]
# ## 1. `jit`, one device

# %%
train_step = jax.jit(step.make_train_step(loss, optimizer), donate_argnums=0)
state, losses = fresh(), []
for batch in batches:
    state, metrics = train_step(state, batch, None)
    losses.append(float(metrics["loss"]))
found["jit"] = losses
print(losses)

# %% [markdown]
# ## 2. `jit` and a mesh
#
# Nothing of the step changes. Where arrays are cut says everything: parameters by the rules of
# `sharding.RULES`, the batch over its rows. XLA puts the collectives in.

# %%
half = max(jax.device_count() // 2, 1)
mesh = sharding.make_mesh(data=-1, fsdp=half)
print(mesh)
with jax.set_mesh(mesh):
    params = sharding.init_sharded(functools.partial(init_params, model), jax.random.key(0), mesh)
    state, losses = step.init_state(params, optimizer), []
    for batch in batches:
        state, metrics = train_step(state, sharding.shard_batch(batch, mesh), None)
        losses.append(float(metrics["loss"]))
found[f"jit, data {jax.device_count() // half} x fsdp {half}"] = losses
kernel = state.params["decoder"]["layer_0"]["mlp"]["wi"]["kernel"]
print("mlp/wi/kernel:", kernel.shape, kernel.sharding.spec)
jax.debug.visualize_array_sharding(kernel)

# %% [markdown]
# ## 3. `pmap`
#
# Each device has a copy of everything and its own rows. `axis_name` makes the step add up sums,
# weights and gradients over devices before it divides, so unequal weights are no trouble.

# %%
n = jax.local_device_count()
mapped = jax.pmap(step.make_train_step(loss, optimizer, axis_name="devices"), "devices",
                  in_axes=(0, 0, None))
state = jax.tree.map(lambda x: np.stack([x] * n), fresh())
losses = []
for batch in batches:
    rows = jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), batch)
    state, metrics = mapped(state, rows, None)
    losses.append(float(metrics["loss"][0]))
found[f"pmap, {n} devices"] = losses

# %% [markdown]
# ## 4. `shard_map`
#
# The same function again, by hand: the state is copied, the batch is cut.

# %%
flat = jax.make_mesh((n,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
manual = jax.jit(jax.shard_map(
    lambda state, batch: step.make_train_step(loss, optimizer, axis_name="devices")(
        state, batch, None),
    mesh=flat, in_specs=(P(), P("devices")), out_specs=P()))
state, losses = fresh(), []
for batch in batches:
    state, metrics = manual(state, batch)
    losses.append(float(metrics["loss"]))
found[f"shard_map, {n} devices"] = losses

# %% [markdown]
# ## 5. Microbatches, and only what a mask says
#
# `accumulate=4` needs the memory of a quarter of the batch. A mask of booleans trains some of the
# parameters; the others come back bit for bit.

# %%
small = jax.jit(step.make_train_step(loss, optimizer, accumulate=4))
state, losses = fresh(), []
for batch in batches:
    state, metrics = small(state, batch, None)
    losses.append(float(metrics["loss"]))
found["jit, 4 microbatches"] = losses

from transformer_jax.finetuning import select

params = init_params(model, jax.random.key(0))
mask = select.trainable_mask(params, "bitfit")
some = jax.jit(step.make_train_step(loss, optimizer, trainable=mask))
state, _ = some(step.init_state(params, optimizer, mask), batches[0], None)
kept = jax.tree.map(lambda m, a, b: m or bool((a == b).all()), mask, params, state.params)
print("everything but the biases is unchanged:", all(jax.tree.leaves(kept)))

# %% [markdown]
# ## 6. `vmap`: four seeds at once

# %%
seeds = jax.vmap(lambda seed: init_params(model, jax.random.key(seed)))(np.arange(4))
states = jax.vmap(lambda p: step.init_state(p, optimizer))(seeds)
many = jax.jit(jax.vmap(step.make_train_step(loss, optimizer), in_axes=(0, None, None)))
for batch in batches:
    states, metrics = many(states, batch, None)
print("losses of four seeds after five steps:", np.round(metrics["loss"], 4))

# %% [markdown]
# ## They agree
#
# Five curves, one upon the other; how far they are from the first is in the table.

# %%
lines = {how: (range(1, 6), losses) for how, losses in found.items()}
Image(plots.curves("agreement.png", lines, title="Five ways to run one step"))

# %%
reference = np.array(found["jit"])
table = ["| how | losses of five steps | farthest from jit |", "|---|---|---|"]
for how, losses in found.items():
    off = np.abs(np.array(losses) / reference - 1).max()
    table.append(f"| {how} | {', '.join(f'{x:.5f}' for x in losses)} | {off:.1e} |")
    assert off < 1e-4, how
Markdown("\n".join(table))
