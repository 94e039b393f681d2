"""A LoRA step here against one of PEFT on PyTorch: the same shapes, in turn, on one machine.

    python -m venv reference && reference/bin/pip install torch==2.13.0 "transformers==5.*" peft
    python experiments/finetune_peft.py --reference-python reference/bin/python

BERT-base's shape with random weights, classification of 8 rows of 128 tokens, float32, LoRA of rank
8 on query and value, dropout 0.1, AdamW. Two processes each prepare and warm up; then they take
turns, the other stopped (SIGSTOP), and tell their seconds and peak memory. Medians over rounds.
Hardware: 2 CPU cores and 4 GB of memory take about two minutes; Linux, for the peak.
"""

import json
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import interleave

WORKER = "--worker"


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    reference_python: the interpreter of an environment with torch, transformers and peft.
    recipe: full, which trains everything on both sides, or lora:R.
    rounds, per_round: turns of each side, and steps of a turn.
    threads: of torch; JAX takes every core.
    keep_freed_memory: ours by `distributed.configure_malloc`, as the other scripts run: fewer page faults
        for a higher peak, because a step's one large buffer may not fit where the last one was.
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
    threads: int = 2
    keep_freed_memory: bool = False


def ours(c: dict):
    """(a function that trains one step, until it is done; number of parameters that train)."""
    import functools

    import jax
    import numpy as np

    from transformer_jax import distributed, tree
    from transformer_jax.finetuning import peft, select
    from transformer_jax.models import BERT, init_params, presets
    from transformer_jax.objectives import classification
    from transformer_jax.train import optimizers, step

    if c["keep_freed_memory"]:  # before the first array
        distributed.configure_malloc()
    config = presets.bert_base(num_layers=c["layers"], d_model=c["width"],
                               num_heads=c["width"] // 64, mlp_dim=4 * c["width"])
    model = BERT(config, num_classes=2, task="classification")
    optimizer = optimizers.make_optimizer(1e-4)

    def params_of(key):
        return peft.add_peft_params(init_params(model, key), c["recipe"], key)

    mask = select.trainable_mask(jax.eval_shape(params_of, jax.random.key(0)), c["recipe"])
    state = jax.jit(lambda key: step.init_state(params_of(key), optimizer, mask))(
        jax.random.key(0))
    trained = tree.count(tree.partition(state.params, mask)[0])
    loss_fn = functools.partial(classification.classification_loss, model.apply)
    run = jax.jit(step.make_train_step(loss_fn, optimizer, mask), donate_argnums=0)
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

    return one_step, trained


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
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=1e-4, weight_decay=0.01, fused=True)
    tokens, labels = (torch.from_numpy(x).long() for x in batch(c, config.vocab_size))
    mask = torch.ones_like(tokens)

    def one_step():
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trains, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return one_step, sum(p.numel() for p in trains)


def batch(c: dict, vocab_size: int):
    import numpy as np

    rng = np.random.default_rng(0)
    tokens = rng.integers(5, vocab_size, (c["batch_size"], c["length"])).astype(np.int32)
    return tokens, rng.integers(0, 2, c["batch_size"]).astype(np.int32)


def worker(side: str, settings: str) -> None:
    """One side, in a process of its own."""
    c = json.loads(settings)
    one_step, trained = {"ours": ours, "theirs": theirs}[side](c)
    interleave.serve(one_step, c["per_round"], trained=trained)


def compare(c: Comparison) -> dict[str, interleave.Timings]:
    """The turns of each side.

    Raises:
        ValueError: a recipe that the other side has no counterpart of.
        RuntimeError: a side does not start, or ends early.
    """
    if not re.fullmatch(r"full|lora:[1-9]\d*", c.recipe):
        raise ValueError(f"recipe {c.recipe!r} is not compared; choose full, or a LoRA such as "
                         "lora:8")
    settings = json.dumps({"layers": c.layers, "width": c.width, "recipe": c.recipe,
                           "batch_size": c.batch_size, "length": c.length,
                           "per_round": c.per_round, "threads": c.threads,
                           "keep_freed_memory": c.keep_freed_memory})
    pythons = {"ours": sys.executable, "theirs": str(c.reference_python)}
    return interleave.run_interleaved(
        {side: [python, __file__, WORKER, side, settings] for side, python in pythons.items()},
        c.rounds)


def main(c: Comparison) -> dict:
    """The command."""
    import common

    began = time.perf_counter()
    sides = compare(c)
    ratios = interleave.ratios(sides["ours"], sides["theirs"])
    metrics = {
        **{side: {"trained": found.facts["trained"], "seconds_per_step": found.median,
                  "seconds": found.seconds, "peak_bytes": found.peak_bytes}
           for side, found in sides.items()},
        "time_ratio": statistics.median(ratios), "time_ratios": ratios,
        "memory_ratio": sides["ours"].peak_bytes / sides["theirs"].peak_bytes,
    }
    for side in sides:
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
