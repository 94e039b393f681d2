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
# # One pure training step under `jit`, `pmap`, `shard_map` and `vmap`
#
# For your own research code: a training step of this library is a pure function
# `(state, batch, rng) -> (state, metrics)`. It is not jitted and not tied to any device. You will run
# the same step
#
# 1. under `jax.jit` on one device,
# 2. under `jax.jit` with batch and parameters sharded over a mesh,
# 3. under `jax.pmap`,
# 4. under `jax.shard_map`,
# 5. with microbatches, and with a mask of trainable parameters,
# 6. under `jax.vmap`, which trains several models at once,
#
# and check that the losses agree.

# %%
# Install the package if it is missing, and print the available devices.
import importlib.util

if importlib.util.find_spec("transformer_jax") is None:
    # %pip install -q "transformer_jax @ git+https://github.com/transformer-jax/transformer_jax"
    pass

import jax

if not any(d.platform != "cpu" for d in jax.devices()):
    # Without an accelerator, the CPU is split into eight devices.
    import jax.extend.backend

    jax.extend.backend.clear_backends()
    jax.config.update("jax_num_cpu_devices", 8)

from transformer_jax import distributed

distributed.print_devices();

# %% [markdown]
# ## Model, loss, optimizer, data
#
# Parameters are a nested dict. A loss takes `(params, batch, rng)` and returns
# `(sum, weight, metrics)`. The step adds the sums and the weights over all devices and microbatches
# before it divides, so the mean is exact even if they have different numbers of tokens.

# %%
import functools
import os

import numpy as np
from IPython.display import Image, Markdown
from jax.sharding import PartitionSpec as P

from transformer_jax import GPT, init_params, make_train_step, presets, sharding, trainable_mask
from transformer_jax.objectives import causal_lm
from transformer_jax.report import plots
from transformer_jax.train import init_state, make_optimizer

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"  # one layer, for the tests
model = GPT(presets.gpt2(
    num_layers=1 if SMALLEST else 2, d_model=64, num_heads=4, mlp_dim=256, vocab_size=512,
    max_length=32, dropout_rate=0.0, attention_dropout_rate=0.0))
loss_fn = functools.partial(causal_lm.loss, model.apply)
optimizer = make_optimizer(1e-3)

# Five batches of 16 sequences: each token is the previous one plus 0, 1 or 2 (mod 512).
steps = np.random.default_rng(0).integers(0, 3, (5, 16, 33))
batches = [{"tokens": t[:, :-1].astype(np.int32), "targets": t[:, 1:].astype(np.int32),
            "weights": np.ones((16, 32), np.float32)} for t in np.cumsum(steps, axis=-1) % 512]
all_losses = {}  # how the step is run -> losses of five steps


def new_state():
    return init_state(init_params(model, jax.random.key(0)), optimizer)


# %% [markdown]
# ## 1. `jit` on one device
#
# `donate_argnums=0` lets XLA reuse the memory of the old state.

# %%
train_step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)
state, losses = new_state(), []
for batch in batches:
    state, metrics = train_step(state, batch, None)
    losses.append(float(metrics["loss"]))
all_losses["jit"] = losses
print([round(x, 4) for x in losses])

# %% [markdown]
# ## 2. `jit` with a mesh
#
# The step does not change; only the arrays are sharded: parameters according to `sharding.RULES`,
# batches by rows. XLA inserts the collectives. `init_sharded` creates each parameter on the
# devices that hold it. The figure shows which devices hold which rows of one kernel.

