"""Bidirectional and causal models: GPT and BERT of equal size on the same tasks.

    python experiments/study.py bidirectional

Claims (Devlin et al. 2018, sections 1 and 5.1): a bidirectional model is better at classification
of texts and pairs of texts, and at prediction of a word in the middle of a text. A causal model can
continue a text; a bidirectional model is not trained for this.

Hardware and time: one core of an AMD EPYC, 23 minutes.

Result: the claims hold. Accuracy on a word in the middle: BERT 34.8 %, GPT 25.2 %, or 31.9 % if
GPT scores the whole text with each of 16 candidates. On the last word: GPT 25.3 %, BERT 14.2 %.
Whether B follows A, after fine-tuning: BERT 65.1 ± 0.2 %, GPT 52.1 ± 0.8 % (chance 50 %), but BERT
was also pre-trained on this task. Topics: no difference, BERT 70.1 ± 1.1 %, GPT 71.5 ± 1.7 % (three
seeds). BERT needs more steps (see also Devlin et al. 2018, appendix C.1): after 1,200 steps, it was
less accurate than GPT on all of these tasks (11.7 % in the middle), because GPT predicts every
token and BERT, in this study, three in ten.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from studies import small_models
from studies.figures import Bars, save_panels
from transformer_jax.data import packing, sources
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.pretrained import LoadedRun

FAMILIES = ("GPT", "BERT")


@dataclass(frozen=True, kw_only=True)
class Bidirectional:
    """Settings of the study.

    Attributes:
        out: folder for the figure and the results.
        window: number of tokens of a held-out text; one of them is predicted.
        test_windows: number of these texts.
        candidates: number of tokens that GPT proposes given the preceding tokens; it then ranks
            them by the likelihood of the whole text.
        protocol: settings of both models, their pre-training and their fine-tuning.
    """

    out: Path = Path("runs/bidirectional")
    window: int = 32
    test_windows: int = 1024
    candidates: int = 16
    protocol: small_models.ProtocolConfig = field(
        default_factory=lambda: small_models.ProtocolConfig(num_steps=4000))


SIZES = {
    "default": Bidirectional(),
    "large": Bidirectional(window=96, protocol=small_models.LARGE),
    "smallest": Bidirectional(
        window=8, test_windows=8, candidates=2, protocol=small_models.SMALLEST),
}


def held_out_windows(config: Bidirectional, tokenizer: Tokenizer) -> np.ndarray:
    """Returns windows [n, window] of the held-out texts, each from one document."""
    corpus = packing.tokenize_corpus(
        sources.load_source("python_docs/documents", "validation"), tokenizer)
    starts = [start for first, end in zip(corpus.document_starts, corpus.document_starts[1:])
              for start in range(int(first), int(end) - config.window + 1, config.window)]
    chosen = np.random.default_rng(config.protocol.seed).permutation(starts)
    return corpus.tokens[
        chosen[: config.test_windows, None] + np.arange(config.window)].astype(np.int32)


def predict_bert(bert: LoadedRun, windows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Returns the most likely token [n] at one masked position of each window."""
    tokenizer, n = bert.tokenizer, len(windows)
    masked = windows.copy()
    masked[np.arange(n), positions] = tokenizer.mask_id
    rows = np.concatenate([np.full((n, 1), tokenizer.cls_id), masked,
                           np.full((n, 1), tokenizer.sep_id)], axis=1)

    @jax.jit
    def predict(rows, positions):
        output = bert.model.apply({"params": bert.params}, rows,
                                  masked_positions=positions[:, None] + 1)  # after [CLS]
        return output.mlm_logits[:, 0].argmax(-1)

    return _in_batches(predict, rows.astype(np.int32), positions)


def predict_gpt(
    gpt: LoadedRun, windows: np.ndarray, positions: np.ndarray, candidates: int = 1
) -> np.ndarray:
    """Returns the most likely token [n] at a position of each window, given the tokens before it.

    If there are several candidates, returns the one that maximizes the likelihood of the window.
    """

    def logits_of(rows):
        return gpt.model.apply({"params": gpt.params}, rows).logits

    @jax.jit
    def predict(rows, positions):
        logits = jnp.take_along_axis(logits_of(rows), (positions - 1)[:, None, None], 1)[:, 0]
        _, tokens = jax.lax.top_k(logits, candidates)
        if candidates == 1:
            return tokens[:, 0]

        def log_likelihood(token):
            filled = rows.at[jnp.arange(len(rows)), positions].set(token)
            log_probs = jax.nn.log_softmax(logits_of(filled))
            return jnp.take_along_axis(log_probs[:, :-1], filled[:, 1:, None], -1).sum((1, 2))

        scores = jax.lax.map(log_likelihood, tokens.T)  # [candidates, n]
        return jnp.take_along_axis(tokens, scores.argmax(0)[:, None], 1)[:, 0]

    return _in_batches(predict, windows, positions)


