"""Bidirectional or not: GPT and BERT of equal size and data, each asked what the other is for.

    python experiments/study.py bidirectional

Claims (Devlin et al. 2018, sections 1 and 5.1): what reads in both directions understands better:
classes and pairs of texts, words in the middle of a text; what reads from left to right can go on
with a text, which the other was not trained for.

One core of an AMD EPYC: 23 minutes. It holds: BERT guesses a word in the middle in 34.8 %, GPT in
25.2 % (31.9 % if it may weigh 16 guesses by the whole text); the last word GPT in 25.3 %, BERT in
14.2 %; whether B follows A, fine-tuned, BERT has 65.1 ± 0.2 %, GPT 52.1 ± 0.8 % (chance 50), where
BERT had next sentences in its pre-training too; topics are even, 70.1 ± 1.1 and 71.5 ± 1.7 % (three
seeds). It takes time: after 1,200 steps BERT was behind in all of them (11.7 % in the middle), for
every token is a target to GPT, three in ten to BERT (Devlin et al. 2018, appendix C.1).
"""

from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from studies import systems
from studies.pictures import Bars, show
from transformer_jax.data import packing, sources

FAMILIES = ("GPT", "BERT")


@dataclass(frozen=True, kw_only=True)
class Bidirectional:
    """Attributes:
        window: tokens of a text from which one is hidden; test_windows: how many.
        candidates: of GPT's guesses from the left, how many it may weigh by the whole text.
    """

    out: Path = Path("runs/bidirectional")
    window: int = 32
    test_windows: int = 1024
    candidates: int = 16
    shape: systems.Shape = field(default_factory=lambda: systems.Shape(num_steps=4000))


def config() -> Bidirectional:
    return Bidirectional()


def large() -> Bidirectional:
    return Bidirectional(window=96, shape=systems.LARGE)


def smallest() -> Bidirectional:
    return Bidirectional(window=8, test_windows=8, candidates=2, shape=systems.SMALLEST)


def held_out_windows(c: Bidirectional, tokenizer) -> np.ndarray:
    """Pieces [n, window] of the held-out text, each within one document."""
    corpus = packing.tokenize_corpus(
        sources.load_source("python_docs/documents", "validation"), tokenizer)
    starts = [at for first, end in zip(corpus.document_starts, corpus.document_starts[1:])
              for at in range(int(first), int(end) - c.window + 1, c.window)]
    chosen = np.random.default_rng(c.shape.seed).permutation(starts)[: c.test_windows]
    return corpus.tokens[chosen[:, None] + np.arange(c.window)].astype(np.int32)


def guesses_of_bert(base, windows: np.ndarray, at: np.ndarray, seen: int) -> np.ndarray:
    """The likeliest token at place `at` of the first `seen` tokens, in its stead [MASK]."""
    t = base.tokenizer
    n = len(windows)
    hidden = windows[:, :seen].copy()
    hidden[np.arange(n), at] = t.mask_id
    rows = np.concatenate([np.full((n, 1), t.cls_id), hidden, np.full((n, 1), t.sep_id)], axis=1)

    @jax.jit
    def best(rows, at):
        return base.model.apply({"params": base.params}, rows,
                                masked_positions=at[:, None] + 1).mlm_logits[:, 0].argmax(-1)

    return _in_parts(best, rows.astype(np.int32), at)


def guesses_of_gpt(base, windows: np.ndarray, at: np.ndarray, candidates: int = 1) -> np.ndarray:
    """The likeliest token at `at` given those before it; of several candidates, the one with which
    the whole window is likeliest."""

    @jax.jit
    def best(rows, at):
        logits = base.model.apply({"params": base.params}, rows).logits
        here = jnp.take_along_axis(logits, (at - 1)[:, None, None], 1)[:, 0]
        _, tried = jax.lax.top_k(here, candidates)
        if candidates == 1:
            return tried[:, 0]

        def likelihood(token):
            filled = rows.at[jnp.arange(len(rows)), at].set(token)
            scores = jax.nn.log_softmax(base.model.apply({"params": base.params}, filled).logits)
            return jnp.take_along_axis(scores[:, :-1], filled[:, 1:, None], -1).sum((1, 2))

        found = jax.lax.map(likelihood, tried.T)  # [candidates, B]
        return jnp.take_along_axis(tried, found.argmax(0)[:, None], 1)[:, 0]

    return _in_parts(best, windows, at)


def _in_parts(run, rows: np.ndarray, at: np.ndarray, size: int = 128) -> np.ndarray:
    size = min(size, len(rows))
    return np.concatenate([np.asarray(run(rows[i : i + size], at[i : i + size]))
                           for i in range(0, len(rows) - size + 1, size)])


def run(c: Bidirectional) -> dict:
    s = c.shape
    trained = {kind: systems.pretrain(s, kind) for kind in FAMILIES}
    gpt, bert = (trained[kind].base for kind in FAMILIES)
    windows = held_out_windows(c, bert.tokenizer)
    n = len(windows)
    middle = np.random.default_rng(s.seed).integers(c.window // 4, 3 * c.window // 4, n)
    end = np.full(n, c.window - 1)

    def right(guesses: np.ndarray, at: np.ndarray) -> float:
        return 100 * float((guesses == windows[np.arange(n), at][: len(guesses)]).mean())

    weighed = f"GPT, best of {c.candidates} by the whole text"
    filling = {"GPT": right(guesses_of_gpt(gpt, windows, middle), middle),
               "BERT": right(guesses_of_bert(bert, windows, middle, c.window), middle),
               weighed: right(guesses_of_gpt(gpt, windows, middle, c.candidates), middle)}
    going_on = {"GPT": right(guesses_of_gpt(gpt, windows, end), end),
                "BERT": right(guesses_of_bert(bert, windows, end, c.window), end)}
    print(f"filling {filling}, going on {going_on}", flush=True)
    topics, pairs = systems.topics(s), systems.pairs(s)
    asked = {kind: {"topics": systems.ask(s, trained[kind], topics, s.labels),
                    "pairs": systems.ask(s, trained[kind], pairs, s.pairs)} for kind in FAMILIES}
    print(asked, flush=True)
    colors = {"GPT": "C0", "BERT": "C1", weighed: "C9"}
    nothing = float("nan")
    show(c.out / "bidirectional.png", {
        "One word of the text is hidden": Bars(
            {kind: [filling.get(kind, nothing), going_on.get(kind, nothing)] for kind in colors},
            ["in the middle", "at the end"], ylabel="guessed right (%)", format="{:.1f}",
            colors=colors),
        "Fine-tuned": Bars(
            {kind: [np.mean(asked[kind][task]) for task in ("topics", "pairs")]
             for kind in FAMILIES},
            [f"topic ({s.labels} labels)", f"B follows A ({s.pairs} pairs)"],
            {kind: [np.std(asked[kind][task]) for task in ("topics", "pairs")]
             for kind in FAMILIES},
            [systems.chance(topics), systems.chance(pairs)], format="{:.1f}", colors=colors),
    }, title=f"GPT and BERT of equal size after {s.num_steps} steps on the same text")
    return {"held_out": {kind: system.held_out for kind, system in trained.items()},
            "filling": filling, "continuation": going_on, "finetuned": asked,
            "chance": {"topics": systems.chance(topics), "pairs": systems.chance(pairs)}}
