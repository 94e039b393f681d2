"""Parsing of the arguments of PEFT terms in a trainable spec (`peft` lists the terms)."""

import dataclasses
import math

LORA_TARGETS = ("query", "key", "value", "out", "wi", "wo")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Options of a low-rank update W + s A B.

    Attributes:
        rank: R, the number of columns of A and of rows of B.
        targets: names of the linear layers that are updated.
        alpha: the numerator of s = alpha / R (Hu et al. 2021, "LoRA", section 4.1); 2 R if None.
        dropout: dropout rate on the input of A.
        rslora: whether s is alpha / sqrt(R) instead (Kalajdzievski 2023, "rsLoRA", theorem 3.2).
        dora: whether magnitude and direction are trained separately (Liu et al. 2024, "DoRA",
            section 4).

    Example:
        >>> LoRA(rank=8).scale
        2.0
    """

    rank: int
    targets: tuple[str, ...] = ("query", "value")
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def parse_lora(argument: str) -> LoRA:
    """Parses the argument of a `lora` term of a trainable spec.

    Args:
        argument: rank, targets and options, such as "8:query,value,alpha=16,dora".

    Raises:
        ValueError: the rank is below 1, a target or option is unknown, or a value is out of range.

    Example:
        >>> parse_lora("8:out,alpha=16")
        LoRA(rank=8, targets=('out',), alpha=16.0, dropout=0.0, rslora=False, dora=False)
    """
    rank, _, rest = argument.partition(":")
    options: dict = {"rank": parse_size("lora", rank)}
    targets: list[str] = []
    for word in filter(None, rest.split(",")):
        name, equals, value = word.partition("=")
        if word in ("rslora", "dora"):
            options[word] = True
        elif word == "all":
            targets += LORA_TARGETS
        elif word in LORA_TARGETS:
            targets.append(word)
        elif equals and name in ("alpha", "dropout"):
            options[name] = _parse_number(name, value)
        else:
            raise ValueError(f"lora:{argument}: unknown target or option {word!r}; targets are "
                             f"{', '.join(LORA_TARGETS)} or all, options are alpha=, dropout=, "
                             "rslora, dora")
    if targets:
        options["targets"] = tuple(dict.fromkeys(targets))
    return LoRA(**options)


def _parse_number(name: str, value: str) -> float:
    """Parses alpha or dropout of LoRA."""
    low, high = (0.0, math.inf) if name == "alpha" else (-1e-300, 1.0)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not low < number < high:
        raise ValueError(f"{name} of lora is {value!r}; it must be "
                         + ("a number above 0" if name == "alpha" else "at least 0 and below 1"))
    return number


def parse_size(name: str, argument: str) -> int:
    """Parses the size in a term of a trainable spec, such as the 64 of "adapter:64".

    Args:
        name: name of the term, for the error message.
        argument: argument of the term.

    Raises:
        ValueError: the argument is not an integer of at least 1.
    """
    if not argument.isdecimal() or int(argument) < 1:
        raise ValueError(f"{name}:{argument}: the size is {argument!r}; it must be an integer of "
                         f"at least 1, for example {name}:8")
    return int(argument)
