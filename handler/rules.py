"""Rules of settings, each beside its setting, and the one loader that holds values against them.

A setting is a field of a frozen dataclass, declared with what it means and what is allowed:

    top_k: int = setting(5, "classes in an answer if the request does not say", low=1, high=1000)

./scripts/generate makes the tables of docs/settings.md from the same declarations.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from handler.environment import own_variables
from handler.errors import InvalidSettings

T = TypeVar("T")

_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping of settings",
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a value may be."""

    type: Any  # int, float, bool, str, list[int], dict or a dataclass; with `| None` if optional
    low: int | None = None
    high: int | None = None
    choices: tuple[str, ...] = ()
    meaning: str = ""  # one line for the document
    default: Any = None  # MISSING if it must be given

    @property
    def kind(self) -> str:
        """The type in words, with the lowest value if there is no highest."""
        at_least = self.low is not None and self.high is None
        return _KINDS[_plain(self.type)] + (f", {self.low} or more" if at_least else "")

    @property
    def allowed(self) -> str:
        """The whole rule in words: "1 to 1000", "one of auto, cpu, cuda", "true or false"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return self.kind if self.high is None else f"{self.low} to {self.high}"

    def check(self, name: str, value: Any) -> None:
        """Raise InvalidSettings with the name, the rule and the value."""
        if not _fits(value, self.type):
            raise InvalidSettings(f"{name} must be {self.kind}, got {value!r}")
        if value is None:
            return
        too_low = self.low is not None and value < self.low
        too_high = self.high is not None and value > self.high
        if too_low or too_high or (self.choices and value not in self.choices):
            raise InvalidSettings(f"{name} must be {self.allowed}, got {value!r}")

    def parse(self, name: str, text: str) -> Any:
        """The value that the text of a variable stands for. Raises InvalidSettings."""
        if self.type is int:
            try:
                return int(text)
            except ValueError:
                raise InvalidSettings(f"{name} must be a whole number, got {text!r}") from None
        if self.type is bool:
            words = {"true": True, "1": True, "false": False, "0": False}
            if text.lower() not in words:
                raise InvalidSettings(f"{name} must be true or false, got {text!r}")
            return words[text.lower()]
        return text


def setting(
    default: Any = MISSING,
    meaning: str = "",
    low: int | None = None,
    high: int | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A field with its rule; without a default it must be given."""
    metadata = {"meaning": meaning, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


def rules_of(kind: type) -> dict[str, Rule]:
    """The rules of a dataclass by the names of its fields."""
    types = get_type_hints(kind)
    return {
        spec.name: Rule(type=types[spec.name], default=spec.default, **spec.metadata)
        for spec in fields(kind)
    }


def check(settings: Any, rename: Callable[[str], str] = str) -> None:
    """Hold a dataclass's own values against its rules: for `__post_init__`."""
    for name, rule in rules_of(type(settings)).items():
        rule.check(rename(name), getattr(settings, name))


def check_mapping(rules: Mapping[str, Rule], content: Any) -> dict[str, Any]:
    """The settings in a file, any of them left out. Raises InvalidSettings."""
    check_names(rules, content)
    for name, value in content.items():
        rules[name].check(name, value)
    return dict(content)


def check_names(rules: Mapping[str, Rule], content: Any, section: str = "") -> None:
    """Refuse what is no mapping, or has a name without a rule. Raises InvalidSettings."""
    if not isinstance(content, Mapping):
        name = section or "the file"
        raise InvalidSettings(f"{name} must be a mapping of settings, got {content!r}")
    for name in content:
        if name not in rules:
            known = ", ".join(rules)
            raise InvalidSettings(f"{_join(section, name)} is unknown; known: {known}")


def build(kind: type[T], content: Any, section: str = "") -> T:
    """A dataclass, and those inside it, out of a file's content. Raises InvalidSettings."""
    rules = rules_of(kind)
    check_names(rules, content, section)
    values = {}
    for name, rule in rules.items():
        full = _join(section, name)
        if name in content:
            values[name] = content[name]
            if isinstance(rule.type, type) and is_dataclass(rule.type):
                values[name] = build(rule.type, content[name], full)
            else:
                rule.check(full, content[name])
        elif rule.default is MISSING:
            raise InvalidSettings(f"{full} is missing")
    return kind(**values)


def from_environment(kind: type, prefix: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings that variables give: PREFIX_TOP_K=3 is top_k. Raises InvalidSettings."""
    rules = rules_of(kind)
    values = {}
    for name, text in own_variables(environ, prefix).items():
        key = name.removeprefix(prefix).lower()
        if key not in rules or name != name.upper():
            known = ", ".join(prefix + key.upper() for key in rules)
            raise InvalidSettings(f"{name} is unknown; known: {known}")
        values[key] = rules[key].parse(name, text)
        rules[key].check(name, values[key])  # here, so that a message names the variable
    return values


def _plain(kind: Any) -> Any:
    """The first of `X | None`, and `list` for `list[int]`."""
    first = get_args(kind)[0] if get_origin(kind) is UnionType else kind
    return get_origin(first) or first


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, exactly: True is no int. An int is a float."""
    if get_origin(kind) is UnionType:
        return any(_fits(value, member) for member in get_args(kind))
    if kind in (None, NoneType):
        return value is None
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    plain = _plain(kind)
    return type(value) is plain or (plain is float and type(value) is int)


def _join(section: str, name: object) -> str:
    return f"{section}.{name}" if section else str(name)