# %%
fsdp = max(jax.device_count() // 2, 1)
mesh = sharding.make_mesh(data=-1, fsdp=fsdp)
with jax.set_mesh(mesh):
    params = sharding.init_sharded(functools.partial(init_params, model), jax.random.key(0), mesh)
    state, losses = init_state(params, optimizer), []
    for batch in batches:
        state, metrics = train_step(state, sharding.shard_batch(batch, mesh), None)
        losses.append(float(metrics["loss"]))
all_losses[f"jit, data {jax.device_count() // fsdp} x fsdp {fsdp}"] = losses
kernel = state.params["decoder"]["layer_0"]["mlp"]["wi"]["kernel"]
print(f"mlp/wi/kernel {kernel.shape} is sharded by {kernel.sharding.spec}")
jax.debug.visualize_array_sharding(kernel)

# %% [markdown]
# ## 3. `pmap`
#
# Each device has a copy of the state and its own rows of the batch. `axis_name` makes the step sum
# losses, weights and gradients over the devices.

# %%
num_devices = jax.local_device_count()
pmapped_step = jax.pmap(make_train_step(loss_fn, optimizer, axis_name="devices"), "devices",
                        in_axes=(0, 0, None))
state = jax.tree.map(lambda x: np.stack([x] * num_devices), new_state())
losses = []
for batch in batches:
    rows = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
    state, metrics = pmapped_step(state, rows, None)
    losses.append(float(metrics["loss"][0]))
all_losses[f"pmap, {num_devices} devices"] = losses

# %% [markdown]
# ## 4. `shard_map`
#
# The same function with manual sharding: the state is replicated, and the batch is sharded.

# %%
flat_mesh = jax.make_mesh((num_devices,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
step_per_device = make_train_step(loss_fn, optimizer, axis_name="devices")
sharded_step = jax.jit(jax.shard_map(
    lambda state, batch: step_per_device(state, batch, None),
    mesh=flat_mesh, in_specs=(P(), P("devices")), out_specs=P()))
state, losses = new_state(), []
for batch in batches:
    state, metrics = sharded_step(state, batch)
    losses.append(float(metrics["loss"]))
all_losses[f"shard_map, {num_devices} devices"] = losses

# %% [markdown]
# ## 5. Microbatches, and a mask of trainable parameters
#
# `accumulate=4` accumulates the gradients of four microbatches, which reduces the memory of the
# activations to a quarter.

# %%
accumulating_step = jax.jit(make_train_step(loss_fn, optimizer, accumulate=4))
state, losses = new_state(), []
for batch in batches:
    state, metrics = accumulating_step(state, batch, None)
    losses.append(float(metrics["loss"]))
all_losses["jit, 4 microbatches"] = losses

# %% [markdown]
# `trainable_mask` turns a spec into a tree of booleans. Here only the biases are trained (BitFit);
# all other parameters are bit for bit unchanged by the step and have no optimizer state.

# %%
params = init_params(model, jax.random.key(0))
mask = trainable_mask(params, "bitfit")
bitfit_step = jax.jit(make_train_step(loss_fn, optimizer, trainable=mask))
state, _ = bitfit_step(init_state(params, optimizer, mask), batches[0], None)
unchanged = jax.tree.map(
    lambda is_trainable, before, after: is_trainable or bool((before == after).all()),
    mask, params, state.params)
print("all frozen parameters are unchanged:", all(jax.tree.leaves(unchanged)))

# %% [markdown]
# ## 6. `vmap`: four seeds at once
#
# One compiled program trains a stack of four states.

# %%
params = jax.vmap(lambda seed: init_params(model, jax.random.key(seed)))(np.arange(4))
states = jax.vmap(lambda p: init_state(p, optimizer))(params)
vmapped_step = jax.jit(jax.vmap(make_train_step(loss_fn, optimizer), in_axes=(0, None, None)))
for batch in batches:
    states, metrics = vmapped_step(states, batch, None)
print("losses of four seeds in the fifth step:", np.round(metrics["loss"], 4))

# %% [markdown]
# ## Results
#
# The five curves coincide. The table lists their losses and the largest relative difference from
# `jit` on one device, which is due to float32 rounding.

# %%
curves = {name: (range(1, 6), losses) for name, losses in all_losses.items()}
Image(plots.curves("agreement.png", curves, title="Five ways to run one training step"))

# %%
rows = []
for name, losses in all_losses.items():
    difference = np.abs(np.array(losses) / np.array(all_losses["jit"]) - 1).max()
    assert difference < 1e-4, name
    rows.append(f"| {name} | {', '.join(f'{x:.5f}' for x in losses)} | {difference:.1e} |")
Markdown("\n".join(["| step | losses of five steps | largest relative difference |",
                    "|---|---|---|", *rows]))
