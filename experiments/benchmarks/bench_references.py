"""Training steps and decoding here against other libraries, in turn, on one machine.

    python -m venv torch && torch/bin/pip install torch==2.13.0 "transformers==5.*"
    python -m venv flax && flax/bin/pip install transformers==4.57.6 jax==0.10.2 flax optax
    python -m venv keras && keras/bin/pip install keras keras-hub jax
    python experiments/bench_references.py --torch torch/bin/python --flax flax/bin/python \
        --keras keras/bin/python --nanogpt nanoGPT/model.py
    python experiments/bench_references.py --device cuda --dtypes bfloat16 \
        --torch torch/bin/python --nanogpt nanoGPT/model.py --cases gpt2_32x1024 gpt2_decode_8 \
        --libraries hf_torch_bfloat16 nanogpt_compiled_bfloat16

Each library runs in its own environment (those not given are left out) and each case in processes
of its own, all on the same sizes with random weights, float32: Transformers on PyTorch, its Flax
models of version 4, KerasHub on JAX, nanoGPT as it is and compiled. A further worker multiplies two
large matrices, in the same rounds: the rate that "of the peak" is a share of. A ratio is
the median over rounds of a round's medians. Two CPU cores take half an hour for all cases.
"""

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import bench
import interleave

from transformer_jax.planner import plan, throughput
from transformer_jax.train import profiling

WORKER = "--worker"
LIBRARIES = {  # name -> which environment; kinds of model; work
    "hf_torch": ("torch", ("gpt", "bert", "bart"), ("train", "decode")),
    "hf_torch_bfloat16": ("torch", ("gpt", "bert", "bart"), ("train", "decode")),
    "nanogpt": ("torch", ("gpt",), ("train",)),
    "nanogpt_compiled": ("torch", ("gpt",), ("train",)),
    "nanogpt_compiled_bfloat16": ("torch", ("gpt",), ("train",)),
    "hf_flax": ("flax", ("gpt", "bert", "bart"), ("train", "decode")),
    "kerashub": ("keras", ("gpt", "bert"), ("train", "decode")),
}
KINDS = {"gpt2": "gpt", "bert_base": "bert", "bart_base": "bart"}  # of presets
CASES = ("gpt2", "bert_base", "bart_base", "char_gpt_4x128", "char_gpt_6x384", "gpt2_decode_1",
         "gpt2_decode_8")


@dataclass(frozen=True)
class Against:
    """Attributes:
    torch, flax, keras: interpreters of environments with these libraries.
    nanogpt: the file model.py of its repository; it needs `torch`.
    cases: of `bench.CASES`.
    dtypes: ours, a worker each.
    libraries: leave out the others.
    device: of PyTorch; "cuda" beside a GPU that JAX finds.
    round_seconds: a turn lasts as long at the least, and two pieces of work.
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
    """One worker on one case."""

    case: str
    worker: str
    seconds: float  # median of a piece of work
    ratio: float  # of our time to its
    tokens_per_second: float
    of_peak: float | None  # share of the rate of a matrix product
    of_reading: float | None  # decoding: of the rate at which memory is read
    first_seconds: float  # of the first call, with compilation
    peak_mib: int


def shape_of(name: str, c: Against) -> dict:
    """What a worker of any library has to know of a case."""
    case = bench.CASES[name]
    config = bench.config_of(case, bench.Bench(dropout_rate=c.dropout_rate))
    rows = plan.abstract_batch(plan.PlanConfig(config, {}, case.rows, case.length))
    masked = rows["masked_positions"].shape[1] if "masked_positions" in rows else 0
    return {"kind": KINDS[case.preset], "work": case.work, "rows": case.rows,
            "length": case.length, "target": case.target, "masked": masked,
            "layers": config.num_layers, "heads": config.num_heads, "width": config.d_model,
            "mlp": config.mlp_dim, "vocab_size": config.vocab_size,
            "max_length": config.max_length, "dropout_rate": c.dropout_rate,
            "round_seconds": c.round_seconds, "device": c.device,
            "times": 10 if c.device == "cuda" and case.work == "train" else 1}


def commands(name: str, c: Against) -> dict[str, list[str]]:
    """The workers of a case."""
    shape = shape_of(name, c)
    pythons = {"torch": c.torch, "flax": c.flax, "keras": c.keras}
    references = str(Path(__file__).with_name("references.py"))
    found = {}
    for library, (environment, kinds, works) in LIBRARIES.items():
        python = pythons[environment]
        if (library in c.libraries and python and shape["kind"] in kinds
                and shape["work"] in works and (c.nanogpt or "nanogpt" not in library)):
            found[library] = [str(python), references, library, json.dumps(shape)]
    for dtype in c.dtypes:
        found[f"here, {dtype}"] = [sys.executable, __file__, WORKER, name, json.dumps(
            {"dtype": dtype, "dropout_rate": c.dropout_rate, "round_seconds": c.round_seconds})]
    machine = json.dumps({"dtype": c.dtypes[0]})
    return found | {work: [sys.executable, __file__, WORKER, work, machine]
                    for work in ("matmul", "read")}


def worker(name: str, settings: str) -> None:
    """Ours, or the machine's own rates."""
    from transformer_jax import distributed

    if distributed.platform_is_cpu():
        distributed.configure_malloc()
    # On a GPU JAX would take most of the memory; others are on it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    c = json.loads(settings)
    if name in ("matmul", "read"):
        work, amount = (throughput.matmul_benchmark(c["dtype"]) if name == "matmul"
                        else throughput.memory_read_benchmark())
        interleave.serve(work, seconds=1.0, amount=amount)
        return
    job = bench.make_job(bench.CASES[name], bench.Bench(dtype=c["dtype"],
                                                        dropout_rate=c["dropout_rate"]))
    interleave.serve(job.run, seconds=c["round_seconds"], pieces=job.times, tokens=job.tokens,
                flops=job.flops, bytes_read=job.bytes_read, peak_lr=profiling.peak_memory)


