"""The vocabulary of the library: terms that were replaced by the field's standard ones are not
used in the package, the experiments, the notebooks and the Markdown files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Regular expression, matched without regard to case -> the term to use. A term in quotes may be a
# key that files on disk have.
REPLACED = {
    # Mathematics and XLA.
    r"\bway back\b": "backward pass; for checkpoints, export",
    r"\blaws?\b": "distribution, initializer",
    r"\bby_outputs|\bby outputs\b": "transposed, [out, in]",
    r"\b(said|told|says|mask) in words\b|\bsaid in\b": "symbolic mask",
    r"\bwho may look\b|\blooks? at whom\b|\b_look\b|\blook_across\b": "attention",
    r"\bwhere it looks\b|\bthose who look\b": "attention maps",
    r"\bread_and_write\b": "encode_decode",
    r"(?<!\")\bcontext_size\b": "attention_window",
    r"\bnumbers? of 16 bits\b": "16-bit dtype",
    r"\bper_std\b": "inv_std",
    r"\bFEW_ROWS\b": "MATVEC_MAX_ROWS",
    r"\bstore_gradient\b": "materialize_cotangent",
    r"\bmoved one place\b": "shifted right",
    # Training.
    r"\bours\b|\btheirs\b": "trainable / frozen; path / hf_name",
    r"\broll(s|ed|ing)? back\"|\"roll back": "rollback",
    r"(?<!\")\bhost_share\b": "data_wait_fraction",
    r"\bset aside\b|\bsets aside\b|\bset_aside\b": "moved to <step>.damaged, quarantined",
    r"(?<!\")\baccept[_-]changes\b": "allow_config_mismatch",
    r"(?<!\")\bhead[_-]rate\b": "head_lr_multiplier",
    r"\bby_release\b|\bdecay_to_start\b|\baverage_of\b": "gradual_unfreezing, l2_sp, params_ema",
    r"\bgoes on from\b|\bgo on from\b|\bgoes on\b": "resumes, continues",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bborn sharded\b|\bbargains?\b": "initialized with its sharding; trade-off",
    r"\bsay_devices\b|\bsaid aloud\b|\bsays? aloud\b": "print_devices",
    r"\bkeep_freed_memory\b|\bgive_back_freed_memory\b": "configure_malloc, malloc_trim",
    r"\bin turns?\b|\bmoods?\b": "interleaved",
    # Fine-tuning.
    r"(?<![a-z\"])deltas?(?![a-z])": "PEFT parameters, adapter",
    r"\bshrink\b(?!=)|\bfewer bytes\b": "quantize",
    r"\bwhat trains\b|\bwhat is trained\b": "trainable parameters",
    r"(?<!\")\blm[_-]weight\b": "aux_lm_loss_weight",
    r"\bold skill\b": "pre-training task",
    r"\bwith_what_is_new\b|\bwhat is new\b": "newly initialized modules",
    # Data.
    r"(?-i:\bannotated\b)": "labeled",
    r"\bfew_labels\b": "subsample_balanced",
    r"\bsentence_pieces\b": "split_sentences",
    r"\bthin face\b": "thin wrapper",
    r"\btold by the (data|columns)\b": "inferred from the columns",
    r"\bwithin a row in order\b|\bdeals? (rows|out)\b|\b_deal\b": "strided split, _plan_epoch",
    r"\bcommonest\b|\bgreater class\b": "majority class",
    r"\blike lengths?\b": "length-bucketed",
    # Generation.
    r"\bbeing written\b": "being generated",
    r"\bGPT-2 writes\b|\bwrites (a )?texts?\b": "generates",
    r"\bproposes, the large\b|\bjudge[sd]?\b": "draft and verify",
    # Checkpoints, planner, tools.
    r"\bfetch it again\b": "download it again",
    r"\bare? not here\b|\bonly \w+ (is|are) here\b": "unsupported X; supported: Y",
    r"\blacking\b|\blacks\b": "missing",
    r"\bcard\b(?! and)": "config.json, run config",
    r"\bcutters\b|\bwhat cuts text\b": "tokenizer backend",
    r"\bwhat came of\b|\bcame of it\b": "results",
    r"\bnotes, put to the test\b|\bput to the test\b": "tested",
}


def files() -> list[Path]:
    """The files that are checked; notebooks are built from their text form."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("transformer_jax/**/*.py"),
             *ROOT.glob("transformer_jax/**/*.md"), *ROOT.glob("experiments/**/*.py"),
             *ROOT.glob("experiments/**/*.md"), *ROOT.glob("colab/*.py"), *ROOT.glob("colab/*.md"),
             *ROOT.glob("tests/endurance/*.md")]
    return sorted(path for path in found if path.name != "CHANGELOG.md")


def uses(text: str) -> list[str]:
    """One line for each use of a replaced term."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for term, better in REPLACED.items():
            if match := re.search(term, line, re.IGNORECASE):
                found.append(f"{number}: {match.group()!r} (use {better}): {line.strip()}")
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_replaced_term_is_used(path):
    assert uses(path.read_text()) == []


@pytest.mark.parametrize("line", [
    "kept for the way back", "if ours is None", "add_deltas(params)", "Mend that, then go on",
    "an annotated set", "the model that is not here: they are not here", "fetch it again"])
def test_a_replaced_term_is_found(line):
    assert uses(line)
