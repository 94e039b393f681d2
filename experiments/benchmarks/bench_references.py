"""Benchmarks of training and decoding in this library and in others, interleaved on one machine.

    python -m venv torch && torch/bin/pip install torch==2.13.0 "transformers==5.*" peft
    python -m venv flax && flax/bin/pip install transformers==4.57.6 jax==0.10.2 flax optax
    python -m venv keras && keras/bin/pip install keras keras-hub jax
    python experiments/benchmarks/bench_references.py --torch torch/bin/python \
        --flax flax/bin/python --keras keras/bin/python --nanogpt nanoGPT/model.py
    python experiments/benchmarks/bench_references.py --device cuda --dtypes bfloat16 \
        --torch torch/bin/python --nanogpt nanoGPT/model.py --cases gpt2_32x1024 gpt2_decode_8 \
        --libraries hf_torch_bfloat16 nanogpt_compiled_bfloat16
    python experiments/benchmarks/bench_references.py --cases bert_base_lora_8 bert_base_full \
        --torch torch/bin/python --dropout-rate 0.1

The libraries are Transformers and PEFT on PyTorch, the Flax models of Transformers 4, KerasHub on
JAX, and nanoGPT, eager and compiled. Each runs in its own Python environment, except that nanoGPT
runs in that of PyTorch; libraries without an environment are skipped. Each case runs in separate
processes. The models have the same sizes in all libraries, and weights that each library draws at
random. They compute in float32 unless the name ends in bfloat16.

Two more workers measure the machine in the same rounds: the rate of a large matrix product, to
which the column "of peak" is relative, and the memory bandwidth, for the column "of bandwidth". The
column "time here / library" is computed from the ratio of the two median times in each round; it is
the median of these ratios. All cases take half an hour on two CPU cores.
"""

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import bench
import interleave

from transformer_jax.planner import chips, plan
from transformer_jax.train import step

WORKER = "--worker"
LIBRARIES = {
    "hf_torch": ("torch", ("gpt", "bert", "bart"), ("train", "decode")),
    "hf_torch_bfloat16": ("torch", ("gpt", "bert", "bart"), ("train", "decode")),
    "peft": ("torch", ("bert",), ("full", "lora:8")),
    "nanogpt": ("torch", ("gpt",), ("train",)),
    "nanogpt_compiled": ("torch", ("gpt",), ("train",)),
    "nanogpt_compiled_bfloat16": ("torch", ("gpt",), ("train",)),
    "hf_flax": ("flax", ("gpt", "bert", "bart"), ("train", "decode")),
    "kerashub": ("keras", ("gpt", "bert"), ("train", "decode")),
}
"""Function in `references` -> (environment, model families, kinds of work)."""
FAMILIES = {"gpt2": "gpt", "bert_base": "bert", "bart_base": "bart"}
"""Model preset -> model family."""
CASES = ("gpt2", "bert_base", "bart_base", "char_gpt_4x128", "char_gpt_6x384", "gpt2_decode_1",
         "gpt2_decode_8")
FINETUNING_CASES = ("bert_base_full", "bert_base_lora_8")
MACHINE_WORKERS = ("matmul", "read")


@dataclass(frozen=True)
class ReferencesConfig:
    """Settings of the comparison.

    Attributes:
        torch: Python interpreter of an environment with PyTorch, Transformers and PEFT.
        flax: Python interpreter of an environment with Transformers 4, Flax and Optax.
        keras: Python interpreter of an environment with Keras and KerasHub.
        nanogpt: path of model.py in nanoGPT's repository; it runs in the environment `torch`.
        out: folder for results.json and table.md.
        cases: names in `CASES`, `FINETUNING_CASES` or `bench.LARGE_CASES`.
        dtypes: dtypes of the computation in this library, one worker each. The time of the first
            is the numerator of all ratios.
        libraries: names in `LIBRARIES`.
        device: device of PyTorch; set it to "cuda" if JAX uses a GPU of this machine.
        dropout_rate: dropout rate in training.
        rounds: number of rounds.
        round_seconds: minimum duration of a worker's round, which has at least two calls.
    """

    torch: Path | None = None
    flax: Path | None = None
    keras: Path | None = None
    nanogpt: Path | None = None
    out: Path = Path("runs/references")
    cases: tuple[str, ...] = CASES
    dtypes: tuple[str, ...] = ("float32",)
    libraries: tuple[str, ...] = tuple(LIBRARIES)
    device: Literal["cpu", "cuda"] = "cpu"
    dropout_rate: float = 0.0
    rounds: int = 5
    round_seconds: float = 3.0


class Result(NamedTuple):
    """The measurements of one worker on one case; `ratio` is our time divided by the worker's.

    `of_peak` is relative to the rate of a matrix product, and `of_bandwidth`, for decoding, to the
    memory bandwidth. `first_seconds` includes compilation.
    """

    case: str
    worker: str
    seconds: float
    ratio: float
    tokens_per_second: float
    of_peak: float | None
    of_bandwidth: float | None
    first_seconds: float
    peak_mib: int


