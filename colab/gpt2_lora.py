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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/transformer-jax/transformer_jax/blob/main/colab/gpt2_lora.ipynb)
#
# # GPT-2: generation, and a LoRA that changes its voice
#
# A published GPT-2 goes on with texts: greedy, drawn, by beams, word by word as it comes. Then a LoRA,
# a few percent of the parameters or less, teaches it the prose of Python's documentation. Base and
# delta stay apart: the same base still speaks as before.
#
# The output kept here was made without a network: it is of a GPT of 2.6 million parameters that had
# read novels for ten minutes on one CPU core, in GPT-2's format, in the place of GPT-2.

# %%
# What is needed, where it is missing; and the devices that are here.
import importlib.util

if importlib.util.find_spec("transformer_jax") is None:
    # %pip install -q "transformer_jax @ git+https://github.com/transformer-jax/transformer_jax"
    pass

from transformer_jax import distributed
from transformer_jax.data import packing

distributed.print_devices("gpu");

# %%
import functools
import os
import time

import jax
from IPython.display import Image, Markdown

from transformer_jax import load_pretrained
from transformer_jax.data import batching, sources
from transformer_jax.finetuning import adapter_io, peft, select
from transformer_jax.generation import generate
from transformer_jax.objectives import causal_lm
from transformer_jax.report import plots
from transformer_jax.train import loop, optimizers, step
from transformer_jax.tree import count

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"
MODEL = os.environ.get("MODEL", "openai-community/gpt2")
TEXT = os.environ.get("TEXT", "python_docs/documents")  # what the LoRA learns
PROMPT = os.environ.get("PROMPT", "The Transformer is")
STEPS, LENGTH, BATCH, NEW = (2, 16, 2, 4) if SMALLEST else (150, 64, 8, 40)

model, base, tokenizer = load_pretrained(MODEL)
print(f"{MODEL}: {count(base):,} parameters, {model.config.num_layers} layers of "
      f"{model.config.d_model}, {model.config.max_length} positions")

# %% [markdown]
# ## Four ways to go on

# %%
prompt = [tokenizer.encode(PROMPT)]
end = {"max_new_tokens": NEW, "eos_token_id": tokenizer.eos_id}
ways = {
    "greedy": {},
    "drawn, top-p 0.9": {"do_sample": True, "top_p": 0.9, "rng": jax.random.key(0)},
    "4 beams": {"num_beams": 4},
    "greedy, no 3 words twice": {"no_repeat_ngram_size": 3},
}
for name, options in list(ways.items())[: 1 if SMALLEST else None]:
    began = time.perf_counter()
    text = tokenizer.decode(generate(model, base, prompt, **end, **options)[0])
    print(f"[{name}, {time.perf_counter() - began:.1f} s with compilation] {text}\n")

# %% [markdown]
# As it comes: `streamer` is called with each word when it is there.

# %%
generate(model, base, prompt, **end, do_sample=True, temperature=0.8, rng=jax.random.key(1),
         streamer=lambda ids: print(tokenizer.decode(ids[:1]), end="", flush=True));

# %% [markdown]
# ## A LoRA

# %%
train, held_out = ((sources.load_source(TEXT, split) for split in ("train", "validation"))
                   if not sources.is_local(TEXT) else
                   (lambda texts: (texts[:-len(texts) // 10], texts[-len(texts) // 10:]))(
                       sources.load_text_files(TEXT)))
rows = [packing.PackedTokens(packing.tokenize_corpus(source, tokenizer, eos_id=tokenizer.eos_id),
                              LENGTH) for source in (train, held_out)]
params, mask = peft.add_and_mask(base, "lora:8:all", jax.random.key(2))
print(select.describe(params, mask))
loss = functools.partial(causal_lm.loss, model.apply)
judge = step.make_eval_step(loss)
tests = [batch for i, batch in enumerate(batching.make_loader(
    rows[1], BATCH, shuffle=False, num_epochs=1)) if i < (1 if SMALLEST else 24)]
before = step.evaluate(judge, base, tests)["loss"]

# %%
optimizer = optimizers.make_optimizer(
    optimizers.make_schedule("linear", 2e-3, STEPS, warmup_steps=STEPS // 10), weight_decay=0.0)
state, history = loop.fit(
    step.init_state(params, optimizer, mask),
    step.make_train_step(loss, optimizer, trainable=mask),
    batching.make_loader(rows[0], BATCH), rng=jax.random.key(3), num_steps=STEPS,
    log_every=max(STEPS // 20, 1))
after = step.evaluate(judge, state.params, tests)["loss"]
curve = {"training": ([h["step"] for h in history], [h["loss"] for h in history])}
Image(plots.curves("lora.png", curve, title=f"Held-out loss {before:.3f} before, {after:.3f} after"))

# %% [markdown]
# ## Two voices, one base

# %%
voices = {"base": base, "with the LoRA": peft.merge(state.params)}
table = ["| | goes on with |", "|---|---|"]
for name, p in voices.items():
    text = tokenizer.decode(generate(model, p, prompt, **end, do_sample=True, temperature=0.7,
                                     top_p=0.9, rng=jax.random.key(4))[0])
    table.append(f"| {name} | {text!r} |")
adapter_io.save_adapter("delta", state.params, mask, base, spec="lora:8:all")
size = sum(f.stat().st_size for f in os.scandir("delta")) / 1e6
table.append(f"| on disk | {size:.1f} MB beside {count(base) * 4 / 1e6:.0f} |")
Markdown("\n".join(table))
