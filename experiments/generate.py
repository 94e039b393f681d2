"""Use the model of a run: continue text with GPT, fill masks with BERT, classify after fine-tuning.

    python experiments/generate.py --run runs/gpt_python_docs --text "Return the" --top-p 0.9
    python experiments/generate.py --run runs/bert_python_docs --text "I ate an [MASK] today"
    python experiments/generate.py --run runs/topics --text "Parse an XML document"

Any hardware; seconds. Greedy unless --temperature, --top-k or --top-p is given. Several --text are
answered as one batch.
"""

from dataclasses import dataclass
from pathlib import Path

import common
import jax
import tyro

from transformer_jax.generation import fill_mask, generate
from transformer_jax.models import GPT
from transformer_jax.objectives import classification
from transformer_jax.objectives.input_format import pack_bert_input


@dataclass(frozen=True)
class Generate:
    """What to do with which text.

    Attributes:
        run: the --out folder of a pretrain.py or finetune.py run.
        text: prompts, sentences with [MASK], or texts to classify.
        max_new_tokens: for GPT; it stops earlier at end-of-text.
        candidates: words shown for each mask.
    """

    run: Path
    text: tuple[str, ...]
    max_new_tokens: int = 40
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    candidates: int = 5
    seed: int = 0


def answer(c: Generate) -> list[str]:
    """One line for each text."""
    run = common.load_run(c.run)
    task = classify if run.label_names else continued if isinstance(run.model, GPT) else filled
    return task(c, run)


def continued(c: Generate, run: common.LoadedRun) -> list[str]:
    prompts = [run.tokenizer.encode(text) for text in c.text]
    do_sample = any(value is not None for value in (c.temperature, c.top_k, c.top_p))
    rows = generate(
        run.model, run.params, prompts, max_new_tokens=c.max_new_tokens,
        eos_token_id=run.tokenizer.eos_id, do_sample=do_sample,
        temperature=c.temperature if c.temperature is not None else 1.0, top_k=c.top_k,
        top_p=c.top_p if c.top_p is not None else 1.0, rng=jax.random.key(c.seed),
    )
    start = max(map(len, prompts))
    return [text + run.tokenizer.decode(row[start:]) for text, row in zip(c.text, rows)]


def filled(c: Generate, run: common.LoadedRun) -> list[str]:
    t, lines = run.tokenizer, []
    for text in c.text:
        ids = t.encode(text)
        row = pack_bert_input(ids, length=len(ids) + 2, cls_id=t.cls_id, sep_id=t.sep_id)
        fills = fill_mask(run.model, run.params, row["tokens"], mask_id=t.mask_id,
                          top_k=c.candidates)
        words = "; ".join(
            ", ".join(f"{t.decode([i])} {p:.2f}" for i, p in zip(f.token_ids, f.probabilities))
            for f in fills
        )
        lines.append(f"{text}  ->  {words}")
    return lines


def classify(c: Generate, run: common.LoadedRun) -> list[str]:
    lines = []
    for text in c.text:
        ids = run.tokenizer.encode(text)
        new = "extra" in run.params["token_embed"]
        row = classification.make_input_packer(
            run.model, run.tokenizer, run.model.config.max_length,
            classification.SpecialTokens.new(run.model.config.vocab_size) if new else None)(ids)
        logits = run.model.apply(
            {"params": run.params}, row["tokens"][None], method="classification_logits",
            padding_mask=row["padding_mask"][None], segment_ids=row["segment_ids"][None],
        )
        share = jax.nn.softmax(logits[0])
        best = share.argsort()[::-1][: c.candidates]
        lines.append(f"{text}  ->  " + ", ".join(
            f"{run.label_names[i]} {share[i]:.2f}" for i in best.tolist()))
    return lines


if __name__ == "__main__":
    config = tyro.cli(Generate, description=__doc__)
    print("\n".join(answer(config)))
