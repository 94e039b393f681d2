"""Compares trainable specs on one labeled dataset, for numbers of examples and seeds.

    python experiments/sweep.py sst2 --data path/to/sst2 --out runs/sst2
    python experiments/sweep.py sst2_few --data path/to/sst2 --out runs/sst2_few

The first argument is the name of a file in `experiments/configs`, whose docstring has the
requirements, the time and the expected result; every setting in it can be changed by a flag
(`--help`). Each cell of the table, a spec with a number of examples and a seed, is written to
`cells.jsonl` when it is done, and the same command resumes an interrupted sweep. "scratch" among
the specs trains a model of the same size from new parameters. `results.json` has means and standard
deviations over seeds, and the pre-training loss after each run.
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
