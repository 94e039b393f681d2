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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/transformer-jax/transformer_jax/blob/main/colab/planner.ipynb)
#
# # The planner: memory and speed of a training step on a TPU slice, without a TPU
#
# The TPU compiler runs on any Linux machine. The planner compiles the training step for a TPU slice
# ahead of time, and reads from the compiled program how much memory it needs, how many floating-point
# operations it executes, and how many bytes it moves. You will
#
# 1. choose a slice, a mesh and a model (GPT-2 on 16 chips of TPU v5e),
# 2. compile its training step with and without rematerialization,
# 3. compare its memory with that of a chip, and estimate the step time with a roofline model,
# 4. list the communication between the chips.
#
# `transformer-jax plan` does the same in a terminal. Compiling each of the two programs took two to
# three minutes on the CPU that produced the stored output.

# %%
# Install the package if it is missing, and print the available devices.
import importlib.util

if importlib.util.find_spec("transformer_jax") is None:
    # %pip install -q "transformer_jax[tpu] @ git+https://github.com/transformer-jax/transformer_jax"
    pass

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # programs are compiled for the TPU, not run on it
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # do not search for a TPU on this machine

from transformer_jax import distributed

distributed.print_devices();

# %%
from IPython.display import Image, Markdown

from transformer_jax import presets
from transformer_jax.planner import chips, plan, plan_config
from transformer_jax.report import plots

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"  # a small model, for the tests
TOPOLOGY = os.environ.get("TOPOLOGY", "v5e:4x4")
if importlib.util.find_spec("libtpu") is None:
    print("The TPU compiler is not installed (pip install 'transformer_jax[tpu]'); planning for this "
          "machine instead")
    TOPOLOGY = chips.LOCAL

# %% [markdown]
# ## 1. The slice, the mesh and the model
#
# `v5e:4x4` is a slice of TPU v5e with 4 x 4 chips. The mesh has an axis `fsdp` of size 4, over
# which the parameters are sharded, and an axis `data` of size 4. `remat="full"` recomputes
# activations in the backward pass instead of storing them. A batch has 8 sequences of 1,024 tokens
# per chip. `enumerate_configs` returns all combinations of the given values.

# %%
if SMALLEST:
    model_config = presets.gpt2(num_layers=2, d_model=64, num_heads=2, mlp_dim=128, vocab_size=512,
                                max_length=64)
else:
    model_config = presets.gpt2(dtype="bfloat16")
model_config = model_config.replace(dropout_rate=0.0, attention_dropout_rate=0.0)
devices = chips.get_devices(TOPOLOGY)
chip = chips.get_chip(TOPOLOGY, model_config.dtype)
configs = plan_config.enumerate_configs(
    model_config, len(devices), meshes={"data": (-1,), "fsdp": (min(4, len(devices)),)},
    batch_sizes=(8 * len(devices),), remat=("none",) if SMALLEST else ("none", "full"))
print(f"{len(devices)} x {devices[0].device_kind}, each with {chip.flops_per_second / 1e12:.3g} "
      f"TFLOP/s, {chip.memory_bytes / 2**30:.0f} GiB, {chip.memory_bandwidth / 1e9:.0f} GB/s")

# %% [markdown]
# ## 2. Compile

# %%
plans = []
for config in configs:
    plans.append(plan.compile_plan(config, devices, chip))
    print(f"{config}: compiled in {plans[-1].compile_seconds:.0f} s")

# %% [markdown]
# ## 3. Memory and step time
#
# Left: the memory that the step needs on each chip, split into state (parameters and optimizer
# state) and temporary memory (activations and gradients). Right: the step time if a single resource
# determined it: arithmetic (compute), memory traffic (HBM), or communication between chips
# (interconnect). Memory traffic includes intermediate results that the compiler may keep in on-chip
# memory between two operations.

# %%
Image(plots.plans("plan.png", plan.bar_chart_data(plans), limit=chip.memory_bytes / 2**30,
                  title=f"GPT-2 on {TOPOLOGY}"))

# %% [markdown]
# ## 4. Communication
#
# Data sent by one chip in one step. Along `fsdp`, each kernel is gathered just before it is used
# (all-gather) and its gradient is reduce-scattered; along `data`, gradients are all-reduced.

# %%
for p in plans:
    sent = ", ".join(f"{kind} {size / 2**20:,.0f} MiB" for kind, size in p.collective_bytes.items())
    print(f"{p.config}: {sent or 'nothing'}")

# %% [markdown]
# ## Results
#
# MFU (model FLOPs utilization) is the FLOP/s of the model's matrix products as a fraction of the
# chip's peak, if computation, memory traffic and communication overlap fully. Arithmetic and memory
# traffic are extrapolated from models of two and three layers. The stored output is older: it was
# extrapolated from one and two layers. For `remat none`, two and three layers give an HBM time of 58 ms
# (not 25) and an MFU of 0.61 (not 1.01).

# %%
rows = []
for p in plans:
    milliseconds = " | ".join(f"{1000 * seconds:.0f}" for seconds in p.roofline_seconds.values())
    rows.append(f"| {p.config} | {p.peak_bytes / 2**30:.1f} | {'yes' if p.fits else 'no'} | "
                f"{milliseconds} | {p.mfu:.2f} | {p.tokens_per_day / 1e9:,.3g} |")
best = plan.best_plan(plans)
Markdown("\n".join([
    "| config | GiB per chip | fits | compute (ms) | HBM (ms) | interconnect (ms) | MFU, at most | "
    "billion tokens a day |", "|---|---|---|---|---|---|---|---|", *rows,
    "", f"Best config that fits: {best.config if best else 'none'}"]))
