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
# # GPT-2: text generation, and a LoRA adapter
#
# You will
#
# 1. generate text with a published GPT-2: greedy decoding, sampling, beam search, and streaming,
# 2. fine-tune it with LoRA to complete prompts: given a topic of Python's standard library, generate
#    a docstring,
# 3. compare the generated text and the perplexity of the base model and the fine-tuned model,
# 4. save the adapter, a small file that is used together with the unchanged base model.
#
# `MODEL` is the name of any GPT-2 on the Hugging Face Hub, or a folder. The stored output is
# from an offline run with a substitute for GPT-2: a GPT with 2.1 million parameters in GPT-2's
# format, pre-trained on novels for a few minutes on a CPU.

# %%
# Install the package if it is missing, and print the available devices.
import importlib.util

if importlib.util.find_spec("transformer_jax") is None:
    # %pip install -q "transformer_jax[scores] @ git+https://github.com/transformer-jax/transformer_jax"
    pass

from transformer_jax import distributed

distributed.print_devices("gpu");

# %%
import os
from pathlib import Path

import jax
from IPython.display import Image, Markdown

from transformer_jax import data, evaluate, finetune, generate, load_pretrained
from transformer_jax.finetuning import peft

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"  # a few steps, for the tests
MODEL = os.environ.get("MODEL", "openai-community/gpt2")
PROMPT = os.environ.get("PROMPT", "The Transformer is")
PEAK_LR = float(os.environ.get("PEAK_LR", 1e-3))
EXAMPLES, STEPS, NEW_TOKENS = (16, 2, 4) if SMALLEST else (2000, 300, 40)

model, base_params, tokenizer = load_pretrained(MODEL)
print(f"{MODEL}: {model.config.num_layers} layers of width {model.config.d_model}, "
      f"{model.config.max_length} positions")

# %% [markdown]
# ## 1. Decoding methods
#
# The options of `generate` are named as in Hugging Face Transformers. Greedy decoding and beam
# search tend to produce repetitive text. Sampling from the most probable tokens (`top_p`) or
# forbidding repeated trigrams avoids this.

# %%
prompt = [tokenizer.encode(PROMPT)]
common = {"max_new_tokens": NEW_TOKENS, "eos_token_id": tokenizer.eos_id}
methods = {
    "greedy": {},
    "greedy, no repeated trigrams": {"no_repeat_ngram_size": 3},
    "sampling, top-p 0.9": {"do_sample": True, "top_p": 0.9, "rng": jax.random.key(0)},
    "beam search, 4 beams": {"num_beams": 4},
}
for name, options in list(methods.items())[: 1 if SMALLEST else None]:
    [ids] = generate(model, base_params, prompt, **common, **options)
    print(f"[{name}] {tokenizer.decode(ids)}\n")

# %% [markdown]
# `streamer` is a function that is called with each new token as soon as it is generated.

# %%
generate(model, base_params, prompt, **common, do_sample=True, temperature=0.8,
         rng=jax.random.key(1),
         streamer=lambda ids: print(tokenizer.decode(ids), end="", flush=True));

# %% [markdown]
# ## 2. Prompts and completions
#
# The training data is a list of dicts with a `source` (the prompt) and a `target` (the completion).
# The loss is computed on the completion only. To use your own data, replace the list.

# %%
topics = data.load_dataset("python_docs/topics", validation="test")
pairs, held_out = ([{"source": topics.label_names[e["label"]], "target": e["text"]} for e in split]
                   for split in (topics.train, topics.validation))
for pair in pairs[:3]:
    print(f"{pair['source']}: {pair['target'][:80]!r} ...")

# %% [markdown]
# ## 3. Fine-tuning with LoRA
#
# `lora:8:all` adds a trainable update of rank 8 to the kernel of every linear layer. After training,
# `finetune` generates completions for the validation examples and scores them with ROUGE. The score
# is low because a topic has many possible docstrings. The curve is noisy because each point is the
# loss of one batch, and batches of short and of long texts alternate.

# %%
result = finetune(
    (model, base_params, tokenizer), pairs, validation=held_out[: 4 if SMALLEST else 32],
    task_type="seq2seq", trainable="lora:8:all", examples=EXAMPLES, num_steps=STEPS, peak_lr=PEAK_LR,
    max_length=48 if SMALLEST else 96, target_length=8 if SMALLEST else 64, num_beams=1,
    out="runs/lora")
Image("runs/lora/loss.png")

# %% [markdown]
# ## 4. Base model and fine-tuned model
#
# The base parameters are unchanged. `peft.merge` adds the LoRA updates to the kernels, so that
# generation is as fast as with the base model.

# %%
merged = peft.merge(result.params)
# In the training rows, the end-of-text token separates the prompt from the completion.
prompt = [[*tokenizer.encode("email"), tokenizer.eos_id]]
for name, params in {"base model": base_params, "fine-tuned": merged}.items():
    [ids] = generate(model, params, prompt, **common, do_sample=True, temperature=0.7, top_p=0.9,
                     rng=jax.random.key(4))
    print(f"[{name}] {tokenizer.decode(ids[len(prompt[0]):])}\n")

# %% [markdown]
# `predict` takes prompts and returns completions, here with beam search.

# %%
sources = list(topics.label_names[:4])
for source, prediction in zip(sources, result.predict(sources, num_beams=4)):
    print(f"{source}: {prediction['text']}")

# %% [markdown]
# ## Results
#
# For a language model, `evaluate` returns the loss and perplexity on any text, here on docstrings
# that were not used for training.

# %%
texts = [pair["target"] for pair in held_out]
num_rows = 32 if SMALLEST else 128
before, after = (evaluate((model, params, tokenizer), texts, num_rows=num_rows)
                 for params in (base_params, merged))
adapter_bytes = sum(f.stat().st_size for f in Path("runs/lora/adapter").rglob("*") if f.is_file())
base_bytes = sum(x.nbytes for x in jax.tree.leaves(base_params))
Markdown(f"""
| | base model | with LoRA |
|---|---|---|
| loss on held-out docstrings (nats) | {before["loss"]:.3f} | {after["loss"]:.3f} |
| perplexity | {before["perplexity"]:.1f} | {after["perplexity"]:.1f} |
| trained parameters | | {result.metrics["trained"]:,} ({100 * result.metrics["share_trained"]:.2f} %) |
| size | {base_bytes / 1e6:.1f} MB | {adapter_bytes / 1e6:.1f} MB more |
""")
