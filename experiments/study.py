"""Runs one study: a claim about transformers or transfer learning, tested by an experiment.

    python experiments/study.py grokking
    python experiments/study.py grokking-large --out runs/grokking_large
    python experiments/study.py grokking --help

`experiments/README.md` shows the results; the studies are in `experiments/studies`. NAME-large is
for accelerators, NAME-smallest checks that the study runs.
"""

import sys
import time

import studies
import tyro

from transformer_jax.recipes import run_dir


def main(config) -> dict:
    """Runs the study; its figures and `results.json` are in its folder."""
    began = time.perf_counter()
    metrics = sys.modules[type(config).__module__].run(config)
    results = run_dir.write_results(config.out, config, metrics, time.perf_counter() - began)
    print(f"{results['seconds']:.0f} s; figures and results.json are in {config.out}", flush=True)
    return results


if __name__ == "__main__":
    config = tyro.extras.overridable_config_cli(studies.load(), description=__doc__)
    run_dir.setup()
    main(config)
