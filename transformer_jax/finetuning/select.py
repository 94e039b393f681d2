"""What trains: a recipe in words becomes a mask of booleans over the parameters.

| recipe     | trains, besides new parameters                     | source                         |
|------------|----------------------------------------------------|--------------------------------|
| full       | everything                                         | 1810.04805                     |
| head       | nothing: features stay frozen                      | 1903.05987                     |
| last_k:N   | the last N layers of each stack, final norm, pooler | 1911.03090                    |
| layers:A-B | layers A to B of each stack, counted from 0        | 1911.03090                     |
| embeddings | tables of tokens, positions and segments           | 1910.11856                     |
| bitfit     | every bias                                         | 2106.10199                     |
| layernorm  | scale and bias of every norm                       | 2312.11420                     |
| lora:R     | low-rank updates of some kernels                   | 2106.09685                     |
| adapter:M  | bottlenecks after each sublayer, and norms         | 1902.00751                     |
| prefix:P   | keys and values in front of every attention's      | 2101.00190                     |
| prompt:P   | vectors in front of the embedded tokens            | 2104.08691                     |
| ia3        | factors of keys, values and MLP activations        | 2205.05638                     |
| regex:R    | in whose path the regular expression R is found (without new parameters) |          |

New parameters are the classifier, the pooler of an encoder-decoder (no checkpoint is pre-trained
with one) and the rows of new special tokens. lora, adapter, prefix, prompt and ia3 train parameters
that `deltas.add_deltas` makes first; see there for their arguments.

"+" unites recipes: "lora:8+layernorm". A regular expression may itself contain "+", so `regex:`
comes last: "last_k:2+regex:position_embed".

The mask is a tree of the parameters' structure with a Python bool at each leaf, which is what
`optax.masked`, `tree.partition` and `train.step.make_train_step` take.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import regex  # `re` with a limit of time: what users write may backtrack without end

from transformer_jax.tree import PyTree, count, flatten_paths, map_paths

CLASSIFIER = r"(^|/)classifier/"
EXTRA_TOKENS = r"(^|/)token_embed/extra$"
NORMS = r"(^|[/_])norm/(scale|bias)$"
_LAYER = re.compile(r"^((?:.*/)?)layer_(\d+)/")


def new_parameters(paths: Sequence[str]) -> list[str]:
    """The patterns of parameters that no pre-training made: see the top of this file."""
    seq2seq = any(p.startswith("encoder/") for p in paths) and any(
        p.startswith("decoder/") for p in paths)
    return [CLASSIFIER, EXTRA_TOKENS, *([r"^pooler/"] if seq2seq else [])]


def _head(argument: str | None, paths: Sequence[str]) -> Sequence[str]:
    return new_parameters(paths)


def _stacks(paths: Sequence[str]) -> dict[str, int]:
    """The number of layers of every stack, by the stack's path."""
    stacks: dict[str, int] = {}
    for path in paths:
        if match := _LAYER.match(path):
            stacks[match[1]] = max(stacks.get(match[1], 0), int(match[2]) + 1)
    return stacks


def _numbered(name: str, paths: Sequence[str]) -> tuple[dict[str, int], int]:
    stacks = _stacks(paths)
    if not stacks:
        raise ValueError(
            f"{name}: the parameters have no layer_0, layer_1, ...; use regex: instead")
    return stacks, min(stacks.values())


def _last_k(argument: str, paths: Sequence[str]) -> list[str]:
    """The patterns of the last N layers of every stack, and of what comes after a stack."""
    stacks, depth = _numbered("last_k", paths)
    if not argument.isdecimal() or not 1 <= int(argument) <= depth:
        raise ValueError(
            f"last_k:{argument}: the number of layers has to be from 1 to {depth}; "
            f"write for example last_k:{min(2, depth)}"
        )
    last = [
        f"^{re.escape(stack)}layer_{i}/"
        for stack, layers in stacks.items()
        for i in range(layers - int(argument), layers)
    ]
    return [*last, r"(^|/)final_norm/", r"(^|/)pooler/"]


def _layers(argument: str, paths: Sequence[str]) -> list[str]:
    """The patterns of layers A to B, or of layer A alone, of every stack."""
    _, depth = _numbered("layers", paths)
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", argument)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not first <= last < depth:
        raise ValueError(
            f"layers:{argument}: the layers have to be from 0 to {depth - 1}, first to last; "
            f"write for example layers:{max(depth - 2, 0)}-{depth - 1}"
        )
    return [rf"(^|/)layer_{i}/" for i in range(first, last + 1)]


class Spec(NamedTuple):
    """What a recipe trains.

    `patterns` are searched in paths; the first has to match something, or the recipe makes no sense
    for this model. Patterns that depend on the argument or on the model are a function of both.
    """

    patterns: Sequence[str] | Callable[[str, Sequence[str]], Sequence[str]]
    example: str = ""  # of the recipe with its argument, where it takes one
    adds: bool = False  # trains what `deltas.add_deltas` makes
    new: bool = True  # trains new parameters too


SPECS: dict[str, Spec] = {
    "full": Spec([r""]),
    "head": Spec(_head),
    "last_k": Spec(_last_k, "last_k:2"),
    "layers": Spec(_layers, "layers:8-11"),
    "embeddings": Spec([r"(^|/)token_embed/", r"(position|segment)_embed/"]),
    "bitfit": Spec([r"(^|/)bias$"]),
    "layernorm": Spec([NORMS]),
    "lora": Spec([r"/lora_(a|b|magnitude)$"], "lora:8", adds=True),
    "adapter": Spec([r"_adapter/", NORMS], "adapter:64", adds=True),
    "prefix": Spec([r"/prefix_(key|value)$"], "prefix:16", adds=True),
    "prompt": Spec([r"^prompt$"], "prompt:16", adds=True),
    "ia3": Spec([r"/ia3_(input|output)$"], adds=True),
    "regex": Spec(lambda argument, paths: [argument], "regex:pooler", new=False),
}
SECONDS_A_PATH = 1.0  # that a regular expression may take; what people mean takes microseconds


