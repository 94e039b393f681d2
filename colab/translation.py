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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/transformer-jax/transformer_jax/blob/main/colab/translation.ipynb)
#
# # Translate with a published Marian model, and fine-tune it
#
# Marian's translation models are Transformers as Vaswani et al. described them, published for hundreds
# of pairs of languages. We load one, translate with beam search, look at where the decoder looks, then
# fine-tune it on captions of pictures and measure BLEU before and after.
#
# The output kept here was made without a network: it is of a model of Marian's form and format that
# had learnt from 21,000 other captions for a few minutes on one CPU core.

# %%
# What is needed, where it is missing; and the devices that are here.
import importlib.util

if importlib.util.find_spec("transformer_jax") is None:
    # %pip install -q "transformer_jax[hf,scores] @ git+https://github.com/transformer-jax/transformer_jax"
    pass

from transformer_jax import distributed

distributed.print_devices("gpu");

# %%
import functools
import os

import jax
import numpy as np
from IPython.display import Image, Markdown

from transformer_jax import load_pretrained, metrics
from transformer_jax.data import pairs
from transformer_jax.generation import generate, generation_options
from transformer_jax.objectives import seq2seq
from transformer_jax.report import plots
from transformer_jax.train import loop, optimizers, step
from transformer_jax.tree import count

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"
MODEL = os.environ.get("MODEL", "Helsinki-NLP/opus-mt-de-en")
DATA = os.environ.get("DATA", "hf:bentrevett/multi30k")  # or a folder with train.de, train.en, ...
HELD_OUT = os.environ.get("HELD_OUT", "validation")
TRAIN, TESTS, STEPS, NEW = (16, 4, 2, 4) if SMALLEST else (8000, 200, 200, 40)

model, params, tokenizer = load_pretrained(MODEL)
config = model.config
print(f"{MODEL}: {count(params):,} parameters, {config.num_layers} + "
      f"{config.num_decoder_layers or config.num_layers} layers of {config.d_model}")
print("its authors decode with", generation_options(config))

# %% [markdown]
# ## It translates

# %%
def translate(params, texts, num_beams=4, batch_size=50):
    """Texts of like length share batches, each filled up to one shape."""
    ids = [[*row[:62], config.eos_token_id] for row in tokenizer.encode_batch(list(texts))]
    order = np.argsort([len(row) for row in ids], kind="stable")
    size, written = min(batch_size, len(ids)), {}
    for k in range(0, len(order), size):
        members = [int(i) for i in order[k : k + size]]
        rows = [ids[i] for i in members] + [ids[members[-1]]] * (size - len(members))
        out = generate(model, params, rows, num_beams=num_beams, max_new_tokens=NEW)
        written |= {i: tokenizer.decode(row).strip() for i, row in zip(members, out)}
    return [written[i] for i in range(len(ids))]


sentences = ["Zwei Hunde spielen im Schnee.", "Eine Frau liest ein Buch in der Sonne.",
             "Ein Mann steht auf einer Leiter."]
for source, target in zip(sentences, translate(params, sentences)):
    print(f"{source}  →  {target}")

# %% [markdown]
# ## Where it looks
#
# Cross-attention of the last layer, mean over heads: each word that is written, and what it reads.

# %%
source = sentences[0]
target = translate(params, [source])[0]
read = [*tokenizer.encode(source), config.eos_token_id]
wrote = [*tokenizer.encode(target), config.eos_token_id]
out = jax.jit(model.apply)({"params": params}, np.array([read]),
                           np.array([[config.decoder_start_token_id, *wrote[:-1]]]))
words = [[tokenizer.decode([i], skip_special_tokens=False) for i in row] for row in (wrote, read)]
Image(plots.attention("cross_attention.png", {
    "last layer": np.asarray(out.cross_attention[-1][0]).mean(0)}, *words, title="Cross-attention"))

# %% [markdown]
# ## BLEU before

# %%
train = pairs.load_pairs(DATA, "train", "de", "en")
held_out = pairs.load_pairs(DATA, HELD_OUT, "de", "en")
rng = np.random.default_rng(0)
train = [train[i] for i in rng.permutation(len(train))[:TRAIN]]
tests = [held_out[i] for i in rng.permutation(len(held_out))[:TESTS]]
references = [pair["target"] for pair in tests]
before = metrics.bleu(translate(params, [pair["source"] for pair in tests]), references)
print(f"{before.score:.1f}  ({before.signature})")

# %% [markdown]
# ## Fine-tuning
#
# Pairs of like length share a batch; the target is predicted word by word, given the source and what
# was written before.

# %%
sides = {side: tokenizer.encode_batch([pair[side] for pair in train])
         for side in ("source", "target")}
prepare = functools.partial(seq2seq.prepare, start_id=config.decoder_start_token_id,
                            eos_id=config.eos_token_id, pad_id=config.pad_token_id)
batches = pairs.TokenBudgetBatches(
    [{"source": s, "target": t} for s, t in zip(*sides.values())], prepare, buckets=(16, 32, 64),
    tokens_per_batch=512 if SMALLEST else 1024)
loss = functools.partial(seq2seq.loss, model.apply, label_smoothing=0.1)
optimizer = optimizers.make_optimizer(
    optimizers.make_schedule("linear", float(os.environ.get("PEAK", 5e-5)), STEPS,
                        warmup_steps=STEPS // 10), weight_decay=0.0, b2=0.98)
start = jax.tree.map(jax.numpy.array, params)  # a copy, which the step may give away
state, history = loop.fit(
    step.init_state(start, optimizer), step.make_train_step(loss, optimizer), batches.loader(),
    rng=jax.random.key(0), num_steps=STEPS, log_every=max(STEPS // 20, 1))
curve = {"training": ([h["step"] for h in history], [h["nll"] for h in history])}
Image(plots.curves("loss.png", curve, title="Captions", ylabel="nats a token"))

# %% [markdown]
# ## BLEU after

# %%
written = translate(state.params, [pair["source"] for pair in tests])
after = metrics.bleu(written, references)
rows = [f"| {pair['source']} | {text} | {pair['target']} |"
        for pair, text in list(zip(tests, written))[:6]]
Markdown(f"BLEU {before.score:.1f} → **{after.score:.1f}**\n\n| source | written | reference |\n"
         "|---|---|---|\n" + "\n".join(rows))
