"""Reliability trial: memory and step time of 10,000 steps with evaluation and checkpoints.

    python tests/endurance/soak.py

The model is a character GPT of four layers of width 128, with context 64 and batch 12, as in
nanoGPT's CPU setting. Resident memory, and the memory that the C library's allocator has in use,
are recorded with every row of the history. The first fifth of the rows is warm-up. Between the
second fifth and the last, the median memory may grow by at most 2 % and the median step time by at
most 10 %, and nothing may be compiled.

Memory in use reveals a leak. Resident memory also increases once when two steps first overlap at
their peaks. Hardware: two CPU cores take eight minutes.
"""

import argparse
import ctypes
import functools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer_jax import distributed
from transformer_jax.data import batching, packing, sources, tokenizers
from transformer_jax.models import build_model, init_params, presets
from transformer_jax.objectives import causal_lm
from transformer_jax.train import Checkpointer, Evaluation, Logging, loop, optimizers, step

KEYS = ("resident", "in_use", "seconds_per_step")


def resident_memory() -> int:
    """Returns the resident memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmRSS; run this trial on Linux")


class _MallInfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost"))


def memory_in_use() -> int:
    """Returns the bytes that the C library's allocator has in use (glibc 2.33 or newer)."""
    mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo2.restype = _MallInfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def run(num_steps: int, log_every: int, folder: Path, **sizes: Any) -> list[dict[str, Any]]:
    """Trains, and returns the rows of the history with "resident" and "in_use" bytes.

    Args:
        num_steps: number of updates.
        log_every: updates between rows.
        folder: folder for checkpoints.
        sizes: replaced fields of the model config.
    """
    documents = sources.load_source("python_docs/documents", "train")
    texts = [documents[i] for i in range(400)]
    tokenizer = tokenizers.train_chars([example["text"] for example in texts])
    corpus = packing.tokenize_corpus(texts, tokenizer, eos_id=None, one_sentence_per_line=False)
    model = build_model(presets.gpt2(**{
        "num_layers": 4, "d_model": 128, "num_heads": 4, "mlp_dim": 512, "max_length": 64,
        "vocab_size": tokenizer.vocab_size, "dropout_rate": 0.1} | sizes))
    rows = packing.PackedTokens(corpus, 64)
    held_out = [rows.take(range(12)), rows.take(range(12, 24))]
    loss_fn = functools.partial(causal_lm.loss, model.apply)
    optimizer = optimizers.make_optimizer(
        optimizers.make_schedule("cosine", 1e-3, num_steps, 10))
    eval_step, history = step.make_eval_step(loss_fn), []

    def record_memory(row):
        if "seconds_per_step" in row:
            history.append(row | {"resident": resident_memory(), "in_use": memory_in_use()})

    loop.fit(
        step.init_state(init_params(model, jax.random.key(0)), optimizer),
        step.make_train_step(loss_fn, optimizer), batching.make_loader(rows, 12),
        rng=jax.random.key(1), num_steps=num_steps,
        evaluation=Evaluation(lambda params: step.evaluate(eval_step, params, held_out),
                              5 * log_every),
        checkpoint=Checkpointer(folder, save_every=10 * log_every),
        callbacks=[Logging(log_every), record_memory])
    return history


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the growth of memory and step time from the second fifth of the rows to the last."""
    fifth = len(rows) // 5
    second, last = (
        {key: statistics.median(row[key] for row in part) for key in KEYS}
        for part in (rows[fifth : 2 * fifth], rows[-fifth:]))
    growth = {key: last[key] / second[key] - 1 for key in KEYS}
    return {"steps": int(rows[-1]["step"]), "resident_mib": last["resident"] / 2**20,
            "resident_growth": growth["resident"], "in_use_growth": growth["in_use"],
            "time_growth": growth["seconds_per_step"],
            "resident_mib_over_time": [round(row["resident"] / 2**20)
                                       for row in rows[:: max(len(rows) // 20, 1)]],
            "compilations": rows[-1]["compilations"] - rows[fifth]["compilations"],
            "loss": float(np.mean([row["loss"] for row in rows[-fifth:]]))}


def main(num_steps: int) -> dict[str, Any]:
    """Runs the trial and prints its results as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        results = summarize(run(num_steps, max(num_steps // 200, 1), Path(folder)))
    print(json.dumps(results), flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    arguments = parser.parse_args()
    distributed.configure_malloc()
    main(arguments.steps)
