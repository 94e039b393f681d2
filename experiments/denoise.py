"""Pre-trains BART by denoising and fine-tunes it on pairs, compared with training from scratch.

    python experiments/denoise.py bart_dialogsum --pretrain.data wikitext-2 \
        --finetune.data dialogsum --out runs/dialogsum

The first argument is the name of a file in `experiments/configs`; every setting in it can be
changed by a flag (`--help`). The same command resumes an interrupted run. The script writes to
`<out>` the folders `pretraining`, `pretrained` and `scratch` with checkpoints; the texts that both
models generate; the loss curves; and `results.json` with the denoising loss on held-out text before
and after pre-training, and the ROUGE scores of both models.
"""

import configs

from transformer_jax.recipes.sequence_to_sequence import DenoiseConfig, denoise

if __name__ == "__main__":
    configs.run(denoise, DenoiseConfig, __doc__)
