"""Dataclasses as JSON text and back, with one sentence for whatever is wrong in the text."""

import dataclasses
import difflib
import json
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

C = TypeVar("C")
_NUMBERS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real}


def to_json(config: Any) -> str:
    """A configuration as JSON text; members of a union carry their ``kind``."""
    return json.dumps(_to_dict(config), indent=2) + "\n"


def from_json(cls: type[C], text: str, source: str) -> C:
    """The configuration that `to_json` wrote.

    Args:
        cls: its dataclass.
        text: JSON.
        source: what an error should call the text's origin.

    Raises:
        ValueError: for text that is not JSON, unknown or missing keys, and values of a wrong type
            or out of range.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    return _from_value(cls, document, source)


def check_values(config: Any) -> None:
    """Refuse values that the annotations of a dataclass do not allow.

    Numbers of other libraries become Python's, integers where a float is meant become floats,
    and lists become tuples.

    Raises:
        ValueError: naming the option.
    """
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        value = list(value) if isinstance(value, tuple) else value
        # Through `object`: the dataclasses are frozen.
        object.__setattr__(config, f.name, _from_value(hints[f.name], value, f.name))


def differences(ours: Any, theirs: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted name to (ours, theirs) of each value in which two configurations differ."""
    if type(ours) is not type(theirs):
        return {prefix: (getattr(ours, "kind", ours), getattr(theirs, "kind", theirs))}
    if not dataclasses.is_dataclass(ours):
        return {} if ours == theirs else {prefix: (ours, theirs)}
    found: dict[str, tuple[Any, Any]] = {}
    for f in dataclasses.fields(ours):
        name = f"{prefix}.{f.name}" if prefix else f.name
        found |= differences(getattr(ours, f.name), getattr(theirs, f.name), name)
    return found


def _to_dict(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return list(value) if isinstance(value, tuple) else value
    kind = {"kind": value.kind} if hasattr(value, "kind") else {}
    return kind | {f.name: _to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}


def _from_value(expected: Any, value: Any, name: str) -> Any:
    """``value``, out of JSON, as an instance of the type ``expected``."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (types.UnionType, typing.Union):
        return _from_union(arguments, value, name)
    if dataclasses.is_dataclass(expected):
        return _from_object(expected, value, name)
    if origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple and isinstance(value, list):
        items = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(value) == len(items):
            pairs = enumerate(zip(items, value, strict=True))
            return tuple(_from_value(item, v, f"{name}[{i}]") for i, (item, v) in pairs)
    elif expected in _NUMBERS:
        if isinstance(value, _NUMBERS[expected]) and not isinstance(value, bool):
            return expected(value)
    elif type(value) is expected:
        return value
    raise ValueError(f"{name} must be {_described(expected)}, got {value!r}")


def _from_union(members: tuple[Any, ...], value: Any, name: str) -> Any:
    if types.NoneType in members:
        if value is None:
            return None
        (member,) = (m for m in members if m is not types.NoneType)
        return _from_value(member, value, name)
    kinds = {member.kind: member for member in members}
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{name}.kind must be one of {', '.join(kinds)}, got {kind!r}")
    return _from_value(kinds[kind], value, name)


def _from_object(cls: Any, value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object, got {value!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in value:
        if key not in fields and not (key == "kind" and hasattr(cls, "kind")):
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{name} has no option {key!r}{hint}")
    for key, f in fields.items():
        required = f.default is f.default_factory is dataclasses.MISSING
        if required and key not in value:
            raise ValueError(f"{name} lacks {key}")
    given = {k: _from_value(hints[k], v, f"{name}.{k}") for k, v in value.items() if k in fields}
    try:
        return cls(**given)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _described(expected: Any) -> str:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        count = "" if arguments[-1] is ... else f"{len(arguments)} "
        return f"a list of {count}{arguments[0].__name__}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[expected]
