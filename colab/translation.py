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
# Marian's translation models are encoder-decoder Transformers as in Vaswani et al. (2017),
# published for hundreds of language pairs. You will
#
# 1. load one and translate from German to English by beam search,
# 2. plot the cross-attention between a translation and its source,
# 3. fine-tune the model on image captions (Multi30k), and compare BLEU before and after.
#
# The stored output is from an offline run with a substitute for a published model: a small Marian
# model, trained for a few minutes on a CPU on 21,000 other captions.

# %%
# Install the package if it is missing, and print the available devices.
import importlib.util

if importlib.util.find_spec("transformer_jax") is None:
    # %pip install -q "transformer_jax[hf,scores] @ git+https://github.com/transformer-jax/transformer_jax"
    pass

from transformer_jax import distributed

distributed.print_devices("gpu");

# %%
import os

from IPython.display import Image, Markdown

from transformer_jax import evaluate, finetune, generation_options, load_pretrained, predict
from transformer_jax.data import load_pairs
from transformer_jax.recipes.sequence_to_sequence import plot_cross_attention

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"  # a few steps, for the tests
MODEL = os.environ.get("MODEL", "Helsinki-NLP/opus-mt-de-en")
DATA = os.environ.get("DATA", "hf:bentrevett/multi30k")  # or a folder: train.de, train.en, ...
VALIDATION = os.environ.get("VALIDATION", "validation")  # name of the split to evaluate on
PEAK_LR = float(os.environ.get("PEAK_LR", 5e-5))
TRAIN, TESTS, STEPS, MAX_LENGTH = (16, 4, 2, 8) if SMALLEST else (8000, 100, 200, 40)

model, params, tokenizer = load_pretrained(MODEL)
print(f"{MODEL}: {model.config.num_layers} layers of width {model.config.d_model}")
print("recommended options of generate:", generation_options(model))

# %% [markdown]
# ## 1. Translate
#
# `predict` tokenizes, batches texts of similar length, runs a beam search, and decodes.

# %%
base = (model, params, tokenizer)
lengths = {"max_length": 2 * MAX_LENGTH if SMALLEST else 64, "target_length": MAX_LENGTH}
sentences = ["Zwei Hunde spielen im Schnee.", "Eine Frau liest ein Buch in der Sonne.",
             "Ein Mann steht auf einer Leiter."]
translations = [p["text"] for p in predict(base, sentences, num_beams=4, **lengths)]
for source, target in zip(sentences, translations):
    print(f"{source}  →  {target}")

# %% [markdown]
# ## 2. Cross-attention
#
# Each row shows the attention weights over the source tokens when one token of the translation was
# predicted. In the last layer, the weights often align words with their translations.

# %%
plot_cross_attention("cross_attention.png", *base, sentences[0], translations[0])
Image("cross_attention.png")

# %% [markdown]
# ## 3. BLEU of the published model

# %%
train = load_pairs(DATA, "train", "de", "en")[:TRAIN]
tests = load_pairs(DATA, VALIDATION, "de", "en")[:TESTS]
options = {"metric": "bleu", "num_beams": 4, **lengths}
before = evaluate(base, tests, **options)
print(f"BLEU {before['bleu']:.1f} ({before['signature']})")

# %% [markdown]
# ## 4. Fine-tuning
#
# The data is a list of dicts with `source` and `target`. All parameters are trained. Each target
# token is predicted from the source and the reference tokens before it (teacher forcing). The curve
# is noisy because each point is the loss of one batch of texts of similar length, and long texts
# are harder.

# %%
result = finetune(base, train, validation=tests, task_type="seq2seq", trainable="full",
                  num_steps=STEPS, batch_size=8 if SMALLEST else 32, peak_lr=PEAK_LR,
                  out="runs/captions", **options)
Image("runs/captions/loss.png")

# %% [markdown]
# ## Results
#
# BLEU before and after, and the first translations of the fine-tuned model. On 100 captions, BLEU
# varies by a few points with the choice of captions; raise `TESTS` for results that you report.

# %%
rows = [f"| {test['source']} | {line['prediction']} | {test['target']} |"
        for test, line in list(zip(tests, result.predictions))[:6]]
Markdown(f"BLEU on {len(tests)} captions: {before['bleu']:.1f} before, "
         f"**{result.metrics['bleu']:.1f}** after {STEPS} steps\n\n"
         "| source | translation | reference |\n|---|---|---|\n" + "\n".join(rows))
