"""What makes a run what it is."""

import dataclasses
from pathlib import Path

import common
import numpy as np
from settings import Data, Mesh, Optimizer, Pretrain, Settings

from transformer_jax.data.packing import Corpus
from transformer_jax.models import presets

RUN = Pretrain(presets.gpt2(num_layers=1), "causal_lm", "bpe", 16, 8, 100, Path("a"))
ROWS = [{"tokens": [1, 2, 3], "text": "a"}, {"tokens": [4], "text": "b"}]


def same(**changes) -> bool:
    return common.identity(dataclasses.replace(RUN, **changes), ROWS) == common.identity(RUN, ROWS)


def test_settings_that_the_result_depends_on():
    assert same(out=Path("b"), log_every=1, save_every=1, mesh=Mesh(fsdp=2), allow_config_mismatch=True)
    assert not same(num_steps=101)
    assert not same(seed=1)
    assert not same(optimizer=Optimizer(peak_lr=2e-3))
    assert not same(model=presets.gpt2(num_layers=2))
    own = common.identity(Settings(), ROWS)["settings"]
    assert own["batch_size"] == 16 and "save_every" not in own
    assert "data" not in common.identity(Data(), ROWS)["settings"]


def test_rows_that_it_reads():
    assert common.fingerprint(ROWS) == common.fingerprint([dict(row) for row in ROWS])
    assert common.fingerprint(ROWS) != common.fingerprint(ROWS[::-1])
    assert common.fingerprint(ROWS) != common.fingerprint([ROWS[0], {"tokens": [4], "text": "c"}])


def test_a_corpus_by_its_blocks():
    tokens, starts = np.arange(2**20, dtype=np.int32), np.array([0, 500])
    found = common.fingerprint(Corpus(tokens, starts, starts))
    assert found == common.fingerprint(Corpus(tokens.copy(), starts, starts))
    for place in (0, 2**19, 2**20 - 1):
        other = tokens.copy()
        other[place] = -1
        assert common.fingerprint(Corpus(other, starts, starts)) != found
    assert common.fingerprint(Corpus(tokens.astype(np.int64), starts, starts)) != found
