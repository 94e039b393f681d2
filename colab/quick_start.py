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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/transformer-jax/transformer_jax/blob/main/colab/quick_start.ipynb)
#
# # Quick start: pre-train, fine-tune a masked subset, generate
#
# In a few minutes, with no download: a small GPT learns to write from the documentation of Python,
# which comes with the package. A *copy* of its parameters then learns a task from a few hundred
# labels, three times: training all of them, the last layer, or nothing but a new head. We look at what
# each costs, how well it does, and **what it forgets**.
#
# Parameters are a nested dict, a model is `apply(params, tokens)`, a loss is
# `(sum, weight, metrics)`, a step is `(state, batch, rng) -> (state, metrics)`. There is no trainer.

# %%
# What is needed, where it is missing; and the devices that are here.
import importlib.util

if importlib.util.find_spec("transformer_jax") is None:
    # %pip install -q "transformer_jax @ git+https://github.com/transformer-jax/transformer_jax"
    pass

from transformer_jax import distributed
from transformer_jax.data import packing

distributed.print_devices();

# %%
import functools
import os

import jax
import numpy as np
from IPython.display import Image, Markdown

from transformer_jax import data
from transformer_jax.data import batching, sources, tokenizers
from transformer_jax.finetuning import select
from transformer_jax.generation import generate
from transformer_jax.models import GPT, build_model, init_params, presets
from transformer_jax.objectives import causal_lm, classification
from transformer_jax.report import plots
from transformer_jax.train import loop, optimizers, step
from transformer_jax.tree import count, restore_partial

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"  # a few steps, for tests
STEPS, FINETUNE_STEPS, LENGTH = (2, 2, 32) if SMALLEST else (500, 100, 64)

# %% [markdown]
# ## The text
#
# Documents become one long row of ids by byte-pair encoding, cut into rows of 64. What is to predict
# is the next id, so a row's targets are its tokens moved by one place.

# %%
train, held_out = (sources.load_source("python_docs/documents", split)
                   for split in ("train", "validation"))
tokenizer = tokenizers.train_bpe([train[i]["text"] for i in range(len(train))], vocab_size=2048)
rows = {name: packing.PackedTokens(
            packing.tokenize_corpus(source, tokenizer, eos_id=tokenizer.eos_id), LENGTH)
        for name, source in (("train", train), ("held out", held_out))}
print({name: f"{len(part):,} rows" for name, part in rows.items()})
print(tokenizer.decode(rows["train"][100]["tokens"]))

# %% [markdown]
# ## Pre-training: all parameters, on plain text

# %%
config = presets.gpt2(num_layers=2, d_model=128, num_heads=4, mlp_dim=512, max_length=64,
                      vocab_size=tokenizer.vocab_size, dropout_rate=0.0,
                      attention_dropout_rate=0.0, init_std=0.05)
