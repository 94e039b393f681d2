"""How fast a training step, a fine-tuning step and decoding are here, as one line of JSON each.

    python experiments/bench.py                                  # all cases
    python experiments/bench.py --cases gpt2 gpt2_decode_1 --rounds 10
    python experiments/bench.py --cases gpt2 --dtype bfloat16 --dropout-rate 0.1
    python experiments/bench.py --cases gpt2_32x1024 --dtype bfloat16    # on an accelerator

Parameters are random. A line has compile seconds, the median step, tokens a second, the share of
the rate of a large matrix product measured just before (MFU: products of the model only) or,
decoding, of the rate at which memory is read, peak memory, and compilations after the second step,
of which there should be none. Each case runs in a process of its own, so that no memory is
another's.
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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from transformer_jax import distributed, tree
from transformer_jax.finetuning import peft, quantize
from transformer_jax.generation import generate, transpose_kernels_for_decoding
from transformer_jax.models import build_model, init_params, presets
from transformer_jax.objectives import classification
from transformer_jax.planner import plan, throughput
from transformer_jax.train import optimizers, profiling, step
from transformer_jax.train.compiled_step import CompiledStep

CHAR = {"vocab_size": 65, "norm_first": True}


class Case(NamedTuple):
    """A preset with changes, and the work."""

    preset: str
    rows: int
    length: int
    work: str = "train"  # or "decode", or a recipe of fine-tuning
    target: int = 0  # tokens of a target, or new ones
    changes: Mapping = MappingProxyType({})
    ahead: int = 1  # steps that a CPU is given at once; for small ones many, as `train.loop` does


CASES = {
    "gpt2": Case("gpt2", 2, 256),
    "bert_base": Case("bert_base", 4, 128),
    "bart_base": Case("bart_base", 2, 128, target=64),
    "transformer_base": Case("transformer_base", 8, 64, target=64),
    "char_gpt_4x128": Case("gpt2", 12, 64, ahead=10, changes=CHAR | {
        "num_layers": 4, "d_model": 128, "num_heads": 4, "mlp_dim": 512, "max_length": 64}),
    "char_gpt_6x384": Case("gpt2", 8, 256, changes=CHAR | {
        "num_layers": 6, "d_model": 384, "num_heads": 6, "mlp_dim": 1536, "max_length": 256}),
    "gpt2_decode_1": Case("gpt2", 1, 32, "decode", 64),
    "gpt2_decode_8": Case("gpt2", 8, 32, "decode", 64),
    "bart_base_decode_1": Case("bart_base", 1, 128, "decode", 64),
    **{f"bert_base_{recipe.replace(':', '_')}": Case("bert_base", 8, 128, recipe)
       for recipe in ("full", "head", "lora:8")},
}
LARGE = {  # for accelerators; as large as pre-training is
    "gpt2_32x1024": Case("gpt2", 32, 1024),
    "bert_base_64x512": Case("bert_base", 64, 512),
    "bart_base_32x512": Case("bart_base", 32, 512, target=512),
}
CASES |= LARGE


@dataclass(frozen=True)
class Bench:
    """What to time.

    Attributes:
        cases: of `CASES`; all but the large ones if none are given.
        rounds: steps that are timed.
        dropout_rate: of activations and of attention weights, while training.
        weights: float32, bfloat16 or int8: how parameters are kept for decoding.
        here: run in this process, which then has one case only.
    """

    cases: tuple[str, ...] = ()
    rounds: int = 7
    dtype: str = "float32"
    dropout_rate: float = 0.0
    weights: str = "float32"
    here: bool = False


class Job(NamedTuple):
    run: Callable[[], object]  # `times` units of work, done when it returns
    tokens: int  # of a unit, as are the others
    flops: float = 0.0  # products of the model
    bytes_read: float = 0.0  # at the least, where memory is the limit
    times: int = 1


def make_job(case: Case, c: Bench) -> Job:
    """What a case does, ready to run."""
    return (decoding if case.work == "decode" else training)(case, c)


def training(case: Case, c: Bench) -> Job:
    """Whole steps: forward, backward, clipping, AdamW; the state donated. An accelerator, or a CPU
    whose steps are short, is given the next before it is done with one, as in `train.loop`."""
    config = config_of(case, c)
    recipe = None if case.work == "train" else case.work
    model = build_model(config, 2, "classification") if recipe else build_model(config)
    params, mask = jax.jit(functools.partial(init_params, model))(jax.random.key(0)), None
    if recipe:
        params, mask = peft.add_and_mask(params, recipe, jax.random.key(1))
    optimizer = optimizers.make_optimizer(1e-4)
    loss = classification.classification_loss if recipe else plan.pretraining_loss(config)
    setting = plan.PlanConfig(config, {}, case.rows, case.length)
    batch = _batch(case, plan.batch_shapes(setting), config.vocab_size, recipe)
    state = [step.init_state(params, optimizer, mask)]
    del params
    train_step = CompiledStep(
        step.make_train_step(functools.partial(loss, model.apply), optimizer, mask), state[0], None)
    rng = jax.random.key(2) if c.dropout_rate else None
    times = case.ahead if jax.default_backend() == "cpu" else 10
    batch = jax.device_put(batch)

    def run():
        for _ in range(times):
            state[0], metrics = train_step(state[0], batch, rng)
        return jax.block_until_ready((state[0], metrics))[1]["loss"]

    flops = 0.0 if recipe or case.target else plan.model_flops(setting)
    return Job(run, case.rows * (case.length + case.target), flops, times=times)


def decoding(case: Case, c: Bench) -> Job:
    """Greedy decoding, with no end but the number of new tokens."""
    config = config_of(case, c)
    model = build_model(config)
    params = _loaded(jax.eval_shape(functools.partial(init_params, model), jax.random.key(0)))
    prompts = np.random.default_rng(0).integers(4, config.vocab_size, (case.rows, case.length))
    # Once for each new token; an encoder, and what projects its states, once for each text.
    weights = sum(leaf.size for path, leaf in tree.flatten_paths(params).items()
                  if not re.search(r"^encoder|position_embed|cross_attention/(key|value)", path))
    params, _ = quantize.quantize_frozen(params, jax.tree.map(lambda x: False, params), c.weights)
    params = transpose_kernels_for_decoding(model, params, donate=True)  # once, as where many texts are written
    run = functools.partial(generate, model, params, prompts.tolist(),
                            max_new_tokens=case.target, min_new_tokens=case.target)
    size = 1 if c.weights == "int8" else np.dtype(config.compute_dtype).itemsize
    return Job(run, case.rows * case.target, bytes_read=weights * size * case.target)


def _loaded(shapes: dict) -> dict:
    """Random parameters, one after another as from a file: drawing all at once takes more memory
    than decoding."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / 50), shapes)


