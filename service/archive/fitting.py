"""Matches a file's tensors with an architecture: prefixes, old names, the last layer, shapes.

One rule covers what trainers put around a network: any single prefix that makes the names fit is
removed. If it is not certain which tensors are meant, the user is asked for the prefix.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.models import WeightsEnum

from handler.errors import InvalidModel
from handler.networks import SCALE_INPUT_AGAIN, empty_network
from service.archive.checkpoints import Checkpoint, Tables

OPTION = "--weights-prefix"
AUXILIARY = r"(aux\d|AuxLogits)\."  # heads for training only
WRAPPERS = r"(?<=\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
OLD_NAMES = {  # architectures, and names in files that older releases of torchvision wrote
    "densenet": ((r"(denselayer\d+\.(?:norm|relu|conv))\.(\d\.)", r"\1\2"),),  # still shipped
    "vit_": ((r"\bmlp\.linear_1\.", "mlp.0."), (r"\bmlp\.linear_2\.", "mlp.3.")),  # up to 0.12
}


@dataclass(frozen=True)
class Fit:
    """Tensors that an architecture takes, and notes on how they were found in the file."""

    state: dict[str, Tensor]  # complete, float32, in the network's order
    head: tuple[str, ...]  # names of the last layer's tensors
    classes: int
    notes: tuple[str, ...]  # what was renamed and what was left out, for the log
    has_auxiliary: bool


@dataclass(frozen=True)
class _Layout:
    """The names and shapes of an architecture's tensors."""

    architecture: str
    tensors: dict[str, Tensor]  # on the meta device, for two classes
    head: tuple[str, ...]

    @property
    def head_layer(self) -> str:
        return self.head[0].rpartition(".")[0]

    @property
    def head_root(self) -> str:
        """The outermost module that holds the last layer and no other: `classifier` of 1.weight."""
        root = self.head_layer
        while "." in root:
            parent = root.rpartition(".")[0]
            if {name for name in self.tensors if name.startswith(f"{parent}.")} != {*self.head}:
                break
            root = parent
        return root

    def shape(self, name: str, classes: int) -> list[int]:
        shape = list(self.tensors[name].shape)
        return [classes, *shape[1:]] if name in self.head else shape


@dataclass
class _Attempt:
    """Tensors under one prefix, compared with a layout."""

    prefix: str  # in the whole file: "state_dict.model."
    state: dict[str, Tensor]  # as the network calls them
    beside: list[str]  # of the same dict, not under the prefix; whole names
    layers_beside: list[str]  # those of `beside` that may be layers
    problems: list[str]
    notes: list[str]
    classes: int
    matched: int  # how many names the network has too


def fit_checkpoint(
    checkpoint: Checkpoint, recipe: WeightsEnum, architecture: str, prefix: str | None = None
) -> Fit:
    """The one set of tensors that fits an architecture, or fits under a prefix that is asked for.

    Raises InvalidModel with the first tensor that does not fit and the nearest names there are, or
    with the prefixes among which the user must choose.
    """
    layout, tables = _layout(recipe, architecture), checkpoint.tables
    attempts = _attempts(tables, layout, lambda name: name)
    if all(attempt.problems for attempt in attempts):  # there may be wrappers inside names
        attempts += _attempts(tables, layout, lambda name: re.sub(WRAPPERS, "", name))
    fits = [attempt for attempt in attempts if not attempt.problems]
    if prefix is not None:
        asked = prefix.rstrip(".")
        inside = [fit for fit in fits if fit.prefix.startswith(f"{asked}.")]
        attempts = [attempt for attempt in attempts if attempt.prefix.rstrip(".") == asked]
        attempts = attempts or (inside if len(inside) == 1 else [])  # model_ema: of .module alone
        if not attempts:
            there = _listed([repr(fit.prefix) for fit in fits]) if fits else "none"
            raise InvalidModel(f"{OPTION} {prefix}: no such prefix; those that fit: {there}")
        fits = [attempt for attempt in attempts if not attempt.problems]
    if not fits:
        nearest = max(attempts, key=lambda each: (each.matched, -len(each.problems)))
        raise InvalidModel(_misfit(nearest, tables, layout))
    fit = fits[0]
    if others := [other for other in fits[1:] if not _equal(fit.state, other.state)]:
        prefixes = [f"{OPTION} {each.prefix.rstrip('.')!r}" for each in (fit, *others)]
        raise InvalidModel(
            f"holds {len(prefixes)} different sets of weights that fit {architecture}; choose one: "
            + " or ".join(prefixes)
        )
    copies = tuple(other.prefix for other in fits[1:])  # one module under two names
    layers = [layer for layer in fit.layers_beside if not layer.startswith(copies)]
    if prefix is None and layers:
        raise InvalidModel(
            f"has {_listed(layers)} beside the {architecture} under {fit.prefix!r}: "
            f"a layer that {architecture} lacks, or no part of the model; if it is none, say "
            f"{OPTION} {fit.prefix.rstrip('.')!r}"
        )
    unused = [key for key in checkpoint.entries if not fit.prefix.startswith(f"{key}.")]
    unused += fit.beside
    if has_auxiliary := any(re.match(AUXILIARY, name) for name in fit.state):
        unused.append("the auxiliary heads, which are for training only")
    return Fit(
        _finite(fit.state, layout),
        layout.head,
        fit.classes,
        tuple(fit.notes + ([f"not used: {_listed(unused)}"] if unused else [])),
        has_auxiliary,
    )


