"""Random mutations of bytes, JSON values and texts, for `fuzz.py`."""

import copy
import json
import random
from typing import Any

# JSON values that are often handled wrongly.
JSON_VALUES = (None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70), 10**10, 1e308, -0.0,
               float("nan"), float("inf"), "", "a", "\x00", "\ud800", "é" * 50, [], {}, [[]],
               [None], {"a": {}}, [1, 2, 3], "1" * 5000, 3.5)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flips, deletes, repeats, moves or inserts a few bytes."""
    mutated = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        start = rng.randrange(len(mutated) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 32))
        match rng.randrange(7):
            case 0 if mutated:
                mutated[start % len(mutated)] ^= 1 << rng.randrange(8)
            case 1:
                del mutated[start : start + length]
            case 2:
                mutated[start:start] = mutated[start : start + length] * rng.choice((1, 2, 50))
            case 3:
                mutated[start:start] = rng.randbytes(length)
            case 4:
                mutated[start : start + length] = rng.choice((b"\xff", b"\x00", b"\x80")) * length
            case 5:
                other = rng.randrange(len(mutated) + 1)
                mutated[start:start] = mutated[other : other + length]
            case 6:
                mutated[start:start] = rng.choice((
                    b"[", b"{", b'"', b"\t", b"\n", b"\r", b"[[" * 30000, b"9" * 5000,
                    b"\xed\xa0\x80", b"\\ud800", b"1e999"))
    return bytes(mutated)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Replaces, scales or deletes a few values anywhere in a JSON value."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 4))):
        container = value
        while isinstance(container, dict | list) and container:
            keys = list(container) if isinstance(container, dict) else range(len(container))
            key = rng.choice(keys)
            child = container[key]
            if not isinstance(child, dict | list) or not child or rng.random() < 0.3:
                break
            container = child
        if not isinstance(container, dict | list) or not container:
            return copy.deepcopy(rng.choice(JSON_VALUES))
        action = rng.random()
        if action < 0.15:
            del container[key]
        elif action < 0.25 and isinstance(container[key], int | float):
            container[key] = container[key] * rng.choice((-1, 0, 2, 0.5, 10**9))
        elif action < 0.35:
            other = value[rng.choice(list(value))] if isinstance(value, dict) and value else None
            container[key] = json.loads(json.dumps(other))
        else:
            container[key] = copy.deepcopy(rng.choice(JSON_VALUES))
    return value


def mutate_json_bytes(data: bytes, rng: random.Random) -> bytes:
    """Mutates JSON either as bytes or as a value."""
    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    return json.dumps(mutate_json(json.loads(data), rng)).encode()


def mutate_text(text: str, rng: random.Random) -> str:
    """Mutates the bytes of a text, or inserts random characters of Unicode."""
    if rng.random() < 0.3:
        start = rng.randrange(len(text) + 1)
        inserted = "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x110000))))
                           for _ in range(rng.randint(1, 8)))
        return text[:start] + inserted + text[start:]
    return mutate_bytes(text.encode(errors="surrogatepass"), rng).decode(errors="replace")
