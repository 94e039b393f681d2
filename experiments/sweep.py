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

import configs

from transformer_jax.recipes.sweep import SweepConfig, sweep

if __name__ == "__main__":
    configs.run(sweep, SweepConfig, __doc__, "dataset")
