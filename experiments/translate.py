"""Trains the Transformer on pairs of texts, translates the validation split and computes sacreBLEU.

    python experiments/translate.py multi30k_de_en --data multi30k --out runs/de_en
    python experiments/translate.py multi30k_de_en --data tfds:ted_hrlr_translate/pt_to_en \
        --source pt --target en --validation-split validation

The first argument is the name of a file in `experiments/configs`; every setting in it can be
changed by a flag (`--help`). The same command resumes an interrupted run. The script writes to
`<out>` checkpoints, the translations, `results.json` with sacreBLEU and its signature, the loss
curves, and a plot of the cross-attention weights of one sentence.
"""

import configs

from transformer_jax.recipes.sequence_to_sequence import TranslateConfig, train_translation

if __name__ == "__main__":
    configs.run(train_translation, TranslateConfig, __doc__)
