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
# # The planner: ask a TPU slice before you rent it
#
# `python -m transformer_jax plan` compiles the real training step with the real TPU compiler, with no
# TPU present, and says what one chip would hold, compute and send. This notebook does the same in
# Python: a few ways to train GPT-2 on sixteen chips of v5e, which fit, and which would be fastest.
#
# Compiling for the slice takes minutes. The output kept here is of one CPU core; no TPU was there.

# %%
# What is needed, where it is missing; and the devices that are here.
import importlib.util

if importlib.util.find_spec("transformer_jax") is None:
    # %pip install -q "transformer_jax[tpu] @ git+https://github.com/transformer-jax/transformer_jax"
    pass

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # the plan is of chips that are not here
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

from transformer_jax import distributed

distributed.print_devices();

# %%
import importlib.util

from IPython.display import Image, Markdown

from transformer_jax.models import presets
from transformer_jax.planner import chips, plan, plan_config, table
from transformer_jax.report import plots

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"
TOPOLOGY = os.environ.get("TOPOLOGY", "v5e:4x4")
if importlib.util.find_spec("libtpu") is None:
    print("!! No TPU compiler here (pip install 'transformer_jax[tpu]'): planning for this machine")
    TOPOLOGY = chips.LOCAL

# %% [markdown]
# ## What is planned
#
# A mesh of data 4 x fsdp 4, with and without `remat`, which computes activations again on the way
# back instead of keeping them. A row is 1,024 tokens. Other meshes, batches and models go in the same
# way; each setting takes a minute or two to compile.

# %%
base = presets.gpt2(num_layers=2, d_model=64, num_heads=2, mlp_dim=128, vocab_size=512,
                    max_length=64) if SMALLEST else presets.gpt2(dtype="bfloat16")
base = base.replace(dropout_rate=0.0, attention_dropout_rate=0.0)
devices = chips.get_devices(TOPOLOGY)
chip = chips.get_chip(TOPOLOGY, base.dtype)
fsdp = (1,) if len(devices) == 1 else (4,)
settings = plan_config.enumerate_configs(
    base, len(devices), meshes={"data": (-1,), "fsdp": fsdp, "sequence": (1,), "tensor": (1,)},
    batch_sizes=(8 * len(devices),), length=min(1024, base.max_length),
    remat=("none",) if SMALLEST else ("none", "full"), accumulate=(1,))
print(f"{len(devices)} x {devices[0].device_kind}: {chip.flops_per_second / 1e12:.3g} TFLOP/s, "
      f"{chip.memory_bytes / 2**30:.0f} GiB, {chip.memory_bandwidth / 1e9:.0f} GB/s each")

# %%
plans = []
for setting in settings:
    plans.append(plan.compile_plan(setting, devices, chip))
    print(f"{setting}: compiled in {plans[-1].compile_seconds:.0f} s, "
          f"{plans[-1].peak_bytes / 2**30:.1f} GiB a chip")

# %% [markdown]
# ## What came of it
#
# Three times of a step: for arithmetic, for memory as if nothing stayed on the chip between two
# operations, and for the network. MFU is the share of the chip's peak that the model's own products
# can reach if all three overlap.

# %%
Image(plots.plans("plan.png", table.bar_chart_data(plans), limit=chip.memory_bytes / 2**30,
                 title=f"GPT-2 on {TOPOLOGY}"))

# %% [markdown]
# ## What it sends
#
# Collectives of one step, by kind. `fsdp` gathers each kernel just before it is used and scatters
# its gradient after; `data` only adds gradients up.

# %%
for one in plans:
    sent = {kind: f"{size / 2**20:,.0f} MiB" for kind, size in one.collective_bytes.items()}
    print(f"{one.config}: {sent or 'nothing'}")
fitting = [one for one in plans if one.fits]
if fitting:
    best = min(fitting, key=lambda one: one.step_seconds / one.config.batch_size)
    print(f"\nThe best that fits: {best.config}, {best.tokens_per_day / 1e6:,.0f} million tokens a "
          "day if all overlaps")

# %% [markdown]
# ## Side by side

# %%
table = ["| setting | GiB a chip | fits | arithmetic, memory, network (ms) | MFU, at most | "
         "million tokens a day |", "|---|---|---|---|---|---|"]
for one in plans:
    times = ", ".join(f"{1e3 * one.roofline_seconds[kind]:.0f}" for kind in one.roofline_seconds)
    table.append(f"| {one.config} | {one.peak_bytes / 2**30:.1f} | {'yes' if one.fits else 'no'} |"
                 f" {times} | {one.mfu:.2f} | {one.tokens_per_day / 1e6:,.0f} |")
Markdown("\n".join(table))