def config_of(case: Case, c: Bench):
    """The model of a case."""
    return presets.get(case.preset, **case.changes, dtype=c.dtype, dropout_rate=c.dropout_rate,
                       attention_dropout_rate=c.dropout_rate)


def _batch(case: Case, shapes: dict, vocab_size: int, recipe: str | None) -> dict:
    """Random ids of these shapes; all weights one."""
    rng = np.random.default_rng(0)
    if recipe:
        shapes = {name: shapes[name] for name in ("tokens", "segment_ids", "padding_mask")}
    batch = {}
    for name, leaf in shapes.items():
        shape = list(leaf.shape)
        if case.target and name in ("decoder_tokens", "targets", "weights"):
            shape[1] = case.target
        limit = {"segment_ids": 2, "nsp_labels": 2, "masked_positions": case.length,
                 "document_ids": 2}.get(name, vocab_size)
        value = rng.integers(0, limit, shape) if leaf.dtype == jnp.int32 else np.ones(shape)
        batch[name] = value.astype(leaf.dtype)
    if "positions" in batch:
        batch["positions"] = np.broadcast_to(np.arange(case.length, dtype=np.int32),
                                             batch["positions"].shape)
        batch["document_ids"] = np.ones_like(batch["tokens"])
    if recipe:
        batch |= {"labels": rng.integers(0, 2, case.rows).astype(np.int32),
                  "weights": np.ones(case.rows, np.float32)}
    return batch


def time_case(name: str, c: Bench) -> dict:
    """One case in this process."""
    case = CASES[name]
    rate, reads = throughput.matmul_flops_per_second(c.dtype), throughput.memory_bandwidth()
    with profiling.CompilationCounter() as compilations:
        job = make_job(case, c)
        before = compilations.seconds
        job.run()
        compile_seconds = compilations.seconds - before
        job.run()
        settled = compilations.count
        times = []
        for _ in range(c.rounds):
            began = time.perf_counter()
            job.run()
            times.append((time.perf_counter() - began) / job.times)
        again = compilations.count - settled
    median = statistics.median(times)
    share = {"mfu": job.flops / median / rate, "read_share": job.bytes_read / median / reads}
    return {
        "case": name, **case._asdict(), "changes": dict(case.changes), "dtype": c.dtype,
        "dropout_rate": c.dropout_rate, "weights": c.weights,
        "compile_seconds": round(compile_seconds, 2), "median_seconds": round(median, 5),
        "least_seconds": round(min(times), 5), "rounds": c.rounds,
        "tokens_per_second": round(job.tokens / median, 1),
        **{name: round(value, 3) for name, value in share.items() if value},
        "matmul_gflops": round(rate / 1e9, 1), "read_gigabytes": round(reads / 1e9, 1),
        "peak_memory_mib": round((profiling.peak_memory() or 0) / 2**20),
        "compilations_after_second": again, "device": jax.devices()[0].device_kind,
        "machine": platform.machine(), "python": platform.python_version(),
        "versions": {package: version(package) for package in ("jax", "jaxlib", "flax")}}


def main(c: Bench) -> list[dict]:
    """The command."""
    unknown = [name for name in c.cases if name not in CASES]
    if unknown:
        raise ValueError(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    lines = []
    for name in c.cases or [name for name in CASES if name not in LARGE]:
        if c.here:
            if distributed.platform_is_cpu():
                distributed.configure_malloc()
            lines.append(time_case(name, c))
            print(json.dumps(lines[-1]), flush=True)
            continue
        own = [sys.executable, __file__, "--here", "--cases", name]
        own += [f"--{key.replace('_', '-')}={getattr(c, key)}"
                for key in ("rounds", "dtype", "dropout_rate", "weights")]
        said = subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True).stdout
        lines.append(json.loads(said.splitlines()[-1]))
        print(said, end="", flush=True)
    return lines


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