def two_outputs(fit: Fit, labels: Sequence[str]) -> Fit:
    """A network of one output, whose sigmoid is meant, as one of two outputs, for a softmax.

    softmax(0, x) is 1 - sigmoid(x) and sigmoid(x). Raises InvalidModel unless two names say that
    this is meant: the softmax of one output is 1.0 for every image.
    """
    if len(labels) != 2:
        raise InvalidModel(
            "it has one output, and with a softmax its confidence is 1.0 for every image; if it "
            "was trained with a sigmoid (BCEWithLogitsLoss), give --labels with two names: that of "
            "target 0, then that of target 1"
        )
    state = {
        name: torch.cat([torch.zeros_like(tensor), tensor]) if name in fit.head else tensor
        for name, tensor in fit.state.items()
    }
    note = (
        f"it has one output: its sigmoid is the confidence of class 1, {labels[1]!r}, and the rest "
        f"to 1.0 that of class 0, {labels[0]!r}"
    )
    return replace(fit, state=state, classes=2, notes=(*fit.notes, note))


def _layout(recipe: WeightsEnum, architecture: str) -> _Layout:
    """The last layer is found by building for two class counts and comparing shapes."""
    two = empty_network(recipe, architecture, 2).state_dict()
    three = empty_network(recipe, architecture, 3).state_dict()
    head = tuple(name for name in two if two[name].shape != three[name].shape)
    return _Layout(architecture, dict(two), head)


def _attempts(tables: Tables, layout: _Layout, rename: Callable[[str], str]) -> list[_Attempt]:
    attempts = []
    for keys, table in tables.items():
        modern = {_modern(rename(name), layout.architecture): name for name in table}
        if len(modern) < len(table):  # two names would become one
            modern = {name: name for name in table}
        for prefix in _prefixes(modern, layout):
            attempts.append(_attempt(keys, prefix, modern, table, layout))
    return attempts


def _modern(name: str, architecture: str) -> str:
    """A tensor's name in this release of torchvision."""
    for family, changes in OLD_NAMES.items():
        if architecture.startswith(family):
            for old, new in changes:
                name = re.sub(old, new, name)
    return name


def _prefixes(names: Mapping[str, str], layout: _Layout) -> list[str]:
    """Prefixes with at least half as many of the network's names as the best; [""] without any."""
    votes: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            if (rest := ".".join(parts[start:])) in layout.tensors:
                votes[name[: len(name) - len(rest)]] += 1
    most = max(votes.values(), default=0)
    return [prefix for prefix, count in votes.items() if 2 * count >= most] or [""]


