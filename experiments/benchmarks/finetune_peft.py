"""A LoRA training step in this library and in PEFT on PyTorch, interleaved on one machine.

    python -m venv reference && reference/bin/pip install torch==2.13.0 "transformers==5.*" peft
    python experiments/benchmarks/finetune_peft.py --reference-python reference/bin/python

Both models have the shape of BERT-base and random parameters, and classify 8 rows of 128 tokens in
float32 with LoRA of rank 8 on query and value, dropout 0.1 and AdamW. Each runs in its own process.
The two are timed in interleaved rounds, and medians over rounds are reported.

Hardware: Linux; two CPU cores with 4 GB take about two minutes.
"""

import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import interleave

WORKER = "--worker"


@dataclass(frozen=True)
class ComparisonConfig:
    """Settings of the comparison.

    Attributes:
        reference_python: Python interpreter of an environment with torch, transformers and peft.
        out: folder for results.json.
        trainable: trainable spec, "lora:RANK" or "full", for both models.
        num_layers: layers of the model.
        d_model: width of the model, a multiple of 64, the width of a head.
        batch_size: rows of a batch.
        length: tokens of a row.
        rounds: number of rounds.
        steps_per_round: steps of each model in a round.
        threads: threads of PyTorch; JAX uses all cores.
        configure_malloc: run this library with `distributed.configure_malloc`, as its scripts do.
            Steps then have fewer page faults, but peak memory is higher, because the large buffer
            of a step may not fit into the memory that the previous step freed.
    """

    reference_python: Path
    out: Path = Path("runs/peft")
    trainable: str = "lora:8"
    num_layers: int = 12
    d_model: int = 768
    batch_size: int = 8
    length: int = 128
    rounds: int = 7
    steps_per_round: int = 2
    threads: int = 2
    configure_malloc: bool = False


