"""A LoRA step here against one of PEFT on PyTorch: the same shapes, in turn, on one machine.

    python -m venv reference && reference/bin/pip install torch==2.13.0 "transformers==5.*" peft
    python experiments/finetune_peft.py --reference-python reference/bin/python

BERT-base's shape with random weights, classification of 8 rows of 128 tokens, float32, LoRA of rank
8 on query and value, dropout 0.1, AdamW. Two processes each prepare and warm up; then they take
turns, the other waiting, and tell their seconds and peak memory. Medians over rounds. Hardware: 2
CPU cores take about five minutes.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

WORKER = "--worker"


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    reference_python: the interpreter of an environment with torch, transformers and peft.
    recipe: full trains everything on both sides.
    rounds, per_round: turns of each side, and steps of a turn.
    """

    reference_python: Path
    out: Path = Path("runs/peft")
    recipe: str = "lora:8"
    layers: int = 12
    width: int = 768
    batch_size: int = 8
    length: int = 128
    rounds: int = 7
    per_round: int = 2
    threads: int = field(default=2)


def ours(c: dict):
    """A function that trains one step, until it is done."""
    import functools

    import jax
    import numpy as np

    from transformer_jax import host, presets
    from transformer_jax.finetune import deltas
    from transformer_jax.models import BERT, init_params
    from transformer_jax.objectives import tasks
    from transformer_jax.train import optim, step

    host.keep_freed_memory()
    config = presets.bert_base(num_layers=c["layers"], d_model=c["width"],
                               num_heads=c["width"] // 64, mlp_dim=4 * c["width"])
    model = BERT(config, num_classes=2, task="classification")
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    params, mask = deltas.prepare(params, c["recipe"], jax.random.key(1))
    optimizer = optim.make_optimizer(1e-4)
    loss_fn = functools.partial(tasks.classification_loss, model.apply)
    run = jax.jit(step.make_train_step(loss_fn, optimizer, mask), donate_argnums=0)
    state = step.init_state(params, optimizer, mask)
    del params
    tokens, labels = batch(c, config.vocab_size)
    rows = jax.device_put({
        "tokens": tokens, "labels": labels, "segment_ids": np.zeros_like(tokens),
        "padding_mask": np.ones(tokens.shape, bool),
        "weights": np.ones(len(tokens), np.float32)})
    rng = jax.random.key(2)

    def one_step():
        nonlocal state
        state, metrics = run(state, rows, rng)
        jax.block_until_ready((state, metrics))

    return one_step


def theirs(c: dict):
    """The same by PEFT."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(c["threads"])
    config = transformers.BertConfig(
        num_hidden_layers=c["layers"], hidden_size=c["width"],
        num_attention_heads=c["width"] // 64, intermediate_size=4 * c["width"], num_labels=2)
    model = transformers.BertForSequenceClassification(config)
    if c["recipe"] != "full":
        rank = int(c["recipe"].removeprefix("lora:"))
        model = get_peft_model(model, LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["query", "value"], task_type="SEQ_CLS"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4,
                                  weight_decay=0.01)
    tokens, labels = (torch.from_numpy(x).long() for x in batch(c, config.vocab_size))
    mask = torch.ones_like(tokens)

    def one_step():
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return one_step


def batch(c: dict, vocab_size: int):
    import numpy as np

    rng = np.random.default_rng(0)
    tokens = rng.integers(5, vocab_size, (c["batch_size"], c["length"])).astype(np.int32)
    return tokens, rng.integers(0, 2, c["batch_size"]).astype(np.int32)


def worker(side: str, settings: str) -> None:
    """Prepares, warms up, and then takes a turn for each line on standard input."""
    c = json.loads(settings)
    one_step = {"ours": ours, "theirs": theirs}[side](c)
    for _ in range(2):
        one_step()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(c["per_round"]):
            one_step()
        print((time.perf_counter() - began) / c["per_round"], peak_memory(), flush=True)


def peak_memory() -> int:
    """Bytes that this process held at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM; this needs Linux")


def compare(c: Comparison) -> dict[str, list[tuple[float, int]]]:
    """(seconds a step, peak bytes) of each turn, by side."""
    settings = json.dumps({"layers": c.layers, "width": c.width, "recipe": c.recipe,
                           "batch_size": c.batch_size, "length": c.length,
                           "per_round": c.per_round, "threads": c.threads})
    pythons = {"ours": sys.executable, "theirs": str(c.reference_python)}
    workers, turns = {}, {side: [] for side in pythons}
    try:
        for side, python in pythons.items():  # one after the other: compiling is not timed
            workers[side] = subprocess.Popen(
                [python, __file__, WORKER, side, settings], text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE)
            answer = workers[side].stdout.readline().strip()
            if answer != "ready":
                raise RuntimeError(f"{side} did not start by {python} (it said {answer!r}); see "
                                   "its message above")
        for _ in range(c.rounds):
            for side, process in workers.items():
                process.stdin.write("go\n")
                process.stdin.flush()
                seconds, memory = process.stdout.readline().split()
                turns[side].append((float(seconds), int(memory)))
    finally:
        for process in workers.values():
            process.kill()
            process.communicate()
    return turns


def main(c: Comparison) -> dict:
    """The command."""
    import common

    began = time.perf_counter()
    turns = compare(c)
    ratios = [a / b for (a, _), (b, _) in zip(turns["ours"], turns["theirs"])]
    metrics = {
        **{side: {"seconds_per_step": statistics.median(s for s, _ in found),
                  "seconds": [s for s, _ in found], "peak_bytes": max(m for _, m in found)}
           for side, found in turns.items()},
        "time_ratio": statistics.median(ratios), "time_ratios": ratios,
        "memory_ratio": max(m for _, m in turns["ours"]) / max(m for _, m in turns["theirs"]),
    }
    for side in turns:
        print(f"{side}: {1000 * metrics[side]['seconds_per_step']:.0f} ms a step, peak "
              f"{metrics[side]['peak_bytes'] / 2**20:.0f} MiB")
    print(f"{c.recipe}: {metrics['time_ratio']:.2f} of PEFT's time (rounds: "
          + ", ".join(f"{r:.2f}" for r in ratios) + f"), {metrics['memory_ratio']:.2f} of its "
          "memory")
    return common.write_results(c.out, c, metrics, time.perf_counter() - began)


if __name__ == "__main__":
    if WORKER in sys.argv:
        worker(*sys.argv[2:])
    else:
        import tyro

        main(tyro.cli(Comparison, description=__doc__))
