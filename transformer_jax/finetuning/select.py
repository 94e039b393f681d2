"""Trainable specs: strings that name the parameters which a fine-tuning run trains.

| spec       | trainable parameters                                | source                      |
|------------|-----------------------------------------------------|-----------------------------|
| full       | all                                                 | Devlin et al. 1810.04805    |
| head       | only the newly initialized ones                     | Peters et al. 1903.05987    |
| last_k:N   | last N layers of each stack, final norm, pooler     | Lee et al. 1911.03090       |
| layers:A-B | layers A to B of each stack, counted from 0         | Lee et al. 1911.03090       |
| embeddings | token, position and segment embeddings              | Artetxe et al. 1910.11856   |
| bitfit     | biases                                              | Ben Zaken et al. 2106.10199 |
| layernorm  | scales and biases of LayerNorms                     | Zhao et al. 2312.11420      |
| lora:R     | low-rank updates of kernels                         | Hu et al. 2106.09685        |
| adapter:M  | bottleneck adapters after each sublayer, LayerNorms | Houlsby et al. 1902.00751   |
| prefix:P   | keys and values prepended in each attention layer   | Li & Liang 2101.00190       |
| prompt:P   | vectors prepended to the token embeddings           | Lester et al. 2104.08691    |
| ia3        | scales of keys, values and MLP activations          | Liu et al. 2205.05638       |
| regex:R    | paths in which the regular expression R matches     |                             |

The sources are on arXiv. All but `regex` also train the newly initialized parameters.

Newly initialized parameters are those that no checkpoint contains: the classifier, the pooler of an
encoder-decoder, and the embeddings of added tokens. lora, adapter, prefix, prompt and ia3 train
PEFT parameters, which `peft.add_peft_params` must add first; the module docstring of `peft` lists
the arguments of these terms.

A spec consists of one or several terms joined by "+": "lora:8+layernorm" trains the parameters of
both. A regular expression may itself contain "+", so `regex:` must be the last term:
"last_k:2+regex:position_embed".

The mask of a spec is a tree with the structure of the parameters and a Python bool at each leaf, as
`optax.masked`, `tree.partition` and `train.step.make_train_step` expect.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import regex  # like `re`, with a timeout: expressions given by users may backtrack exponentially

from transformer_jax.errors import did_you_mean
from transformer_jax.tree import PyTree, count, flatten_paths, map_paths

CLASSIFIER = r"(^|/)classifier/"
EXTRA_TOKENS = r"(^|/)token_embed/extra$"
NORMS = r"(^|[/_])norm/(scale|bias)$"
# Leaves that are never trained, not even by "full": LoRA's scale and dropout rate, int8 weights.
NON_TRAINABLE = re.compile(r"/lora_(scale|dropout)$|_(int8|scale)$")
REGEX_TIMEOUT = 1.0  # seconds for one path; reasonable expressions take microseconds
_LAYER = re.compile(r"^((?:.*/)?)layer_(\d+)/")
LORA_TARGETS = ("query", "key", "value", "out", "wi", "wo")


def new_param_patterns(paths: Sequence[str]) -> list[str]:
    """Returns regular expressions for the newly initialized parameters of a model.

    The pooler counts as newly initialized only in an encoder-decoder.
    """
    is_encoder_decoder = any(p.startswith("encoder/") for p in paths) and any(
        p.startswith("decoder/") for p in paths)
    return [CLASSIFIER, EXTRA_TOKENS, *([r"^pooler/"] if is_encoder_decoder else [])]


def _layers_per_stack(name: str, paths: Sequence[str]) -> dict[str, int]:
    """Returns stack path -> number of layers; `name` is the term, for the error message."""
    stacks: dict[str, int] = {}
    for path in paths:
        if match := _LAYER.match(path):
            stacks[match[1]] = max(stacks.get(match[1], 0), int(match[2]) + 1)
    if not stacks:
        raise ValueError(
            f"{name}: the parameters have no layer_0, layer_1, ...; use regex: instead")
    return stacks


def _last_k(argument: str, paths: Sequence[str]) -> list[str]:
    """Patterns of the last N layers of each stack, the final norm and the pooler."""
    stacks = _layers_per_stack("last_k", paths)
    num_layers = min(stacks.values())
    if not argument.isdecimal() or not 1 <= int(argument) <= num_layers:
        raise ValueError(f"last_k:{argument}: the number of layers must be from 1 to {num_layers}, "
                         f"for example last_k:{min(2, num_layers)}")
    last = [f"^{re.escape(stack)}layer_{i}/" for stack, layers in stacks.items()
            for i in range(layers - int(argument), layers)]
    return [*last, r"(^|/)final_norm/", r"(^|/)pooler/"]


def _layers(argument: str, paths: Sequence[str]) -> list[str]:
    """Patterns of the layers A to B, or of layer A alone, of each stack."""
    num_layers = min(_layers_per_stack("layers", paths).values())
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", argument)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < num_layers:
        raise ValueError(
            f"layers:{argument}: the layers must be from 0 to {num_layers - 1}, as FIRST-LAST, "
            f"for example layers:{max(num_layers - 2, 0)}-{num_layers - 1}")
    return [rf"(^|/)layer_{i}/" for i in range(first, last + 1)]


class SpecTerm(NamedTuple):
    """Definition of one kind of term in a trainable spec.

    `patterns` are regular expressions that are searched in the paths, or a function (argument of
    the term, paths) that returns them. The first must match at least one path.
    """

    patterns: Sequence[str] | Callable[[str, Sequence[str]], Sequence[str]]
    example: str = ""  # the term with an argument; empty if it takes none
    adds_params: bool = False  # whether `peft.add_peft_params` adds the parameters
    trains_new_params: bool = True  # whether newly initialized parameters are trained too


SPEC_TERMS: dict[str, SpecTerm] = {
    "full": SpecTerm([r""]),
    "head": SpecTerm(lambda argument, paths: new_param_patterns(paths)),
    "last_k": SpecTerm(_last_k, "last_k:2"),
    "layers": SpecTerm(_layers, "layers:8-11"),
    "embeddings": SpecTerm([r"(^|/)token_embed/", r"(position|segment)_embed/"]),
    "bitfit": SpecTerm([r"(^|/)bias$"]),
    "layernorm": SpecTerm([NORMS]),
    "lora": SpecTerm([r"/lora_(a|b|magnitude)$"], "lora:8", adds_params=True),
    "adapter": SpecTerm([r"_adapter/", NORMS], "adapter:64", adds_params=True),
    "prefix": SpecTerm([r"/prefix_(key|value)$"], "prefix:16", adds_params=True),
    "prompt": SpecTerm([r"^prompt$"], "prompt:16", adds_params=True),
    "ia3": SpecTerm([r"/ia3_(input|output)$"], adds_params=True),
    "regex": SpecTerm(lambda argument, paths: [argument], "regex:pooler", trains_new_params=False),
}


def split_spec(spec: str) -> list[tuple[str, str | None]]:
    """Splits a trainable spec into (name, argument) of each term; None if it has no argument.

    Raises a ValueError if a name is unknown, or an argument is missing or not accepted.

    Example:
        >>> split_spec("lora:8+bitfit")
        [('lora', '8'), ('bitfit', None)]
    """
    before, colon, pattern = spec.partition("regex:")
    words = [word for word in before.removesuffix("+").split("+") if word or not colon]
    found = [(name, arg if sep else None) for name, sep, arg in (w.partition(":") for w in words)]
    found += [("regex", pattern)] if colon else []
    for name, argument in found:
        if name not in SPEC_TERMS:
            terms = [term.example or name for name, term in SPEC_TERMS.items()]
            raise ValueError(f"unknown trainable spec {name!r}; "
                             f"{did_you_mean(name, terms, show_all=True)}, joined by '+'")
        example = SPEC_TERMS[name].example
        if example and not argument:
            raise ValueError(f"{name!r} needs an argument, for example {example}")
        if argument is not None and not example:
            raise ValueError(f"{name!r} takes no argument, got {argument!r}; write {name!r}")
    return found


def _patterns(name: str, argument: str | None, paths: Sequence[str]) -> list[str]:
    term = SPEC_TERMS[name]
    patterns = term.patterns(argument, paths) if callable(term.patterns) else term.patterns
    return [*patterns, *(new_param_patterns(paths) if term.trains_new_params else ())]


def _closest_paths(pattern: str, paths: Sequence[str]) -> str:
    """Returns the three paths that are most similar to a pattern without matches."""
    names = (re.findall(r"\w+", pattern) or [pattern])[:8]

    def similarity(path: str) -> float:
        return sum(max(difflib.SequenceMatcher(None, name, key).ratio() for key in path.split("/"))
                   for name in names)

    closest: dict[str, str] = {}  # the same parameter of several layers is shown once
    for path in sorted(paths, key=similarity, reverse=True):
        closest.setdefault(re.sub(r"layer_\d+", "", path), path)
    return ", ".join(list(closest.values())[:3])


def trainable_mask(params: PyTree, spec: str) -> PyTree:
    """Returns the mask of the trainable parameters: True where a parameter is trained.

    Args:
        params: parameters, or abstract ones (`jax.eval_shape`); only their paths are used.
        spec: trainable spec, such as "head" or "last_k:2+layernorm" (see the module docstring).

    Raises:
        ValueError: a term of the spec is unknown, a number of layers is out of range, a regular
            expression is invalid or too slow, a term matches no parameter (the message has the
            closest paths), PEFT parameters were not added, or the spec selects int8 parameters.

    Example:
        >>> params = {"wi": {"kernel": 0, "bias": 0}, "classifier": {"kernel": 0, "bias": 0}}
        >>> trainable_mask(params, "bitfit")["wi"]
        {'bias': True, 'kernel': False}
    """
    paths = list(flatten_paths(params))
    selected: set[str] = set()
    for name, argument in split_spec(spec):
        for i, pattern in enumerate(_patterns(name, argument, paths)):
            try:
                matches = [path for path in paths
                           if regex.search(pattern, path, timeout=REGEX_TIMEOUT)]
            except regex.error as error:
                raise ValueError(f"trainable spec {spec!r}: {pattern!r} is not a valid regular "
                                 f"expression ({error})") from None
            except TimeoutError:
                raise ValueError(
                    f"trainable spec {spec!r}: matching {pattern!r} with one path takes more than "
                    f"{REGEX_TIMEOUT} s; use fewer consecutive repetitions (* and +)") from None
            if not matches and i == 0:
                raise ValueError(f"trainable spec {spec!r}: " + (
                    f"the parameters have no {name} parameters; add them first with "
                    "finetuning.peft.add_peft_params(params, spec, rng)"
                    if SPEC_TERMS[name].adds_params else
                    f"{name} matches none of {len(paths)} parameters ({pattern!r}); the closest "
                    f"are {_closest_paths(pattern, paths)}"))
            selected.update(matches)
    if int8_paths := sorted(path for path in selected if path.endswith("_int8")):
        raise ValueError(f"trainable spec {spec!r}: {int8_paths[0]} is quantized to int8 and "
                         "cannot be trained; make the mask before `quantize_frozen`, or call "
                         "`dequantize` first")
    return map_paths(
        lambda path, leaf: path in selected and not NON_TRAINABLE.search(path), params)


def describe(params: PyTree, mask: PyTree) -> str:
    """Returns a table of the trainable parameters, by top-level group and in total.

    The columns count trainable / all leaves, trainable parameters and all parameters.

    Example:
        >>> import numpy as np
        >>> params = {"body": np.zeros(90), "classifier": np.zeros(10)}
        >>> print(describe(params, {"body": False, "classifier": True}))
        group               leaves     trainable    parameters     share
        body                   0/1             0            90    0.00 %
        classifier             1/1            10            10  100.00 %
        total                  1/2            10           100   10.00 %
    """
    leaves, is_trainable = flatten_paths(params), flatten_paths(mask)
    groups: dict[str, list[str]] = {}
    for path in leaves:
        groups.setdefault(path.split("/")[0], []).append(path)

    def row(name: str, paths: Sequence[str]) -> str:
        trainable = [path for path in paths if is_trainable[path]]
        size, total = (count([leaves[path] for path in some]) for some in (trainable, paths))
        num_leaves = f"{len(trainable)}/{len(paths)}"
        percent = 100 * size / total if total else 0.0
        return f"{name:<16} {num_leaves:>9} {size:>13,} {total:>13,} {percent:>7.2f} %"

    header = f"{'group':<16} {'leaves':>9} {'trainable':>13} {'parameters':>13} {'share':>9}"
    return "\n".join([header, *(row(*group) for group in groups.items()), row("total", [*leaves])])


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Options of a low-rank update W + s A B.

    `targets` are names of linear layers. Alpha is the numerator of s = alpha / R (Hu et al. 2021,
    "LoRA", section 4.1), by default 2 R; with `rslora`, s = alpha / sqrt(R) (Kalajdzievski 2023,
    "rsLoRA", theorem 3.2). With `dora`, magnitude and direction are trained separately (Liu et al.
    2024, "DoRA", section 4). Dropout applies to the input of A.
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
    """Parses the argument of a `lora` term: rank, targets and options.

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
    """Parses the size in a term of a trainable spec, such as the 64 of "adapter:64"."""
    if not argument.isdecimal() or int(argument) < 1:
        raise ValueError(f"{name}:{argument}: the size is {argument!r}; it must be an integer of "
                         f"at least 1, for example {name}:8")
    return int(argument)