def _attempt(
    keys: str, prefix: str, modern: Mapping[str, str], table: Mapping[str, Tensor], layout: _Layout
) -> _Attempt:
    """`modern` gives the file's name of each of today's."""
    path = f"{keys}." if keys else ""
    given = {
        name[len(prefix) :]: table[old] for name, old in modern.items() if name.startswith(prefix)
    }
    beside = [old for name, old in modern.items() if not name.startswith(prefix)]
    layers = [
        f"{path}{name} {list(table[name].shape)}"
        for name in beside
        if table[name].dim() > 1 and table[name].is_floating_point()
    ]
    matched = sum(name in given for name in layout.tensors)
    given, note, problem = _find_head(given, layout)
    under = f"the weights are those under {path + prefix!r}" if path + prefix else None
    notes = [text for text in (under, note) if text]
    head = given.get(layout.head[0])
    classes = head.shape[0] if head is not None and head.dim() else 2
    problems = [problem] if problem else []
    for name in layout.tensors:
        if problem := _problem(name, given.get(name), layout, classes):
            problems.append(problem)
    auxiliary = layout.architecture in SCALE_INPUT_AGAIN
    for name in given:
        if name not in layout.tensors and not (auxiliary and re.match(AUXILIARY, name)):
            problems.append(f"{name} is not part of it")
    beside = [path + name for name in beside]
    return _Attempt(path + prefix, given, beside, layers, problems, notes, classes, matched)


def _find_head(
    given: dict[str, Tensor], layout: _Layout
) -> tuple[dict[str, Tensor], str | None, str | None]:
    """The tensors with the last layer under its own name, and perhaps a note, and a problem.

    People replace `fc` by `Sequential(Dropout(), Linear())`: fc.1.weight. Layers without weights
    leave no trace in the file, and are assumed to do nothing when the model is served.
    """
    root, layer = layout.head_root, layout.head_layer
    layers = {name.rpartition(".")[0] for name in given if name.startswith(f"{root}.")}
    if layers == {layer} or not layers:
        return given, None, None
    if len(layers) > 1:
        found = [f"{layer}.weight" for layer in sorted(layers)]
        return given, None, f"{root} is several layers in the file ({_listed(found)}), not one"
    (found_layer,) = layers
    renamed = {
        f"{layer}{name[len(found_layer) :]}" if name.startswith(f"{found_layer}.") else name: each
        for name, each in given.items()
    }
    note = f"{found_layer} is the last layer, {layer}; layers without weights beside it, such as "
    return renamed, f"{note}Dropout, are taken to do nothing", None


def _problem(name: str, given: Tensor | None, layout: _Layout, classes: int) -> str | None:
    if given is None:  # counters of batch norms are unused once trained
        return None if name.endswith("num_batches_tracked") else f"{name} is missing"
    if given.is_complex() or given.is_quantized or given.layout != torch.strided or given.is_meta:
        return f"{name} is complex, quantized, sparse or without data"
    if list(given.shape) != (shape := layout.shape(name, classes)):
        return f"{name} has shape {list(given.shape)}, {layout.architecture} has {shape}"
    return None


def _finite(state: Mapping[str, Tensor], layout: _Layout) -> dict[str, Tensor]:
    """Copies in the network's order and dtypes. Raises InvalidModel for NaN and infinity."""
    fitted = {}
    for name, expected in layout.tensors.items():
        if name not in state:
            fitted[name] = torch.zeros((), dtype=torch.int64)
            continue
        tensor = state[name].detach().to("cpu", expected.dtype).contiguous().clone()
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise InvalidModel(
                f"{name} holds {bad} numbers of {tensor.numel()} that are NaN or infinite: the "
                "training diverged or the file is damaged; take an earlier checkpoint"
            )
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise InvalidModel(
                f"{name} holds negative variances: the file is damaged; take an earlier checkpoint"
            )
        fitted[name] = tensor
    return fitted


def _misfit(attempt: _Attempt, tables: Tables, layout: _Layout) -> str:
    problem, *more = attempt.problems
    message = f"does not fit {layout.architecture}: {problem}"
    message += f" (and {len(more)} more)" if more else ""
    if problem.endswith("is missing"):
        names = [
            f"{key}.{name}" if key else name for key, table in tables.items() for name in table
        ]
        missing = attempt.prefix + problem.split()[0]
        near = difflib.get_close_matches(missing, names, n=3, cutoff=0.5) or names[:3]
        message += f"; nearest in the file: {_listed(near)}"
    return message


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
