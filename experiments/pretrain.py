"""Pre-trains GPT, BERT or BART on plain text.

    python experiments/pretrain.py gpt_python_docs --out runs/gpt
    python experiments/pretrain.py bert_python_docs --out runs/bert --mesh.fsdp 8
    python experiments/pretrain.py char_shakespeare --data input.txt --out runs/chars

The first argument is the name of a file in `experiments/configs`; every setting in it can be
changed by a flag (`--help`). The same command resumes an interrupted run. Hardware, time and
expected loss are in the docstring of each config.
"""

import configs

from transformer_jax.recipes.pretraining import PretrainConfig, pretrain

if __name__ == "__main__":
    configs.run(pretrain, PretrainConfig, __doc__)