def make_jax_step(options: dict[str, Any]) -> tuple[Callable[[], None], int]:
    """Returns a training step of this library, and the number of trainable parameters.

    The step returns when its computation has finished.
    """
    import functools

    import jax
    import numpy as np

    from transformer_jax import distributed, tree
    from transformer_jax.finetuning import peft, select
    from transformer_jax.models import BERT, init_params, presets
    from transformer_jax.objectives import classification
    from transformer_jax.train import optimizers, step

    if options["configure_malloc"]:  # before the first array is created
        distributed.configure_malloc()
    d_model, spec = options["d_model"], options["trainable"]
    config = presets.bert_base(num_layers=options["num_layers"], d_model=d_model,
                               num_heads=d_model // 64, mlp_dim=4 * d_model)
    model = BERT(config, num_classes=2, task="classification")
    optimizer = optimizers.make_optimizer(1e-4)

    def init(rng):
        return peft.add_peft_params(init_params(model, rng), spec, rng)

    mask = select.trainable_mask(jax.eval_shape(init, jax.random.key(0)), spec)
    state = jax.jit(lambda rng: step.init_state(init(rng), optimizer, mask))(jax.random.key(0))
    num_trainable = tree.count(tree.partition(state.params, mask)[0])
    loss_fn = functools.partial(classification.classification_loss, model.apply)
    train_step = jax.jit(step.make_train_step(loss_fn, optimizer, mask), donate_argnums=0)
    tokens, labels = random_batch(options, config.vocab_size)
    batch = jax.device_put({
        "tokens": tokens, "labels": labels, "segment_ids": np.zeros_like(tokens),
        "padding_mask": np.ones(tokens.shape, bool),
        "weights": np.ones(len(tokens), np.float32)})
    rng = jax.random.key(2)

    def run_step():
        nonlocal state
        state, metrics = train_step(state, batch, rng)
        jax.block_until_ready((state, metrics))

    return run_step, num_trainable


def make_torch_step(options: dict[str, Any]) -> tuple[Callable[[], None], int]:
    """Returns the same training step in PEFT on PyTorch, and the number of trainable parameters."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(options["threads"])
    d_model, spec = options["d_model"], options["trainable"]
    config = transformers.BertConfig(
        num_hidden_layers=options["num_layers"], hidden_size=d_model,
        num_attention_heads=d_model // 64, intermediate_size=4 * d_model, num_labels=2)
    model = transformers.BertForSequenceClassification(config)
    if spec != "full":
        rank = int(spec.removeprefix("lora:"))
        model = get_peft_model(model, LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["query", "value"], task_type="SEQ_CLS"))
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.01, fused=True)
    tokens, labels = (torch.from_numpy(x).long() for x in random_batch(options, config.vocab_size))
    mask = torch.ones_like(tokens)

    def run_step():
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run_step, sum(p.numel() for p in trainable)


def random_batch(options: dict[str, Any], vocab_size: int):
    """Returns random tokens `[B, T]` and labels `[B]`."""
    import numpy as np

    rng = np.random.default_rng(0)
    shape = (options["batch_size"], options["length"])
    tokens = rng.integers(5, vocab_size, shape).astype(np.int32)
    return tokens, rng.integers(0, 2, options["batch_size"]).astype(np.int32)


WORKERS = {"transformer_jax": make_jax_step, "peft": make_torch_step}


def run_worker(name: str, options_json: str) -> None:
    """Runs the worker of one library."""
    options = json.loads(options_json)
    run_step, num_trainable = WORKERS[name](options)
    interleave.serve(run_step, min_calls=options["steps_per_round"], trained=num_trainable)


def compare(config: ComparisonConfig) -> dict[str, interleave.Timings]:
    """Returns the timings of both libraries.

    Raises:
        ValueError: the trainable spec is not supported.
        OSError: a worker does not start, or exits early.
    """
    if not re.fullmatch(r"full|lora:[1-9]\d*", config.trainable):
        raise ValueError(f"unsupported trainable spec {config.trainable!r} for this comparison; "
                         "supported: full, and LoRA such as lora:8")
    names = ("num_layers", "d_model", "trainable", "batch_size", "length", "steps_per_round",
             "threads", "configure_malloc")
    options = json.dumps({name: getattr(config, name) for name in names})
    interpreters = {"transformer_jax": sys.executable, "peft": str(config.reference_python)}
    return interleave.run_interleaved(
        {name: [python, __file__, WORKER, name, options] for name, python in interpreters.items()},
        config.rounds)


def main(config: ComparisonConfig) -> dict[str, Any]:
    """Runs the comparison, prints it, and returns the content of results.json."""
    from transformer_jax.recipes.run_dir import write_results

    began = time.perf_counter()
    timings = compare(config)
    here, reference = (timings[name] for name in WORKERS)
    ratios = interleave.ratios(here, reference)
    metrics = {
        **{name: {"trained": found.info["trained"], "seconds_per_step": found.median,
                  "seconds": found.seconds, "peak_bytes": found.peak_bytes}
           for name, found in timings.items()},
        "time_ratio": statistics.median(ratios), "time_ratios": ratios,
        "memory_ratio": here.peak_bytes / reference.peak_bytes,
    }
    for name, found in timings.items():
        print(f"{name}: {1000 * found.median:.0f} ms per step, peak memory "
              f"{found.peak_bytes / 2**20:.0f} MiB")
    print(f"{config.trainable}: {metrics['time_ratio']:.2f} of PEFT's time (by round: "
          + ", ".join(f"{ratio:.2f}" for ratio in ratios)
          + f"), {metrics['memory_ratio']:.2f} of its memory")
    return write_results(config.out, config, metrics, time.perf_counter() - began)


if __name__ == "__main__":
    if WORKER in sys.argv:
        run_worker(*sys.argv[2:])
    else:
        import tyro

        from transformer_jax.cli.command import run_command

        sys.exit(run_command(main, parse=lambda: tyro.cli(ComparisonConfig, description=__doc__)))
