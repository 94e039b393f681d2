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
# # Pre-train BERT from scratch on a TPU, over a mesh
#
# Both of BERT's objectives, masked words and next sentence, from nothing, on the documentation of
# Python that comes with the package. The batch is cut over all chips and large parameters with their
# optimizer state over some of them; the step is the same one that runs on one CPU. With no
# accelerator, eight pretended devices on the CPU show the same thing, smaller and slower.

# %%
# What is needed, where it is missing; and the devices that are here.
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
from transformer_jax.data import packing

distributed.print_devices("tpu");

# %%
import functools
import os

import numpy as np
from IPython.display import Image, Markdown

from transformer_jax import sharding
from transformer_jax.data import batching, sources, tokenizers
from transformer_jax.generation import fill_mask
from transformer_jax.models import BERT, init_params, presets
from transformer_jax.objectives import mlm_nsp
from transformer_jax.objectives.input_format import pack_bert_input
from transformer_jax.report import plots
from transformer_jax.train import loop, optimizers, step
from transformer_jax.tree import count

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"
ON_CPU = jax.devices()[0].platform == "cpu"
SHAPE = {"num_layers": 2, "d_model": 128, "num_heads": 4, "mlp_dim": 512} if ON_CPU else {
    "num_layers": 4, "d_model": 512, "num_heads": 8, "mlp_dim": 2048, "dtype": "bfloat16"}
STEPS, BATCH, LENGTH = (2, 8, 24) if SMALLEST else (2400, 32, 48) if ON_CPU else (2000, 256, 128)
if SMALLEST:
    SHAPE |= {"d_model": 32, "mlp_dim": 32}

# %% [markdown]
# ## The mesh
#
# `data` cuts the batch; `fsdp` cuts the batch and every large parameter; the axes multiply to the
# number of devices.

# %%
mesh = sharding.make_mesh(data=-1, fsdp=min(2, jax.device_count()))
print(dict(mesh.shape))

# %% [markdown]
# ## The text, and what a row of it is
#
# Two runs of sentences, the second one the true continuation in half of the rows. Some tokens are
# hidden, anew in each epoch: their places and what stood there are what is to predict.

# %%
train, held_out = (sources.load_source("python_docs/documents", split)
                   for split in ("train", "validation"))
tokenizer = tokenizers.train_wordpiece([train[i]["text"] for i in range(len(train))],
                                       vocab_size=2048)
t = tokenizer


def pairs_and_rows(source):
    pairs = mlm_nsp.SentencePairs(packing.tokenize_corpus(source, t), LENGTH - 3)
    return pairs, functools.partial(
        mlm_nsp.prepare, pairs=pairs, length=LENGTH, mask_rate=0.3, max_predictions=round(0.3 * LENGTH),
        vocab_size=t.vocab_size, cls_id=t.cls_id, sep_id=t.sep_id, mask_id=t.mask_id,
        pad_id=t.pad_id, min_random_id=t.mask_id + 1)


pairs, prepare = pairs_and_rows(train)
row = prepare(pairs[5], np.random.default_rng(0))
print(t.decode(row["tokens"][row["padding_mask"]], skip_special_tokens=False))
print("B is", "another document's" if row["nsp_labels"] else "what follows A")

# %% [markdown]
# ## Parameters are born where they live

# %%
model = BERT(presets.bert_tiny(**SHAPE, vocab_size=t.vocab_size, max_length=LENGTH,
                               dropout_rate=0.0, attention_dropout_rate=0.0, init_std=0.05,
                               norm_first=True, norm_epsilon=1e-6, positions="sinusoidal"))
params = sharding.init_sharded(functools.partial(init_params, model), jax.random.key(0), mesh)
kernel = params["encoder"]["layer_0"]["mlp"]["wi"]["kernel"]
print(f"{count(params):,} parameters; mlp/wi/kernel {kernel.shape} is cut by {kernel.sharding.spec}")
jax.debug.visualize_array_sharding(kernel)

# %% [markdown]
# ## Training

# %%
loss = functools.partial(mlm_nsp.loss, model.apply)
optimizer = optimizers.make_optimizer(
    optimizers.make_schedule("cosine", 3e-3 if ON_CPU else 1e-3, STEPS, warmup_steps=STEPS // 20),
    b2=0.99)
tests, prepare_tests = pairs_and_rows(held_out)
test_batches = list(batching.make_loader(tests, BATCH, transform=prepare_tests, shuffle=False,
                                         num_epochs=1))[: 1 if SMALLEST else 8]
judge = step.make_eval_step(loss)


def held_out_loss(params):
    return step.evaluate(judge, params, test_batches, mesh)


before = held_out_loss(params)
state, history = loop.fit(
    step.init_state(params, optimizer), step.make_train_step(loss, optimizer),
    batching.make_loader(pairs, BATCH, transform=prepare), rng=jax.random.key(1), num_steps=STEPS,
    mesh=mesh, eval_fn=held_out_loss, eval_every=max(STEPS // 4, 1), log_every=max(STEPS // 40, 1))
after = held_out_loss(state.params)
speed = [h["tokens_per_second"] for h in history if "tokens_per_second" in h]
print(f"{np.median(speed) if speed else float('nan'):,.0f} tokens a second on "
      f"{jax.device_count()} devices")

# %%
curves = {name: tuple(zip(*[(h["step"], h[key]) for h in history if key in h]))
          for name, key in (("training", "loss"), ("held-out", "eval_loss"))}
Image(plots.curves("loss.png", curves, title="Masked words and next sentence"))

# %% [markdown]
# ## Words in the place of masks, and the whole in numbers
#
# Masked words come first. Next sentences take a model of this size far longer, and stay near chance
# (one in two) in a run as short as this.

# %%
params = jax.device_get(state.params)
for sentence in ("Return the number of [MASK] in the list.", "If the file does not [MASK], an "
                 "error is raised.", "This [MASK] returns a string."):
    ids = t.encode(sentence)
    tokens = pack_bert_input(ids, length=len(ids) + 2, cls_id=t.cls_id, sep_id=t.sep_id)["tokens"]
    best = fill_mask(model, params, tokens, mask_id=t.mask_id)[0]
    guesses = ", ".join(f"{t.decode([i])} {p:.2f}"
                        for i, p in zip(best.token_ids, best.probabilities))
    print(f"{sentence}\n   {guesses}")

# %%
table = ["| on held-out text | before | after |", "|---|---|---|"]
for name in ("mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy"):
    table.append(f"| {name} | {before[name]:.3f} | {after[name]:.3f} |")
Markdown("\n".join(table))
