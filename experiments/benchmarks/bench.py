"""Benchmarks of training, fine-tuning and decoding on the local devices.

    python experiments/benchmarks/bench.py                       # all cases but the large ones
    python experiments/benchmarks/bench.py --cases gpt2 gpt2_decode_1 --rounds 10
    python experiments/benchmarks/bench.py --cases gpt2 --dtype bfloat16 --dropout-rate 0.1
    python experiments/benchmarks/bench.py --cases gpt2_32x1024 --dtype bfloat16   # accelerators

Parameters are random. Each case prints one line of JSON: compilation time, median step time, tokens
per second, peak memory, and the number of compilations after the second call, which should be 0.
"mfu" is the model FLOPs utilization of training, relative to the measured rate of a large matrix
product. "read_share" is, for decoding, the rate at which parameters are read, as a fraction of the
measured memory bandwidth. Both reference rates are measured just before the case. Each case runs in
its own process, so that its peak memory is measured separately.
"""

import functools
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from transformer_jax import distributed, tree
from transformer_jax.cli.command import run_command
from transformer_jax.errors import did_you_mean
from transformer_jax.finetuning import frozen, peft
from transformer_jax.generation import generate, transpose_kernels_for_decoding
from transformer_jax.models import Config, build_model, init_params, presets
from transformer_jax.objectives import classification
from transformer_jax.planner import chips, plan
from transformer_jax.train import optimizers, step
from transformer_jax.train.step import CompiledStep

CHARACTER_GPT = {"vocab_size": 65, "norm_first": True}


class Case(NamedTuple):
    """A model preset and its workload, per batch.

    `work` is "train", "decode" or a trainable spec such as "lora:8". `length` counts the tokens of
    a row or prompt, `target_length` those of a target or the new ones. `changes` replaces fields of
    the preset. Short steps are dispatched `steps_per_call` at a time on a CPU, as in `train.loop`.
    """

    preset: str
    batch_size: int
    length: int
    work: str = "train"
    target_length: int = 0
    changes: Mapping[str, Any] = MappingProxyType({})
    steps_per_call: int = 1


CASES = {
    "gpt2": Case("gpt2", 2, 256),
    "bert_base": Case("bert_base", 4, 128),
    "bart_base": Case("bart_base", 2, 128, target_length=64),
    "transformer_base": Case("transformer_base", 8, 64, target_length=64),
    "char_gpt_4x128": Case("gpt2", 12, 64, steps_per_call=10, changes=CHARACTER_GPT | {
        "num_layers": 4, "d_model": 128, "num_heads": 4, "mlp_dim": 512, "max_length": 64}),
    "char_gpt_6x384": Case("gpt2", 8, 256, changes=CHARACTER_GPT | {
        "num_layers": 6, "d_model": 384, "num_heads": 6, "mlp_dim": 1536, "max_length": 256}),
    "gpt2_decode_1": Case("gpt2", 1, 32, "decode", 64),
    "gpt2_decode_8": Case("gpt2", 8, 32, "decode", 64),
    "bart_base_decode_1": Case(
        "bart_base", 1, 128, "decode", 64, changes={"decoder_start_token_id": 2}),
    **{f"bert_base_{spec.replace(':', '_')}": Case("bert_base", 8, 128, spec)
       for spec in ("full", "head", "lora:8")},
}
LARGE_CASES = {
    "gpt2_32x1024": Case("gpt2", 32, 1024),
    "bert_base_64x512": Case("bert_base", 64, 512),
    "bart_base_32x512": Case("bart_base", 32, 512, target_length=512),
}
"""Cases for accelerators, of the size of a pre-training step."""
CASES |= LARGE_CASES


@dataclass(frozen=True)
class BenchConfig:
    """Settings of the benchmark.

    Attributes:
        cases: names in `CASES`; if empty, all but the large ones.
        rounds: number of timed calls of each case.
        dtype: dtype of the computation.
        dropout_rate: dropout rate of activations and attention weights in training.
        weights: dtype in which parameters are stored for decoding: "float32", "bfloat16" or "int8".
        in_process: run the cases in this process instead of one process each.
    """

    cases: tuple[str, ...] = ()
    rounds: int = 7
    dtype: str = "float32"
    dropout_rate: float = 0.0
    weights: str = "float32"
    in_process: bool = False