def compare(name: str, c: Against) -> list[Result]:
    """Every library on one case; ours first, the others by their time."""
    found = interleave.run_interleaved(commands(name, c), c.rounds)
    rates = {work: found[work].facts["amount"] / found.pop(work).median
             for work in ("matmul", "read")}
    ours = found[f"here, {c.dtypes[0]}"]
    facts = ours.facts
    results = []
    for worker_name, side in found.items():
        share = facts["flops"] / side.median / rates["matmul"]
        reads = facts["bytes_read"] / side.median / rates["read"]
        results.append(Result(
            name, worker_name, side.median, statistics.median(interleave.ratios(ours, side)),
            facts["tokens"] / side.median, share or None, reads or None,
            side.facts["first_seconds"], round(side.peak_bytes / 2**20)))
    return sorted(results, key=lambda r: (not r.worker.startswith("here"), r.seconds))


def table(results: list[Result]) -> str:
    """Markdown."""
    lines = ["| case | library | ms | here to it | tokens/s | of the peak | of reading | first s "
             "| peak MiB |", "|---" * 9 + "|"]

    def share(x: float | None) -> str:
        return f"{x:.2f}" if x else ""

    return "\n".join(lines + [
        f"| {r.case} | {r.worker} | {1000 * r.seconds:.1f} | {r.ratio:.2f} | "
        f"{r.tokens_per_second:,.0f} | {share(r.of_peak)} | {share(r.of_reading)} | "
        f"{r.first_seconds:.1f} | {r.peak_mib:,} |" for r in results])


def main(c: Against) -> dict:
    """The command."""
    import common

    known = CASES + tuple(bench.LARGE)
    unknown = [name for name in c.cases if name not in known]
    if unknown:
        raise ValueError(f"no case {', '.join(unknown)}; compared are {', '.join(known)}")
    if c.nanogpt:
        os.environ["NANOGPT"] = str(c.nanogpt.resolve())
    began, results = time.perf_counter(), []
    for name in c.cases:
        found = compare(name, c)
        print(table(found), flush=True)
        results += found
    c.out.mkdir(parents=True, exist_ok=True)
    (c.out / "table.md").write_text(table(results) + "\n")
    return common.write_results(c.out, c, {"results": [r._asdict() for r in results]},
                                time.perf_counter() - began)


if __name__ == "__main__":
    if WORKER in sys.argv:
        worker(*sys.argv[2:])
    else:
        import tyro

        main(tyro.cli(Against, description=__doc__))
