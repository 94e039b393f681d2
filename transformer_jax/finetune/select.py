"""What trains: a recipe in words becomes a mask of booleans over the parameters.

| recipe    | trains                                                          | source     |
|-----------|-----------------------------------------------------------------|------------|
| full      | everything                                                      | 1810.04805 |
| head      | the new classifier alone, on frozen features                    | 1903.05987 |
| last_k:N  | the last N layers of each stack, final norm, pooler, classifier | 1911.03090 |
| bitfit    | every bias, and the classifier                                  | 2106.10199 |
| layernorm | scale and bias of every norm, and the classifier                | 2312.11420 |
| regex:R   | every parameter in whose path the regular expression R is found |            |

"+" unites recipes: "head+layernorm". A regular expression may itself contain "+", so `regex:` comes
last: "last_k:2+regex:position_embed".

The mask is a tree of the parameters' structure with a Python bool at each leaf, which is what
`optax.masked`, `tree.split` and `train.step.make_train_step` take.
"""

import difflib
import re
from collections.abc import Callable, Sequence

from transformer_jax.tree import PyTree, count, flatten_paths, map_paths

CLASSIFIER = r"(^|/)classifier/"
_LAYER = re.compile(r"^((?:.*/)?)layer_(\d+)/")


def _last_k(argument: str, paths: Sequence[str]) -> list[str]:
    """The patterns of the last N layers of every stack, and of what comes after a stack."""
    stacks: dict[str, int] = {}
    for path in paths:
        if match := _LAYER.match(path):
            stack, i = match[1], int(match[2])
            stacks[stack] = max(stacks.get(stack, 0), i + 1)
    depth = min(stacks.values(), default=0)
    if not depth:
        raise ValueError("last_k: the parameters have no layer_0, layer_1, ...; use regex: instead")
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
    return [*last, r"(^|/)final_norm/", r"(^|/)pooler/", CLASSIFIER]


# Recipe -> the patterns (searched in paths) of what trains, most characteristic first: the first
# has to match something, or the recipe makes no sense for this model. A recipe whose patterns
# depend on an argument or on the model is a function of both.
RECIPES: dict[str, Sequence[str] | Callable[[str, Sequence[str]], Sequence[str]]] = {
    "full": [r""],
    "head": [CLASSIFIER],
    "last_k": _last_k,
    "bitfit": [r"(^|/)bias$", CLASSIFIER],
    "layernorm": [r"(^|[/_])norm/(scale|bias)$", CLASSIFIER],
    "regex": lambda argument, paths: [argument],
}


def _parts(recipe: str) -> list[tuple[str, str | None]]:
    """[(name, argument)] of a recipe; the argument is None without a colon."""
    before, colon, regex = recipe.partition("regex:")
    names = [name for name in before.removesuffix("+").split("+") if name or not colon]
    parts = [(name, arg if sep else None) for name, sep, arg in (n.partition(":") for n in names)]
    return parts + ([("regex", regex)] if colon else [])


def _patterns(name: str, argument: str | None, paths: Sequence[str]) -> Sequence[str]:
    rule = RECIPES.get(name)
    if rule is None:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.5)
        raise ValueError(
            f"unknown recipe {name!r}{f', did you mean {near[0]!r}?' if near else ';'} "
            "choose from full, head, last_k:N, bitfit, layernorm, regex:..., joined by '+'"
        )
    if callable(rule):
        if not argument:
            example = {"last_k": "last_k:2", "regex": "regex:pooler"}[name]
            raise ValueError(f"recipe {name!r} needs an argument; write for example {example}")
        return rule(argument, paths)
    if argument is not None:
        raise ValueError(f"recipe {name!r} takes no argument, got {argument!r}; write {name!r}")
    return rule


def _nearest(pattern: str, paths: Sequence[str]) -> str:
    """Three paths that a pattern without matches may have meant, of different layers or names."""
    words = re.findall(r"\w+", pattern) or [pattern]

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
        or a recipe that matches nothing (with the nearest names).
    """
    paths = list(flatten_paths(params))
    chosen: set[str] = set()
    for name, argument in _parts(recipe):
        for i, pattern in enumerate(_patterns(name, argument, paths)):
            try:
                found = [path for path in paths if re.search(pattern, path)]
            except re.error as error:
                raise ValueError(
                    f"recipe {recipe!r}: {pattern!r} is no regular expression ({error}); mend it"
                ) from None
            if not found and i == 0:
                raise ValueError(
                    f"recipe {recipe!r}: {name} matches none of {len(paths)} parameters "
                    f"({pattern!r}); the nearest are {_nearest(pattern, paths)}"
                )
            chosen.update(found)
    return map_paths(lambda path, leaf: path in chosen, params)


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