def split_spec(recipe: str) -> list[tuple[str, str | None]]:
    """[(name, argument)] of a recipe; the argument is None without a colon.

    Raises:
        ValueError: an unknown name, or an argument that is missing or not taken.
    """
    before, colon, pattern = recipe.partition("regex:")
    names = [name for name in before.removesuffix("+").split("+") if name or not colon]
    found = [(name, arg if sep else None) for name, sep, arg in (n.partition(":") for n in names)]
    found += [("regex", pattern)] if colon else []
    for name, argument in found:
        if name not in SPECS:
            near = difflib.get_close_matches(name, SPECS, n=1, cutoff=0.5)
            raise ValueError(
                f"unknown recipe {name!r}{f', did you mean {near[0]!r}?' if near else ';'} "
                "choose from "
                + ", ".join(rule.example or name for name, rule in SPECS.items())
                + ", joined by '+'"
            )
        example = SPECS[name].example
        if example and not argument:
            raise ValueError(f"recipe {name!r} needs an argument; write for example {example}")
        if argument is not None and not example:
            raise ValueError(f"recipe {name!r} takes no argument, got {argument!r}; write {name!r}")
    return found


def _patterns(name: str, argument: str | None, paths: Sequence[str]) -> list[str]:
    own = SPECS[name].patterns
    own = own(argument, paths) if callable(own) else own
    return [*own, *(new_parameters(paths) if SPECS[name].new else ())]


def _nearest(pattern: str, paths: Sequence[str]) -> str:
    """Three paths that a pattern without matches may have meant, of different layers or names."""
    words = (re.findall(r"\w+", pattern) or [pattern])[:8]  # who wrote more meant no one name

    def likeness(path: str) -> float:
        parts = path.split("/")
        return sum(
            max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts)
            for word in words
        )

    kinds: dict[str, str] = {}  # one path stands for the same parameter of all layers
    for path in sorted(paths, key=likeness, reverse=True):
        kinds.setdefault(re.sub(r"layer_\d+", "", path), path)
    return ", ".join(list(kinds.values())[:3])


def trainable_mask(params: PyTree, recipe: str) -> PyTree:
    """The mask of what `recipe` trains: True where a parameter trains.

    Args:
      params: parameters, or abstract ones (`jax.eval_shape`); only paths are looked at.
      recipe: see the table at the top of this file, for example "head" or "last_k:2+layernorm".

    Raises:
      ValueError: an unknown recipe, a number of layers out of range, a broken regular expression,
        a recipe that matches nothing (with the nearest names), one whose deltas are not there, or
        one that would train what is kept in int8.
    """
    paths = list(flatten_paths(params))
    chosen: set[str] = set()
    for name, argument in split_spec(recipe):
        for i, pattern in enumerate(_patterns(name, argument, paths)):
            try:
                found = [path for path in paths
                         if regex.search(pattern, path, timeout=SECONDS_A_PATH)]
            except regex.error as error:
                raise ValueError(
                    f"recipe {recipe!r}: {pattern!r} is no regular expression ({error}); mend it"
                ) from None
            except TimeoutError:
                raise ValueError(
                    f"recipe {recipe!r}: {pattern!r} tries for over {SECONDS_A_PATH} s how it "
                    "could match one path; write fewer repetitions (* and +) one after another"
                ) from None
            if not found and i == 0 and SPECS[name].adds:
                raise ValueError(
                    f"recipe {recipe!r}: the parameters have no {name}; add it first: "
                    "deltas.add_deltas(params, recipe, rng)"
                )
            if not found and i == 0:
                raise ValueError(
                    f"recipe {recipe!r}: {name} matches none of {len(paths)} parameters "
                    f"({pattern!r}); the nearest are {_nearest(pattern, paths)}"
                )
            chosen.update(found)
    if small := sorted(path for path in chosen if path.endswith("_int8")):
        raise ValueError(f"recipe {recipe!r}: {small[0]} is kept in int8, which does not train; "
                         "choose what trains before `shrink`, or `shrink.restore` it")
    # Factors that are settings, such as a LoRA's scale, never train, not even in "full".
    return map_paths(lambda path, leaf: path in chosen and not SETTINGS.search(path), params)


SETTINGS = re.compile(r"/lora_(scale|dropout)$|_(int8|scale)$")


def describe(params: PyTree, mask: PyTree) -> str:
    """A table of what trains: leaves, parameters and share, by top-level group and in total."""
    leaves, trains = flatten_paths(params), flatten_paths(mask)
    groups: dict[str, list[str]] = {}
    for path in leaves:
        groups.setdefault(path.split("/")[0], []).append(path)

    def row(name: str, paths: Sequence[str]) -> str:
        ours = [path for path in paths if trains[path]]
        size, total = (count([leaves[path] for path in some]) for some in (ours, paths))
        ratio = f"{len(ours)}/{len(paths)}"
        share = 100 * size / total if total else 0.0
        return f"{name:<16} {ratio:>9} {size:>13,} {total:>13,} {share:>7.2f} %"

    head = f"{'trains':<16} {'leaves':>9} {'parameters':>13} {'of':>13} {'share':>9}"
    rows = [row(name, paths) for name, paths in groups.items()]
    return "\n".join([head, *rows, row("total", list(leaves))])
