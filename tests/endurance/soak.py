"""Ten thousand steps of a character GPT with evaluation and checkpoints: does anything grow?

    python tests/endurance/soak.py

Memory is looked at with every row of history: what is resident, and what of it the allocator has
given out. After the first fifth, which warms up, the median of the last fifth may be at most 2 %
above that of the second, the median step at most 10 % slower, and nothing compiles. What is given
out tells a leak; what is resident also steps up, once, when two steps first happen to overlap at
their widest. Four layers of 128, context 64, batch 12, as in nanoGPT's CPU setting.
Hardware: 2 CPU cores take eight minutes.
"""

import argparse
import ctypes
import functools
import json
import statistics
import tempfile
from pathlib import Path

import jax
import numpy as np

from transformer_jax import distributed
from transformer_jax.data import batching, packing, sources, tokenizers
from transformer_jax.models import build_model, init_params, presets
from transformer_jax.objectives import causal_lm
from transformer_jax.train import loop, optimizers, step

KEYS = ("resident", "in_use", "seconds_per_step")


def resident() -> int:
    """Bytes of this process that are in memory now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmRSS; this needs Linux")


class _Malloc(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost"))


def in_use() -> int:
    """Bytes that the C library's allocator has given out (glibc 2.33 or newer)."""
    mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo2.restype = _Malloc
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def run(steps: int, every: int, folder: Path, **sizes) -> list[dict]:
    """Rows of history with "resident" and "in_use"."""
    documents = sources.load_source("python_docs/documents", "train")
    texts = [documents[i] for i in range(400)]
    tokenizer = tokenizers.train_chars([example["text"] for example in texts])
    corpus = packing.tokenize_corpus(texts, tokenizer, eos_id=None, one_sentence_per_line=False)
    shape = {"num_layers": 4, "d_model": 128, "num_heads": 4, "mlp_dim": 512, "max_length": 64,
             "vocab_size": tokenizer.vocab_size, "dropout_rate": 0.1} | sizes
    model = build_model(presets.gpt2(**shape))
    rows = packing.PackedTokens(corpus, 64)
    held_out = [rows.take(range(12)), rows.take(range(12, 24))]
    loss = functools.partial(causal_lm.loss, model.apply)
    optimizer = optimizers.make_optimizer(optimizers.make_schedule("cosine", 1e-3, steps, 10))
    eval_step, seen = step.make_eval_step(loss), []

    def look(row):
        if "seconds_per_step" in row:
            seen.append(row | {"resident": resident(), "in_use": in_use()})

    loop.fit(
        step.init_state(init_params(model, jax.random.key(0)), optimizer),
        step.make_train_step(loss, optimizer), batching.make_loader(rows, 12),
        rng=jax.random.key(1), num_steps=steps, log_every=every, quiet=True, on_log=look,
        eval_fn=lambda params: step.evaluate(eval_step, params, held_out), eval_every=5 * every,
        checkpoint_dir=folder, save_every=10 * every)
    return seen


def summary(rows: list[dict]) -> dict:
    """Of the second fifth of the rows and the last."""
    fifth = len(rows) // 5
    parts = {"second": rows[fifth : 2 * fifth], "last": rows[-fifth:]}
    found = {name: {key: statistics.median(row[key] for row in part)
                    for key in KEYS} for name, part in parts.items()}
    growth = {key: found["last"][key] / found["second"][key] - 1 for key in KEYS}
    compiled = rows[-1]["compilations"] - rows[fifth]["compilations"]
    return {"steps": int(rows[-1]["step"]), "resident_mib": found["last"]["resident"] / 2**20,
            "resident_growth": growth["resident"], "in_use_growth": growth["in_use"],
            "time_growth": growth["seconds_per_step"],
            "resident_mib_over_time": [round(row["resident"] / 2**20)
                                       for row in rows[:: max(len(rows) // 20, 1)]],
            "compilations": compiled, "loss": float(np.mean([r["loss"] for r in rows[-fifth:]]))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    distributed.configure_malloc()
    with tempfile.TemporaryDirectory() as place:
        steps = parser.parse_args().steps
        print(json.dumps(summary(run(steps, max(steps // 200, 1), Path(place)))), flush=True)