class Workload(NamedTuple):
    """A case that is ready to be timed: `run` does `units` units of work and waits for them.

    Per unit: tokens, FLOPs of the model's matrix products (0 if not counted), and, for decoding,
    the minimum number of bytes of parameters to read.
    """

    run: Callable[[], object]
    tokens: int
    flops: float = 0.0
    bytes_read: float = 0.0
    units: int = 1


def make_workload(case: Case, config: BenchConfig) -> Workload:
    """Returns the workload of a case, with random parameters and data."""
    make = make_decoding if case.work == "decode" else make_training
    return make(case, config)


def make_training(case: Case, config: BenchConfig) -> Workload:
    """Returns complete training steps: forward and backward pass, clipping, AdamW, donated state.

    On an accelerator, and on a CPU if the steps are short, several steps are dispatched before
    waiting for the first, as in `train.loop`.
    """
    model_config = make_model_config(case, config)
    spec = None if case.work == "train" else case.work
    model = build_model(model_config, 2, "classification") if spec else build_model(model_config)
    params, mask = jax.jit(functools.partial(init_params, model))(jax.random.key(0)), None
    if spec:
        params, mask = peft.add_and_mask(params, spec, jax.random.key(1))
    optimizer = optimizers.make_optimizer(1e-4)
    loss = classification.classification_loss if spec else plan.pretraining_loss(model_config)
    plan_config = plan.PlanConfig(model_config, {}, case.batch_size, case.length)
    batch = _random_batch(case, plan.abstract_batch(plan_config), model_config.vocab_size)
    state = step.init_state(params, optimizer, mask)
    del params
    train_step = CompiledStep(
        step.make_train_step(functools.partial(loss, model.apply), optimizer, mask), state, None)
    rng = jax.random.key(2) if config.dropout_rate else None
    num_steps = case.steps_per_call if jax.default_backend() == "cpu" else 10
    batch = jax.device_put(batch)

    def run():
        nonlocal state
        for _ in range(num_steps):
            state, metrics = train_step(state, batch, rng)
        return jax.block_until_ready((state, metrics))[1]["loss"]

    flops = 0.0 if spec or case.target_length else plan.model_flops(plan_config)
    tokens = case.batch_size * (case.length + case.target_length)
    return Workload(run, tokens, flops, units=num_steps)


def make_decoding(case: Case, config: BenchConfig) -> Workload:
    """Returns greedy decoding of a batch of prompts, with a fixed number of new tokens."""
    model_config = make_model_config(case, config)
    model = build_model(model_config)
    params = _random_params(
        jax.eval_shape(functools.partial(init_params, model), jax.random.key(0)))
    prompts = np.random.default_rng(0).integers(
        4, model_config.vocab_size, (case.batch_size, case.length))
    # Parameters that are read for each new token. The encoder, and the projections of its output
    # to keys and values, are computed once for each prompt.
    num_weights = sum(
        leaf.size for path, leaf in tree.flatten_paths(params).items()
        if not re.search(r"^encoder|position_embed|cross_attention/(key|value)", path))
    all_frozen = jax.tree.map(lambda x: False, params)
    params, _ = frozen.quantize_frozen(params, all_frozen, config.weights)
    # Not timed: an application that generates many texts transposes the kernels once.
    params = transpose_kernels_for_decoding(model, params, donate=True)
    run = functools.partial(
        generate, model, params, prompts.tolist(), max_new_tokens=case.target_length,
        min_new_tokens=case.target_length)
    itemsize = 1 if config.weights == "int8" else np.dtype(model_config.compute_dtype).itemsize
    return Workload(run, case.batch_size * case.target_length,
                    bytes_read=num_weights * itemsize * case.target_length)