def reference_case(name: str, config: ReferencesConfig) -> dict[str, Any]:
    """Returns the sizes and settings of a case in the format that `references` reads."""
    case = bench.CASES[name]
    model = bench.make_model_config(case, bench.BenchConfig(dropout_rate=config.dropout_rate))
    batch = plan.abstract_batch(plan.PlanConfig(model, {}, case.batch_size, case.length))
    is_gpu_training = config.device == "cuda" and case.work != "decode"
    return {
        "family": FAMILIES[case.preset], "work": case.work, "batch_size": case.batch_size,
        "length": case.length, "target_length": case.target_length,
        "num_masked": batch["masked_positions"].shape[1] if "masked_positions" in batch else 0,
        "num_layers": model.num_layers, "num_heads": model.num_heads, "d_model": model.d_model,
        "mlp_dim": model.mlp_dim, "vocab_size": model.vocab_size, "max_length": model.max_length,
        "dropout_rate": config.dropout_rate, "round_seconds": config.round_seconds,
        "device": config.device, "steps_per_call": 10 if is_gpu_training else 1}


def worker_commands(name: str, config: ReferencesConfig) -> dict[str, list[str]]:
    """Returns the command lines of all workers of a case."""
    case = reference_case(name, config)
    interpreters = {"torch": config.torch, "flax": config.flax, "keras": config.keras}
    references = str(Path(__file__).with_name("references.py"))
    commands = {}
    for library, (environment, families, works) in LIBRARIES.items():
        python = interpreters[environment]
        if (library in config.libraries and python and case["family"] in families
                and case["work"] in works and (config.nanogpt or "nanogpt" not in library)):
            commands[library] = [str(python), references, library, json.dumps(case)]
    for dtype in config.dtypes:
        options = {"dtype": dtype, "dropout_rate": config.dropout_rate,
                   "round_seconds": config.round_seconds}
        commands[f"here, {dtype}"] = [
            sys.executable, __file__, WORKER, name, json.dumps(options)]
    options = {"dtype": config.dtypes[0]}
    return commands | {work: [sys.executable, __file__, WORKER, work, json.dumps(options)]
                       for work in MACHINE_WORKERS}


def run_worker(name: str, options_json: str) -> None:
    """Runs a worker of this library on a case, or one of `MACHINE_WORKERS`."""
    from transformer_jax import distributed

    if distributed.platform_is_cpu():
        distributed.configure_malloc()
    # By default JAX preallocates most of the GPU memory, which the workers share.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options = json.loads(options_json)
    if name in MACHINE_WORKERS:
        work, amount = (chips.matmul_benchmark(options["dtype"]) if name == "matmul"
                        else chips.memory_read_benchmark())
        interleave.serve(work, min_seconds=1.0, amount=amount)
        return
    workload = bench.make_workload(bench.CASES[name], bench.BenchConfig(
        dtype=options["dtype"], dropout_rate=options["dropout_rate"]))
    interleave.serve(
        workload.run, min_seconds=options["round_seconds"], units_per_call=workload.units,
        peak_bytes=step.peak_memory, tokens=workload.tokens, flops=workload.flops,
        bytes_read=workload.bytes_read)


def compare(name: str, config: ReferencesConfig) -> list[Result]:
    """Returns the results of all libraries on one case: this library, then the others by time."""
    timings = interleave.run_interleaved(worker_commands(name, config), config.rounds)
    rates = {work: timings[work].info["amount"] / timings.pop(work).median
             for work in MACHINE_WORKERS}
    here = timings[f"here, {config.dtypes[0]}"]
    results = [
        Result(
            case=name, worker=worker, seconds=found.median,
            ratio=statistics.median(interleave.ratios(here, found)),
            tokens_per_second=here.info["tokens"] / found.median,
            of_peak=here.info["flops"] / found.median / rates["matmul"] or None,
            of_bandwidth=here.info["bytes_read"] / found.median / rates["read"] or None,
            first_seconds=found.info["first_seconds"],
            peak_mib=round(found.peak_bytes / 2**20))
        for worker, found in timings.items()]
    return sorted(results, key=lambda r: (not r.worker.startswith("here"), r.seconds))


def to_markdown(results: list[Result]) -> str:
    """Returns a Markdown table of results."""

    def fraction(x: float | None) -> str:
        return f"{x:.2f}" if x else ""

    lines = ["| case | library | ms | time here / library | tokens/s | of peak | of bandwidth "
             "| first call, s | peak MiB |", "|---" * 9 + "|"]
    return "\n".join(lines + [
        f"| {r.case} | {r.worker} | {1000 * r.seconds:.1f} | {r.ratio:.2f} | "
        f"{r.tokens_per_second:,.0f} | {fraction(r.of_peak)} | {fraction(r.of_bandwidth)} | "
        f"{r.first_seconds:.1f} | {r.peak_mib:,} |" for r in results])


def main(config: ReferencesConfig) -> dict[str, Any]:
    """Compares the libraries on all cases, and returns the content of results.json."""
    from transformer_jax.errors import did_you_mean
    from transformer_jax.recipes.run_dir import write_results

    known = CASES + FINETUNING_CASES + tuple(bench.LARGE_CASES)
    for name in config.cases:
        if name not in known:
            raise ValueError(f"unknown case {name!r}; {did_you_mean(name, known)}")
    if config.nanogpt:
        os.environ["NANOGPT"] = str(config.nanogpt.resolve())
    began, results = time.perf_counter(), []
    for name in config.cases:
        found = compare(name, config)
        print(to_markdown(found), flush=True)
        results += found
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "table.md").write_text(to_markdown(results) + "\n")
    return write_results(config.out, config, {"results": [r._asdict() for r in results]},
                         time.perf_counter() - began)


if __name__ == "__main__":
    if WORKER in sys.argv:
        run_worker(*sys.argv[2:])
    else:
        import tyro

        from transformer_jax.cli.command import run_command

        sys.exit(run_command(main, parse=lambda: tyro.cli(ReferencesConfig, description=__doc__)))
