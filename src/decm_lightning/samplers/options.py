"""Options of a sampler as text: "?s1=0.6", "?shift=3&times=[0.2,0.6]"."""

import json
from collections.abc import Mapping
from typing import Any

import yaml


def read_options(query: str, text: str) -> dict[str, Any]:
    """Return the options in "name=value&name=value"; values are YAML scalars or lists of them.

    Args:
        query: what follows the question mark; "" for no options.
        text: the whole text, for errors.

    Raises:
        ValueError: if it has another form, or names an option twice.
    """
    options: dict[str, Any] = {}
    for option in query.split("&") if query else []:
        name, equals, value = option.partition("=")
        if not (name.isidentifier() and equals) or name in options:
            raise ValueError(f"options must be name=value, each name once, joined by &: got {text!r}")
        options[name] = _read(value, text)
    return options


def write_options(options: Mapping[str, Any]) -> str:
    """Return "?name=value&name=value", which `read_options` reads after the question mark; "" for no options."""
    return "".join(f"{'&' if i else '?'}{name}={_write(options[name])}" for i, name in enumerate(options))


def _read(value: str, text: str) -> Any:
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"the value {value!r} in {text!r} is not YAML") from error
    if not isinstance(found, str | int | float | bool | list | None):
        raise ValueError(f"the value {value!r} in {text!r} is neither a scalar nor a list")
    return [_number(item) for item in found] if isinstance(found, list) else _number(found)


def _number(value: Any) -> Any:
    """Return a string such as 1e-3 as the number that it is: YAML 1.1 reads it as one only with a point."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _write(value: Any) -> str:
    """Return a value as `_read` reads it."""
    if isinstance(value, str) and _read(value, value) == value:
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value, separators=(",", ":"))
