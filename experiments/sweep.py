"""Compares trainable specs on one labeled dataset, for several training sizes and seeds.

    python experiments/sweep.py sst2 --data path/to/sst2 --out runs/sst2
    python experiments/sweep.py sst2_few --data path/to/sst2 --out runs/sst2_few

The first argument is the name of a file in `experiments/configs`, whose docstring gives the
requirements, time and result; every setting in it can be changed by a flag (`--help`). Each cell, a
run with a given spec, number of examples and seed, is appended to `cells.jsonl` when it is
complete, and the same command resumes an interrupted sweep. The spec "scratch" trains a newly
initialized model of the same size. `results.json` contains the means and standard deviations over
seeds of the scores and of the pre-training loss after fine-tuning.
"""

import sys

import configs
import tyro

from transformer_jax.cli import run_command
from transformer_jax.recipes.run_dir import setup
from transformer_jax.recipes.sweep import SweepConfig, sweep


def main(config: SweepConfig) -> None:
    setup()
    sweep(config)


if __name__ == "__main__":
    sys.exit(run_command(
        main, parse=lambda: tyro.extras.overridable_config_cli(
            configs.load_flat(SweepConfig, "dataset"), description=__doc__)))
