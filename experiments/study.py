"""Runs a study: a claim about transformers or transfer learning, tested by an experiment.

    python experiments/study.py grokking
    python experiments/study.py grokking-large --out runs/grokking_large
    python experiments/study.py grokking --help

The studies are in `experiments/studies`, and their results are in `experiments/README.md`.
NAME-large is a larger study for accelerators, and NAME-smallest is a smoke test.
"""

import sys
import time
from typing import Any

import studies
import tyro

from transformer_jax.cli.command import run_command
from transformer_jax.recipes.run_dir import setup, write_results


def main(config: Any) -> dict[str, Any]:
    """Runs the study of a config; writes the figures and results.json to `config.out`."""
    began = time.perf_counter()
    study = sys.modules[type(config).__module__]
    metrics = study.run(config)
    results = write_results(config.out, config, metrics, time.perf_counter() - began)
    print(f"{results['seconds']:.0f} s; figures and results.json are in {config.out}", flush=True)
    return results


if __name__ == "__main__":
    sys.exit(run_command(
        lambda config: (setup(), main(config)),
        parse=lambda: tyro.extras.overridable_config_cli(studies.load(), description=__doc__)))
