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
# # Quick start: pre-train, generate, fine-tune
#
# In a few minutes on a CPU, without downloading data or checkpoints, you will
#
# 1. pre-train a small GPT on the documentation of Python, which comes with the package,
# 2. generate text with it and plot its attention weights,
# 3. fine-tune copies of it on a labeled task, with all parameters or only some of them trainable,
# 4. compare accuracy, number of trained parameters, and forgetting of the pre-training task.

# %%
# Install the package if it is missing, and print the available devices.
import importlib.util

if importlib.util.find_spec("transformer_jax") is None:
    # %pip install -q "transformer_jax @ git+https://github.com/transformer-jax/transformer_jax"
    pass

from transformer_jax import distributed

distributed.print_devices();

# %%
import os
from pathlib import Path

import jax
import numpy as np
from IPython.display import Image, Markdown

from transformer_jax import finetune, generate, presets, pretrain
from transformer_jax.pretrained import load_run
from transformer_jax.recipes import OptimizerConfig, pretrain_config
from transformer_jax.report import plots

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"  # a few steps, for the tests
STEPS, FINETUNE_STEPS = (2, 2) if SMALLEST else (400, 100)

# %% [markdown]
# ## 1. Pre-training
#
# `pretrain` trains a model on plain text, here by next-token prediction. It tokenizes the text,
# trains, evaluates on held-out text, and saves checkpoints. The same call resumes an interrupted
# run. `presets` has the configs of published models; this GPT-2 has 2 layers of width 128.

# %%
model_config = presets.gpt2(
    num_layers=2, d_model=128, num_heads=4, mlp_dim=512, vocab_size=2048, max_length=64,
    dropout_rate=0.0, attention_dropout_rate=0.0, init_std=0.05)
pretrain(pretrain_config(
    "gpt2", model=model_config, data="python_docs/documents", out=Path("runs/gpt"), num_steps=STEPS,
    optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=STEPS // 20, b2=0.99),
    log_every=20, eval_every=100))
Image("runs/gpt/loss.png")

# %% [markdown]
# ## 2. Generation
#
# `generate` takes token ids and returns token ids. Its options for sampling, beam search and
# penalties are named as in Hugging Face Transformers.

# %%
model, params, tokenizer, _ = load_run("runs/gpt")
prompts = [tokenizer.encode(text) for text in ("Return the", "This class", "If the file")]
texts = generate(model, params, prompts, max_new_tokens=4 if SMALLEST else 30, do_sample=True,
                 temperature=0.7, top_p=0.95, eos_token_id=tokenizer.eos_id, rng=jax.random.key(2))
for text in texts:
    print("·", tokenizer.decode(text).replace("\n", " "))

# %% [markdown]
# ## 3. Attention
#
# A model is a pure function, `model.apply({"params": params}, tokens)`. With `output_attentions=True`,
# its output includes the attention weights of each layer. Weights above the diagonal are zero because
# the causal mask excludes later tokens.

# %%
ids = tokenizer.encode("Return the number of bytes that were written to the file.")
apply = jax.jit(lambda params, ids: model.apply({"params": params}, ids, output_attentions=True))
outputs = apply(params, np.array([ids]))
maps = {f"layer {i}": np.asarray(weights[0]).mean(0) for i, weights in enumerate(outputs.attention)}
Image(plots.attention("attention.png", maps, [tokenizer.decode([i]) or "·" for i in ids],
                      title="Attention weights, mean over heads"))

# %% [markdown]
# ## 4. Fine-tuning
#
# The task: given a docstring, predict which of twelve parts of the standard library it documents,
# with 64 labeled examples per part. `finetune` copies the parameters, adds a classifier, trains,
# and evaluates. `trainable` selects the trainable parameters; all others are frozen and have no
# gradient and no optimizer state:
#
# * `head`: only the new classifier,
# * `last_k:1`: the classifier and the last layer,
# * `full`: all parameters.
#
# With `retention_data`, the pre-training loss on held-out text is measured before and after
# fine-tuning. An increase is called *catastrophic forgetting*.

# %%
results = {}
for trainable, peak_lr in {"head": 1e-2, "last_k:1": 3e-3, "full": 1.5e-3}.items():
    results[trainable] = finetune(
        "runs/gpt", "python_docs/topics", trainable=trainable, peak_lr=peak_lr,
        labels_per_class=4 if SMALLEST else 64, num_steps=FINETUNE_STEPS, max_length=48,
        retention_data="python_docs/documents")

# %% [markdown]
# The result contains the fine-tuned model; its method `predict` classifies new texts:

# %%
result = results["full"]
for text in ("Send an e-mail message over an encrypted connection.",
             "Wait until another thread releases the lock.",
             "Return the square root of the argument."):
    [prediction] = result.predict([text])
    print(f"{prediction['label']} ({prediction['score']:.2f}): {text}")

# %% [markdown]
# The confusion matrix shows which parts of the library the model confuses with each other.

# %%
Image(plots.confusion("confusion.png", result.metrics["confusion"], result.label_names,
                      title="Fine-tuned on 12 topics, all parameters"))

# %% [markdown]
# ## 5. Results
#
# The more parameters are trained, the higher the accuracy, and the more of the pre-training task is
# forgotten. Other values of `trainable`, such as `bitfit`, `lora:8` and `adapter:16`, are
# trade-offs between the two; to try one, add it to the loop above.

# %%
rows = [f"| `{trainable}` | {100 * m['share_trained']:.2f} % | {100 * m['accuracy']:.1f} % | "
        f"{m['held_out_before']:.3f} | {m['held_out_after']:.3f} |"
        for trainable, m in ((name, result.metrics) for name, result in results.items())]
Markdown("\n".join([
    "| trainable | trained parameters | test accuracy | pre-training loss before (nats) | after |",
    "|---|---|---|---|---|", *rows]))
