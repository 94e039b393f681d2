"""What the objectives teach: next word, masked words, next sentence, denoising, side by side.

    python experiments/study.py objectives

Claims: each objective teaches what it asks for. Masked words and next words teach what texts are
about; next-sentence prediction teaches how sentences go together (Devlin et al. 2018, section 5.1),
with segment embeddings to tell them apart; a wider context k predicts better; and the language
model's loss beside the task's helps fine-tuning (Radford et al. 2018, section 5).

Small models of equal size see as many tokens of Python's documentation, and are then fine-tuned,
all parameters, on two tasks from it: the part of the library that a docstring is about, and whether
one sentence follows another.

One core of an AMD EPYC: 27 minutes. It holds in part. Topics, three seeds: from scratch 58.9 ± 0.2
%, next word 69.2 ± 1.0, denoising 72.9 ± 0.9; masked words 49.8 ± 2.6, with next sentence 52.5 ±
0.4, without segments 52.0 ± 1.0: after 800 steps these have learnt less than labels alone teach a
GPT. Next sentence alone is not learnt (0.693 nats, chance), and no system learns whether B follows
A. A narrow context hardly costs next-word loss here (4.314 nats for k = 2 in each layer, 4.324 for
8, 4.310 for all), but what is read at the last token then sees the last words alone: topics 15.5
and 44.2 %. The auxiliary loss: 70.1 ± 1.5 %, no difference.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from studies import systems
from studies.pictures import Bars, show


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """Attributes:
        kinds: of `systems.KINDS`.
        aux_lm_loss_weight: of the language model's loss beside the task's, for the first GPT.
    """

    out: Path = Path("runs/objectives")
    kinds: tuple[str, ...] = tuple(systems.KINDS)
    aux_lm_loss_weight: float = 0.5
    shape: systems.Shape = field(default_factory=systems.Shape)


def config() -> Objectives:
    return Objectives()


def large() -> Objectives:
    return Objectives(shape=systems.LARGE)


def smallest() -> Objectives:
    return Objectives(shape=systems.SMALLEST, kinds=("BERT, sentences only",))


def run(c: Objectives) -> dict:
    s = c.shape
    tasks = {"topics": (systems.topics(s), s.labels), "pairs": (systems.pairs(s), s.pairs)}
    rows = []

    def add(name: str, system: systems.System, **options) -> None:
        row = {"system": name, "held_out": None if options else system.held_out}
        for task, (data, total) in tasks.items():
            row[task] = systems.ask(s, system, data, total, **options)
        rows.append(row)
        print("  " + ", ".join(f"{task} {np.mean(row[task]):.1f} ± {np.std(row[task]):.1f} %"
                               for task in tasks), flush=True)

    for i, kind in enumerate(c.kinds):
        system = systems.pretrain(s, kind)
        add(kind, system)
        if i == 0:
            print(f"{kind}, from scratch", flush=True)
            add("from scratch", system, scratch=True)
            if kind == "GPT" and c.aux_lm_loss_weight:
                print(f"{kind}, with the auxiliary loss", flush=True)
                add(f"{kind}, LM loss x {c.aux_lm_loss_weight:g}", system, aux_lm_loss_weight=c.aux_lm_loss_weight)
    chance = {task: systems.chance(data) for task, (data, _) in tasks.items()}
    picture(c, rows, chance)
    return {"systems": rows, "chance": chance}


def picture(c: Objectives, rows: list[dict], chance: dict[str, float]) -> None:
    s, groups = c.shape, [row["system"] for row in rows]
    show(c.out / "objectives.png", {
        title: Bars({"accuracy": [np.mean(row[task]) for row in rows]}, groups,
                    {"accuracy": [np.std(row[task]) for row in rows]},
                    [chance[task]] * len(rows))
        for task, title in (("topics", f"What it is about ({s.labels} labels)"),
                            ("pairs", f"Does B follow A? ({s.pairs} pairs)"))},
        title=f"After {s.num_steps} steps of pre-training by each objective, {s.seeds} seeds")