def _in_batches(
    predict: Callable, rows: np.ndarray, positions: np.ndarray, batch_size: int = 128
) -> np.ndarray:
    """Calls `predict` on batches of equal size; drops rows that do not fill a batch."""
    batch_size = min(batch_size, len(rows))
    return np.concatenate([
        np.asarray(predict(rows[i : i + batch_size], positions[i : i + batch_size]))
        for i in range(0, len(rows) - batch_size + 1, batch_size)])


def word_prediction(config: Bidirectional, gpt: LoadedRun, bert: LoadedRun
                    ) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the accuracies by model, in percent, on a word in the middle and on the last word."""
    windows = held_out_windows(config, bert.tokenizer)
    n = len(windows)
    middle = np.random.default_rng(config.protocol.seed).integers(
        config.window // 4, 3 * config.window // 4, n)
    last = np.full(n, config.window - 1)

    def accuracy(tokens: np.ndarray, positions: np.ndarray) -> float:
        targets = windows[np.arange(n), positions][: len(tokens)]
        return 100 * float((tokens == targets).mean())

    in_the_middle = {
        "GPT": accuracy(predict_gpt(gpt, windows, middle), middle),
        "BERT": accuracy(predict_bert(bert, windows, middle), middle),
        rescored_label(config): accuracy(
            predict_gpt(gpt, windows, middle, config.candidates), middle)}
    at_the_end = {"GPT": accuracy(predict_gpt(gpt, windows, last), last),
                  "BERT": accuracy(predict_bert(bert, windows, last), last)}
    return in_the_middle, at_the_end


def rescored_label(config: Bidirectional) -> str:
    return f"GPT, best of {config.candidates} by the whole text"


def run(config: Bidirectional) -> dict[str, Any]:
    protocol = config.protocol
    models = {name: small_models.pretrain(protocol, name) for name in FAMILIES}
    in_the_middle, at_the_end = word_prediction(
        config, *(models[name].base for name in FAMILIES))
    print(f"accuracy in the middle {in_the_middle}, at the end {at_the_end}", flush=True)
    tasks = small_models.load_tasks(protocol)
    finetuned = {
        name: {task: small_models.finetune_accuracies(protocol, models[name], *arguments)
               for task, arguments in tasks.items()} for name in FAMILIES}
    print(finetuned, flush=True)
    chance = {task: small_models.majority_baseline(dataset)
              for task, (dataset, _) in tasks.items()}
    save_figure(config, in_the_middle, at_the_end, finetuned, chance)
    return {"held_out": {name: model.held_out for name, model in models.items()},
            "filling": in_the_middle, "continuation": at_the_end, "finetuned": finetuned,
            "chance": chance}


def save_figure(config: Bidirectional, in_the_middle: dict[str, float],
                at_the_end: dict[str, float], finetuned: dict[str, dict[str, list[float]]],
                chance: dict[str, float]) -> None:
    protocol = config.protocol
    colors = {"GPT": "C0", "BERT": "C1", rescored_label(config): "C9"}
    missing = float("nan")
    save_panels(config.out / "bidirectional.png", {
        "Prediction of one word": Bars(
            {name: [in_the_middle.get(name, missing), at_the_end.get(name, missing)]
             for name in colors},
            ["in the middle", "at the end"], format="{:.1f}", colors=colors),
        "Fine-tuning": Bars(
            {name: [np.mean(x) for x in accuracies.values()]
             for name, accuracies in finetuned.items()},
            [f"topic ({protocol.labels} examples)", f"B follows A ({protocol.pairs} pairs)"],
            {name: [np.std(x) for x in accuracies.values()]
             for name, accuracies in finetuned.items()},
            list(chance.values()), format="{:.1f}", colors=colors),
    }, title=f"GPT and BERT of equal size after {protocol.num_steps} steps on the same text")
