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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/transformer-jax/transformer_jax/blob/main/colab/question_answering.ipynb)
#
# # Question answering: spans of a text, exact to the character
#
# A published BERT learns to mark the answer to a question in a text (SQuAD 1.1). Texts that are longer
# than a row are read through overlapping windows, and every answer is mapped back to the characters it
# came from.
#
# Trained on all 87,599 questions a BERT-base has an F1 of 88.5 (Devlin et al. 2018, table 2); here we
# take a few minutes and some of the questions, and see how far that goes. The output kept here is of
# all-MiniLM-L6-v2, a sentence encoder of 22 million parameters, on one CPU core.

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
from IPython.display import HTML, Image, Markdown

from transformer_jax import data, load_pretrained, metrics
from transformer_jax.data import batching
from transformer_jax.objectives import classification, question_answering
from transformer_jax.report import plots
from transformer_jax.train import loop, optimizers, step
from transformer_jax.tree import count

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"
MODEL = os.environ.get("MODEL", "google-bert/bert-base-uncased")
DATA = os.environ.get("DATA", "hf:squad")  # or tfds:squad, or a folder with train and dev .jsonl
QUESTIONS, TESTS, STEPS, LENGTH, BATCH = (
    (8, 4, 2, 48, 4) if SMALLEST else (2600, 300, 160, 128, 16))

model, params, tokenizer = load_pretrained(MODEL, "question_answering")
print(f"{MODEL}: {count(params):,} parameters")

# %% [markdown]
# ## Questions, contexts and windows

# %%
squad = data.load_dataset(DATA, on_bad_rows="drop")
rng = np.random.default_rng(0)
train = [squad.train[i] for i in rng.permutation(len(squad.train))[:QUESTIONS]]
tests = [squad.validation[i] for i in rng.permutation(len(squad.validation))[:TESTS]]
example = train[0]
answer = example["answers"][0]
print(example["question"])
print("…", example["context"][max(answer["start"] - 60, 0) : answer["start"] + 80], "…")
print("answer:", answer)

# %%
cut = {"tokenizer": tokenizer, "length": LENGTH, "max_question_length": min(48, LENGTH // 3),
       "stride": LENGTH // 2}
windows = question_answering.make_windows(train, keep_windows_without_answer=False, strict=False, **cut)
test_windows = question_answering.make_windows([{**e, "answers": []} for e in tests], **cut)
print(f"{len(train):,} questions are {len(windows):,} windows of {LENGTH} tokens with an answer in "
      f"them; {len(tests)} others are {len(test_windows)}")
write = classification.make_input_packer(model, tokenizer, LENGTH)
rows = [question_answering.prepare(window, pack_input=write) for window in windows]

# %% [markdown]
# ## Training: all parameters, one pass

# %%
loss = functools.partial(question_answering.loss, model.apply)
optimizer = optimizers.make_optimizer(
    optimizers.make_schedule("linear", 2e-4 if "minilm" in MODEL else 5e-5, STEPS,
                        warmup_steps=STEPS // 10))
state, history = loop.fit(
    step.init_state(params, optimizer), step.make_train_step(loss, optimizer),
    batching.make_loader(rows, BATCH), rng=jax.random.key(0), num_steps=STEPS,
    log_every=max(STEPS // 20, 1))
curve = {"training": ([h["step"] for h in history], [h["loss"] for h in history])}
Image(plots.curves("loss.png", curve, title="Start and end of the answer"))

# %% [markdown]
# ## Its answers
#
# Each window gives its best spans; of all windows of a question the best wins, and is cut out of the
# context by its characters.

# %%
predict = jax.jit(functools.partial(question_answering.predict, model.apply))
test_rows = [question_answering.prepare(window, pack_input=write) for window in test_windows]
found = [jax.device_get(predict(state.params, batch)) for batch in batching.make_loader(
    test_rows, min(32, len(test_rows)), shuffle=False, num_epochs=1, drop_remainder=False)]
found = {name: np.concatenate([part[name] for part in found])[: len(test_rows)]
         for name in found[0]}
answers = question_answering.decode_answers(tests, test_windows, found)
scores = metrics.squad_scores([a.text for a in answers], [[g["text"] for g in e["answers"]]
                                                    for e in tests])
assert all(e["context"][a.start_char : a.end_char] == a.text for e, a in zip(tests, answers))

# %% [markdown]
# ## Some answers, in place

# %%
import html

shown = []
for example, a in list(zip(tests, answers))[:6]:
    before, after = (html.escape(x) for x in (example["context"][max(a.start_char - 120, 0) : a.start_char],
                                              example["context"][a.end_char : a.end_char + 120]))
    gold = html.escape(example["answers"][0]["text"])
    shown.append(f"<p><b>{html.escape(example['question'])}</b><br>… {before}<mark>"
                 f"{html.escape(a.text)}</mark>{after} …<br><small>annotated: {gold}</small></p>")
HTML("".join(shown))

# %% [markdown]
# ## How good is it?

# %%
Markdown("| trained on | scored on | F1 | exact match |\n|---|---|---|---|\n"
         f"| {len(train):,} questions, {STEPS} steps | {len(tests)} others | {scores['f1']:.1f} % | "
         f"{scores['exact_match']:.1f} % |")