def _random_params(shapes: dict) -> dict:
    """Returns random parameters, one leaf at a time: one program for all needs too much memory."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / 50), shapes)


def make_model_config(case: Case, config: BenchConfig) -> Config:
    """Returns the model config of a case."""
    return presets.get(
        case.preset, **case.changes, dtype=config.dtype, dropout_rate=config.dropout_rate,
        attention_dropout_rate=config.dropout_rate)


def _random_batch(case: Case, shapes: dict, vocab_size: int) -> dict[str, np.ndarray]:
    """Returns a batch of random ids, in which all weights are 1."""
    rng = np.random.default_rng(0)
    is_finetuning = case.work != "train"
    if is_finetuning:
        shapes = {name: shapes[name] for name in ("tokens", "segment_ids", "padding_mask")}
    batch = {}
    for name, leaf in shapes.items():
        shape = list(leaf.shape)
        if case.target_length and name in ("decoder_tokens", "targets", "weights"):
            shape[1] = case.target_length
        limit = {"segment_ids": 2, "nsp_labels": 2, "masked_positions": case.length,
                 "document_ids": 2}.get(name, vocab_size)
        value = rng.integers(0, limit, shape) if leaf.dtype == jnp.int32 else np.ones(shape)
        batch[name] = value.astype(leaf.dtype)
    if "positions" in batch:
        batch["positions"] = np.broadcast_to(np.arange(case.length, dtype=np.int32),
                                             batch["positions"].shape)
        batch["document_ids"] = np.ones_like(batch["tokens"])
    if is_finetuning:
        batch |= {"labels": rng.integers(0, 2, case.batch_size).astype(np.int32),
                  "weights": np.ones(case.batch_size, np.float32)}
    return batch


def time_case(name: str, config: BenchConfig) -> dict[str, Any]:
    """Times one case in this process and returns its measurements."""
    case = CASES[name]
    peak_flops = chips.matmul_flops_per_second(config.dtype)
    bandwidth = chips.memory_bandwidth()
    with step.CompilationCounter() as compilations:
        workload = make_workload(case, config)
        seconds_before = compilations.seconds
        workload.run()
        compile_seconds = compilations.seconds - seconds_before
        workload.run()
        count_before = compilations.count
        times = []
        for _ in range(config.rounds):
            began = time.perf_counter()
            workload.run()
            times.append((time.perf_counter() - began) / workload.units)
        recompilations = compilations.count - count_before
    median = statistics.median(times)
    utilization = {"mfu": workload.flops / median / peak_flops,
                   "read_share": workload.bytes_read / median / bandwidth}
    return {
        "case": name, **case._asdict(), "changes": dict(case.changes), "dtype": config.dtype,
        "dropout_rate": config.dropout_rate, "weights": config.weights,
        "compile_seconds": round(compile_seconds, 2), "median_seconds": round(median, 5),
        "least_seconds": round(min(times), 5), "rounds": config.rounds,
        "tokens_per_second": round(workload.tokens / median, 1),
        **{key: round(value, 3) for key, value in utilization.items() if value},
        "matmul_gflops": round(peak_flops / 1e9, 1), "read_gigabytes": round(bandwidth / 1e9, 1),
        "peak_memory_mib": round((step.peak_memory() or 0) / 2**20),
        "compilations_after_second": recompilations, "device": jax.devices()[0].device_kind,
        "machine": platform.machine(), "python": platform.python_version(),
        "versions": {package: version(package) for package in ("jax", "jaxlib", "flax")}}


def main(config: BenchConfig) -> list[dict[str, Any]]:
    """Times the cases, prints one line of JSON for each, and returns their measurements."""
    for name in config.cases:
        if name not in CASES:
            raise ValueError(f"unknown case {name!r}; {did_you_mean(name, CASES)}")
    results = []
    for name in config.cases or [name for name in CASES if name not in LARGE_CASES]:
        if config.in_process:
            if distributed.platform_is_cpu():
                distributed.configure_malloc()
            results.append(time_case(name, config))
            print(json.dumps(results[-1]), flush=True)
            continue
        command = [sys.executable, __file__, "--in-process", "--cases", name]
        command += [f"--{field.replace('_', '-')}={getattr(config, field)}"
                    for field in ("rounds", "dtype", "dropout_rate", "weights")]
        completed = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if completed.returncode:
            sys.exit(completed.returncode)  # the process has printed its error
        results.append(json.loads(completed.stdout.splitlines()[-1]))
        print(completed.stdout, end="", flush=True)
    return results


if __name__ == "__main__":
    sys.exit(run_command(main, parse=lambda: tyro.cli(BenchConfig, description=__doc__)))