model = GPT(config)
params = init_params(model, jax.random.key(0))
loss = functools.partial(causal_lm.loss, model.apply)
optimizer = optimizers.make_optimizer(
    optimizers.make_schedule("cosine", 3e-3, STEPS, warmup_steps=STEPS // 20), b2=0.99)

held_out_batches = list(batching.make_loader(rows["held out"], 32, shuffle=False, num_epochs=1))
held_out_batches = held_out_batches[: 1 if SMALLEST else 16]
eval_step = step.make_eval_step(loss)


def remembers(params):
    """The held-out loss of pre-training, in nats a token."""
    return step.evaluate(eval_step, params, held_out_batches)["loss"]


print(f"{count(params):,} parameters, held-out loss before: {remembers(params):.3f}")
state, history = loop.fit(
    step.init_state(params, optimizer), step.make_train_step(loss, optimizer),
    batching.make_loader(rows["train"], 32), rng=jax.random.key(1), num_steps=STEPS, log_every=25)
pretrained = jax.device_get(state.params)
print(f"after: {remembers(pretrained):.3f}")

# %%
curve = {"training": ([h["step"] for h in history], [h["loss"] for h in history])}
Image(plots.curves("pretraining.png", curve, title="Next-word prediction"))

# %% [markdown]
# ## It writes

# %%
prompts = ["Return the", "This class", "If the file"]
texts = generate(model, pretrained, [tokenizer.encode(p) for p in prompts],
                 max_new_tokens=4 if SMALLEST else 30, do_sample=True, temperature=0.7, top_p=0.95,
                 eos_token_id=tokenizer.eos_id, rng=jax.random.key(2))
for text in texts:
    print("·", tokenizer.decode(text))

# %% [markdown]
# ## Where it looks
#
# A decoder sees what is behind it only: the causal mask.

# %%
ids = tokenizer.encode("Return the number of bytes that were written to the file.")
maps = jax.jit(model.apply)({"params": pretrained}, np.array([ids])).attention
Image(plots.attention("attention.png", {
    f"layer {i}": np.asarray(weights[0]).mean(0) for i, weights in enumerate(maps)},
    [tokenizer.decode([i]) or "·" for i in ids], title="Mean over heads"))

# %% [markdown]
# ## Fine-tuning: a copy, and a mask that says what trains
#
# The task: which of twelve parts of the standard library is a docstring about? The mask is a tree of
# booleans over the parameters. What it leaves out keeps its bits, has no optimizer state, and costs
# no gradient.

# %%
topics = data.load_dataset("python_docs/topics", validation="test")
chosen = data.subsample_balanced(topics.train, 4 if SMALLEST else 64)
classifier = build_model(config, len(topics.label_names), "classification")
write = classification.make_input_packer(classifier, tokenizer, length=48)
prepare = functools.partial(classification.prepare_classification, pack_input=write,
                            num_classes=len(topics.label_names))


def rows_of(examples):
    ids = tokenizer.encode_batch([e["text"] for e in examples])
    return [prepare({"tokens": t, "label": e["label"]}) for t, e in zip(ids, examples)]


tests = topics.validation[: 32 if SMALLEST else 384]
test_batches = list(batching.make_loader(rows_of(tests), 32, shuffle=False, num_epochs=1))
task_loss = functools.partial(classification.classification_loss, classifier.apply)
judge = step.make_eval_step(task_loss)
start = restore_partial(init_params(classifier, jax.random.key(3)), pretrained)[0]
print(select.describe(start, select.trainable_mask(start, "last_k:1")))

# %%
table = [f"| recipe | trains | accuracy on {len(tests)} unseen | pre-training loss became |",
         "|---|---|---|---|"]
for recipe, peak in (("head", 1e-2), ("last_k:1", 3e-3), ("full", 1.5e-3)):
    mask = select.trainable_mask(start, recipe)
    optimizer = optimizers.make_optimizer(optimizers.make_schedule("linear", peak, FINETUNE_STEPS), b2=0.99)
    fresh = jax.tree.map(jax.numpy.array, start)  # the step gives its input's memory away
    tuned, _ = loop.fit(
        step.init_state(fresh, optimizer, mask),
        step.make_train_step(task_loss, optimizer, trainable=mask),
        batching.make_loader(rows_of(chosen), 16), rng=jax.random.key(4),
        num_steps=FINETUNE_STEPS, quiet=True)
    accuracy = step.evaluate(judge, tuned.params, test_batches)["accuracy"]
    body = {name: x for name, x in tuned.params.items() if name != "classifier"}
    share = sum(x.size for x, m in zip(jax.tree.leaves(start), jax.tree.leaves(mask)) if m)
    table.append(f"| `{recipe}` | {100 * share / count(start):.2f} % | {100 * accuracy:.1f} % | "
                 f"{remembers(pretrained):.3f} → {remembers(body):.3f} |")
Markdown("\n".join(table))

# %% [markdown]
# The more parameters train, the better the task is learnt from so many labels, and the more of the
# old skill is lost. `bitfit`, `lora:8`, `adapter:16` and others are in between: put one into the
# loop above (deltas such as LoRA are made first, by `finetuning.peft.add_and_mask`).
