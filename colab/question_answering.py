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
# # Extractive question answering: find the answer in a text
#
# You will fine-tune a published BERT on SQuAD 1.1 to find the answer to a question in a text (the
# *context*), highlight the predicted answers, and ask questions about your own text.
#
# A row is one input of the model: the tokens of a question and a context. Contexts that do not fit
# into one row are split into overlapping windows, and each answer is mapped back to characters of
# the context.
#
# Fine-tuned on all 87,599 questions, BERT-base reaches an F1 of 88.5 (Devlin et al. 2018, table 2).
# Here we train on a small part of them. The stored output is from a run of all-MiniLM-L6-v2, a
# sentence encoder with 22 million parameters, on a CPU: 1,600 questions and 100 steps of 16 rows of
# at most 112 tokens. On a GPU, raise `QUESTIONS`, `STEPS` and `MAX_LENGTH`.

# %%
# Install the package if it is missing, and print the available devices.
import importlib.util

if importlib.util.find_spec("transformer_jax") is None:
    # %pip install -q "transformer_jax[hf] @ git+https://github.com/transformer-jax/transformer_jax"
    pass

from transformer_jax import distributed

distributed.print_devices("gpu");

# %%
import html
import os

from IPython.display import HTML, Image, Markdown

from transformer_jax import data, finetune

SMALLEST = os.environ.get("TRANSFORMER_JAX_NOTEBOOK") == "smallest"  # a few steps, for the tests
MODEL = os.environ.get("MODEL", "google-bert/bert-base-uncased")
DATA = os.environ.get("DATA", "hf:squad")  # or "tfds:squad", or a folder: train.jsonl, dev.jsonl
PEAK_LR = float(os.environ.get("PEAK_LR", 5e-5))
QUESTIONS, TESTS, STEPS, MAX_LENGTH = (8, 4, 2, 48) if SMALLEST else (1600, 120, 100, 112)

# %% [markdown]
# ## 1. The data
#
# An example has a question, a context, and the text and character offset of each answer;
# `on_bad_rows="drop"` drops examples whose answer is not at its offset. To keep the run short, we
# train on short contexts, which usually fit into one row. Test contexts have any length.

# %%
squad = data.load_dataset(DATA, on_bad_rows="drop", limit=20 * QUESTIONS)
short = [example for example in squad.train if len(example["context"]) < 400]
squad = squad._replace(train=short[:QUESTIONS],
                       validation=data.subsample_balanced(squad.validation, total=TESTS))
example = squad.train[0]
answer = example["answers"][0]
print("question:", example["question"])
print("context:  ...", example["context"][max(answer["start"] - 60, 0) : answer["start"] + 80], "...")
print("answer:  ", answer)

# %% [markdown]
# ## 2. Fine-tuning
#
# The head has two logits per token, for the first and the last token of the answer. `stride` is the
# distance in tokens between the starts of consecutive windows.

# %%
result = finetune(MODEL, squad, trainable="full", num_steps=STEPS, batch_size=4 if SMALLEST else 16,
                  max_length=MAX_LENGTH, max_question_length=MAX_LENGTH // 3, stride=MAX_LENGTH // 2,
                  peak_lr=PEAK_LR, out="runs/squad")
Image("runs/squad/loss.png")

# %% [markdown]
# ## 3. Answers in their context
#
# Each prediction has the text of the answer and its character range [start, stop) in the context.


# %%
def highlight(question, context, start, stop, note=""):
    before, after = context[max(start - 120, 0) : start], context[stop : stop + 120]
    before, answer, after = map(html.escape, (before, context[start:stop], after))
    return (f"<p><b>{html.escape(question)}</b><br>… {before}<mark>{answer}</mark>{after} …"
            f"<br><small>{html.escape(note)}</small></p>")


HTML("".join(
    highlight(e["question"], e["context"], p["start"], p["stop"],
              f"correct answer: {e['answers'][0]['text']}")
    for e, p in list(zip(squad.validation, result.predictions))[:6]))

# %% [markdown]
# ## 4. Your own text
#
# `predict` takes pairs of a question and a context.

# %%
context = ("The Transformer was introduced in 2017 by eight researchers at Google. It replaced the "
           "recurrent networks that were used for machine translation by attention. BERT, "
           "published in 2018, is an encoder; GPT, published by OpenAI, is a decoder.")
questions = ["When was the Transformer introduced?", "Who published GPT?",
             "What did the Transformer replace?"]
answers = result.predict([(question, context) for question in questions])
HTML("".join(highlight(question, context, a["start"], a["stop"], f"probability {a['score']:.2f}")
             for question, a in zip(questions, answers)))

# %% [markdown]
# ## Results
#
# Exact match is the fraction of answers that equal one of the correct answers; F1 also gives partial
# credit for the words that an answer shares with a correct one.

# %%
metrics = result.metrics
Markdown("| training questions | steps | test questions | F1 | exact match |\n|---|---|---|---|---|\n"
         f"| {len(squad.train):,} | {STEPS} | {len(squad.validation)} | {metrics['f1']:.1f} % | "
         f"{metrics['exact_match']:.1f} % |")
