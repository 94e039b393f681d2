"""SentencePiece models (Kudo & Richardson 2018) for the `tokenizers` library, without another one.

A `.spm` or `.model` file is a protocol buffer. Of its fields only those are read that decide how a
text is cut: pieces with their log-probabilities and kinds, and how text is normalised. See
sentencepiece_model.proto of the release for the numbers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

UNIGRAM = 1  # TrainerSpec.ModelType
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # ModelProto.SentencePiece.Type; 1 is an ordinary piece


class Pieces(NamedTuple):
    """A model: what it can write, and how text is prepared for it."""

    pieces: list[tuple[str, float]]  # by id, with log-probabilities
    kinds: list[int]
    characters: bytes  # how characters are normalised; empty for not at all
    add_prefix: bool  # a space in front of every text
    collapse_spaces: bool

    @property
    def unknown(self) -> int:
        """The id of what has no piece."""
        return self.kinds.index(UNKNOWN)


def read(path: str | Path) -> Pieces:
    """The model of a file.

    Raises:
        ValueError: it is none, or of another kind than unigram.
    """
    path = Path(path)
    pieces, kinds = [], []
    try:
        model = _parse(path.read_bytes())
        for piece in model.get(1, []):
            fields = _parse(piece)
            pieces.append((fields[1][0].decode(), _float(fields.get(2, [0])[0])))
            kinds.append(fields.get(3, [1])[0])
        trainer = _parse(model.get(2, [b""])[0])
        normalizer = _parse(model.get(3, [b""])[0])
        kind, characters = trainer.get(3, [UNIGRAM])[0], bytes(memoryview(
            normalizer.get(2, [b""])[0]))
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError,
            ValueError) as error:
        raise ValueError(f"{path} is no SentencePiece model ({type(error).__name__}: {error}); "
                         "fetch it again") from None
    if kind != UNIGRAM or UNKNOWN not in kinds:
        raise ValueError(f"{path} is a SentencePiece model of type {kind} with {len(pieces)} "
                         "pieces; only unigram models (type 1) with an unknown piece are here")
    return Pieces(pieces, kinds, characters, bool(normalizer.get(3, [1])[0]),
                  bool(normalizer.get(4, [1])[0]))


def backend(model: Pieces, pieces: list[tuple[str, float]] | None = None,
            unknown: int | None = None) -> Backend:
    """What cuts text as the model does; `pieces` and the id of the unknown one, where a family
    numbers them in its own way."""
    pieces = model.pieces if pieces is None else pieces
    unknown = model.unknown if unknown is None else unknown
    made = Backend(models.Unigram(pieces, unknown, False))
    steps = [normalizers.Precompiled(model.characters)] if model.characters else []
    if model.collapse_spaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex("^ | $"), "")]
    made.normalizer = normalizers.Sequence(steps)
    scheme = "always" if model.add_prefix else "never"
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    whole = [piece for (piece, _), kind in zip(model.pieces, model.kinds) if kind == USER_DEFINED]
    made.add_tokens([AddedToken(piece, normalized=False) for piece in whole])
    return made


def _float(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def _parse(data: bytes) -> dict[int, list]:
    """The fields of a message by number: whole numbers, or bytes; floats as their bits."""
    fields: dict[int, list] = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    return fields


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError(f"a number of more than 64 bits at byte {at}")

    def take(size: int) -> bytes:
        nonlocal at
        if at + size > len(data):
            raise ValueError(f"cut off at byte {len(data)}")
        at += size
        return data[at - size : at]

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
        elif wire in (1, 5):
            yield number, int.from_bytes(take(8 if wire == 1 else 4), "little")
        elif wire == 2:
            yield number, take(varint())
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
