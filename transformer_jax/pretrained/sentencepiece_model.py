"""Loads SentencePiece model files (Kudo & Richardson 2018) into the `tokenizers` library.

A `.spm` or `.model` file is a serialized protocol buffer of type `ModelProto`. The file
sentencepiece_model.proto in the SentencePiece repository defines the field numbers used here. Only
the fields that determine tokenization are parsed: the pieces with their scores and types, and the
normalizer. The `sentencepiece` package is not needed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

UNIGRAM = 1  # value of TrainerSpec.ModelType
# Values of ModelProto.SentencePiece.Type; 1 is a normal piece.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4


class SentencePieceModel(NamedTuple):
    """A unigram model, with the field names of sentencepiece_model.proto.

    Attributes:
        pieces: (piece, log probability), in the order of their ids.
        types: the type of each piece, such as `CONTROL`.
        precompiled_charsmap: serialized rules of character normalization; empty for none.
        add_dummy_prefix: whether a space is prepended to every text.
        remove_extra_whitespaces: whether repeated, leading and trailing spaces are removed.
    """

    pieces: list[tuple[str, float]]
    types: list[int]
    precompiled_charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    @property
    def unk_id(self) -> int:
        """Id of the piece for unknown characters."""
        return self.types.index(UNKNOWN)


def load_model(path: str | Path) -> SentencePieceModel:
    """Loads a SentencePiece model file.

    Raises:
        ValueError: the file is not a SentencePiece model, or not a unigram model.
    """
    path = Path(path)
    pieces, types = [], []
    try:
        model = _parse_message(path.read_bytes())
        for piece in model.get(1, []):
            fields = _parse_message(piece)
            pieces.append((fields[1][0].decode(), _float(fields.get(2, [0])[0])))
            types.append(fields.get(3, [1])[0])
        trainer = _parse_message(model.get(2, [b""])[0])
        normalizer = _parse_message(model.get(3, [b""])[0])
        model_type = trainer.get(3, [UNIGRAM])[0]
        # `memoryview` raises TypeError for an integer, which `bytes` would accept as a length.
        charsmap = bytes(memoryview(normalizer.get(2, [b""])[0]))
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError,
            ValueError) as error:
        raise ValueError(f"{path} is not a SentencePiece model ({type(error).__name__}: {error}); "
                         "the file is corrupted or truncated; download it again") from None
    if model_type != UNIGRAM or UNKNOWN not in types:
        raise ValueError(f"unsupported SentencePiece model {path} of type {model_type} with "
                         f"{len(pieces)} pieces; supported: unigram models (type 1) with an "
                         "unknown piece")
    return SentencePieceModel(pieces, types, charsmap, bool(normalizer.get(3, [1])[0]),
                              bool(normalizer.get(4, [1])[0]))


def make_backend(model: SentencePieceModel, pieces: list[tuple[str, float]] | None = None,
                 unk_id: int | None = None) -> Backend:
    """Makes a tokenizer of the `tokenizers` library that is equivalent to a SentencePiece model.

    Args:
        model: the SentencePiece model.
        pieces: (piece, log probability) in the order of their ids, for checkpoints whose ids differ
            from those of the SentencePiece model; `model.pieces` if None.
        unk_id: id of the unknown piece in `pieces`; `model.unk_id` if None.

    Example:

        >>> pieces = [("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)]
        >>> model = SentencePieceModel(pieces, [UNKNOWN, 1, 1], b"", True, True)
        >>> make_backend(model).encode(" ab  a").tokens
        ['▁a', 'b', '▁a']
    """
    pieces = model.pieces if pieces is None else pieces
    unk_id = model.unk_id if unk_id is None else unk_id
    backend = Backend(models.Unigram(pieces, unk_id, False))
    steps = []
    if model.precompiled_charsmap:
        steps.append(normalizers.Precompiled(model.precompiled_charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex("^ | $"), "")]
    backend.normalizer = normalizers.Sequence(steps)
    scheme = "always" if model.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    backend.add_tokens([AddedToken(piece, normalized=False)
                        for (piece, _), piece_type in zip(model.pieces, model.types)
                        if piece_type == USER_DEFINED])
    return backend


def _float(bits: int) -> float:
    """Converts the bits of a float32, given as an integer, to a float."""
    return float(np.uint32(bits).view(np.float32))


def _parse_message(data: bytes) -> dict[int, list]:
    """Parses a protocol buffer message to a dict from field number to values.

    Values are integers or bytes; the value of a float field is the integer with the same bits.
    """
    fields: dict[int, list] = {}
    for number, value in _iter_fields(data):
        fields.setdefault(number, []).append(value)
    return fields


def _iter_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError(f"an integer of more than 64 bits at byte {position}")

    def take(size: int) -> bytes:
        nonlocal position
        if position + size > len(data):
            raise ValueError(f"the message ends at byte {len(data)}, within a field")
        position += size
        return data[position - size : position]

    while position < len(data):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
        elif wire_type in (1, 5):
            yield number, int.from_bytes(take(8 if wire_type == 1 else 4), "little")
        elif wire_type == 2:
            yield number, take(varint())
        else:
            raise ValueError(f"unknown wire type {wire_type} at byte {position}")
