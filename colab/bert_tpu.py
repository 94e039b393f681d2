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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/transformer-jax/transformer_jax/blob/main/colab/bert_tpu.ipynb)
#
# # Pre-train BERT from scratch on several devices
#
# You will
#
# 1. arrange the chips of a TPU in a mesh, over which batches and parameters are sharded,
# 2. pre-train a small BERT on the documentation of Python, which comes with the package,
# 3. inspect a training row of BERT's two objectives: masked language modeling and next-sentence
#    prediction,
# 4. fill in masked words.
#
# The code is the same for one device and for many. Without an accelerator, as in the stored output,
# the CPU is split into eight devices and the model is smaller.

# %%
# Install the package if it is missing, and print the available devices.
import importlib.util

if importlib.util.find_spec("transformer_jax") is None:
    # %pip install -q "transformer_jax @ git+https://github.com/transformer-jax/transformer_jax"
    pass

import jax

if not any(d.platform != "cpu" for d in jax.devices()):
    import jax.extend.backend

    jax.extend.backend.clear_backends()
    jax.config.update("jax_num_cpu_devices", 8)

from transformer_jax import distributed

distributed.print_devices("tpu");

# %%
import os
from pathlib import Path

import numpy as np
from IPython.display import Image, Markdown

from transformer_jax import data, fill_mask, presets, pretrain, sharding
from transformer_jax.objectives.input_format import pack_bert_input
from transformer_jax.pretrained import load_run
from transformer_jax.recipes import MeshConfig, OptimizerConfig, pretrain_config
from transformer_jax.recipes.pretraining import make_objective_rows

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"  # a few steps, for the tests
ON_CPU = jax.devices()[0].platform == "cpu"
if ON_CPU:
    size = {"num_layers": 2, "d_model": 128, "num_heads": 4, "mlp_dim": 512}
    NUM_STEPS, BATCH_SIZE, MAX_LENGTH, PEAK_LR = 1800, 32, 48, 3e-3
else:
    size = {"num_layers": 4, "d_model": 512, "num_heads": 8, "mlp_dim": 2048, "dtype": "bfloat16"}
    NUM_STEPS, BATCH_SIZE, MAX_LENGTH, PEAK_LR = 2000, 256, 128, 1e-3
if SMALLEST:
    size |= {"d_model": 32, "mlp_dim": 32}
    NUM_STEPS, BATCH_SIZE, MAX_LENGTH = 2, 8, 24

# %% [markdown]
# ## 1. The mesh
#
# A mesh arranges the devices along named axes. Along `data`, each device has its own rows of
# the batch and a copy of the parameters. Along `fsdp` (fully sharded data parallelism), the
# parameters and their optimizer state are sharded too. A size of -1 means all remaining devices.

# %%
mesh_config = MeshConfig(data=-1, fsdp=min(2, jax.device_count()))
mesh = mesh_config.make()
print(dict(mesh.shape))

# %% [markdown]
# ## 2. The settings of the run
#
# `pretrain_config` returns the default settings for a preset, with the given fields replaced. A
# model as small as this one learns faster with a higher mask rate (30 %), normalization before each
# sublayer (pre-LN), and sinusoidal positions.

# %%
config = pretrain_config(
    "bert_tiny",
    model=presets.bert_tiny(
        **size, vocab_size=2048, max_length=MAX_LENGTH, dropout_rate=0.0,
        attention_dropout_rate=0.0, init_std=0.05, norm_first=True, norm_epsilon=1e-6,
        positions="sinusoidal"),
    data="python_docs/documents", out=Path("runs/bert"), mask_rate=0.3, mesh=mesh_config,
    num_steps=NUM_STEPS, batch_size=BATCH_SIZE, max_length=MAX_LENGTH, eval_batches=8,
    eval_every=max(NUM_STEPS // 4, 1), log_every=max(NUM_STEPS // 20, 1),
    optimizer=OptimizerConfig(peak_lr=PEAK_LR, warmup_steps=NUM_STEPS // 20, b2=0.99))

# %% [markdown]
# ## 3. Pre-training
#
# The parameters are initialized with their sharding, and each batch is sharded when it is loaded.

# %%
results = pretrain(config)
Image("runs/bert/loss.png")

# %% [markdown]
# ## 4. A training row
#
# A row has two spans of sentences, A and B. In half of the rows, B follows A; in the other half, it
# is from another document. The masked tokens are sampled anew in each epoch.

# %%
model, params, tokenizer, _ = load_run("runs/bert")
rows = make_objective_rows(config, data.load_source(config.data, "validation"), tokenizer)
batch = rows.evaluation_batches(batch_size=8, max_batches=1)[0]
for i, label in enumerate(["B follows A", "B is from another document"]):
    row = np.argmax(batch["nsp_labels"] == i)
    tokens = batch["tokens"][row][batch["padding_mask"][row]]
    print(f"[{label}] {tokenizer.decode(tokens, skip_special_tokens=False)}\n")

# %% [markdown]
# ## 5. Sharded parameters
#
# The figure shows which devices hold which rows of one kernel.

# %%
sharded = jax.device_put(params, sharding.param_shardings(params, mesh))
kernel = sharded["encoder"]["layer_0"]["mlp"]["wi"]["kernel"]
print(f"mlp/wi/kernel {kernel.shape} is sharded by {kernel.sharding.spec}")
jax.debug.visualize_array_sharding(kernel)

# %% [markdown]
# ## 6. Fill in masked words
#
# `fill_mask` returns the most probable tokens for each `[MASK]`.

# %%
for sentence in ("Return the number of [MASK] in the list.",
                 "If the file does not [MASK], an error is raised.",
                 "This [MASK] returns a string."):
    ids = tokenizer.encode(sentence)
    row = pack_bert_input(
        ids, length=len(ids) + 2, cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id)
    [mask] = fill_mask(model, params, row["tokens"], mask_id=tokenizer.mask_id)
    guesses = ", ".join(f"{tokenizer.decode([token_id])} {probability:.2f}"
                        for token_id, probability in zip(mask.token_ids, mask.probabilities))
    print(f"{sentence}\n    {guesses}")

# %% [markdown]
# ## Results
#
# The model learns masked language modeling first. Next-sentence prediction takes much longer at
# this model size: after such a short run, its accuracy is near chance (0.5).

# %%
before, after = results["metrics"]["held_out_before"], results["metrics"]["held_out"]
speeds = [row["tokens_per_second"] for row in results["metrics"]["history"]
          if "tokens_per_second" in row]
names = {"mlm_loss": "loss of masked words (nats)", "mlm_accuracy": "accuracy of masked words",
         "nsp_loss": "loss of next sentences (nats)", "nsp_accuracy": "accuracy of next sentences"}
Markdown("\n".join([
    "| on held-out text | before | after |", "|---|---|---|",
    *(f"| {title} | {before[name]:.3f} | {after[name]:.3f} |" for name, title in names.items()),
    f"| tokens per second on {jax.device_count()} devices | | {np.median(speeds or [np.nan]):,.0f} |"]))
