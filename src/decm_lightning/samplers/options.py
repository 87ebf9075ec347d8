"""Read and write options of a sampler as text, such as "?s1=0.6" or "?shift=3&times=[0.2,0.6]"."""

import json
from collections.abc import Mapping
from typing import Any

import yaml


def read_options(query: str, text: str) -> dict[str, Any]:
    """Return the options in "name=value&name=value"; values are YAML scalars or lists of them.

    Args:
        query: the text after the question mark; "" for no options.
        text: the whole text, for error messages.

    Raises:
        ValueError: if the text has a different form or repeats an option.
    """
    options: dict[str, Any] = {}
    for option in query.split("&") if query else []:
        name, equals, value = option.partition("=")
        if not (name.isidentifier() and equals) or name in options:
            raise ValueError(f"options must be name=value, joined by &, with each name once: got {text!r}")
        options[name] = _read(value, text)
    return options


def write_options(options: Mapping[str, Any]) -> str:
    """Return "?name=value&name=value", the text that `read_options` reads; "" for no options."""
    return "".join(f"{'&' if i else '?'}{name}={_write(options[name])}" for i, name in enumerate(options))


def _read(value: str, text: str) -> Any:
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"the value {value!r} in {text!r} is not valid YAML") from error
    if not isinstance(parsed, str | int | float | bool | list | None):
        raise ValueError(f"the value {value!r} in {text!r} is neither a scalar nor a list")
    return [_number(item) for item in parsed] if isinstance(parsed, list) else _number(parsed)


def _number(value: Any) -> Any:
    """Convert a string such as 1e-3 to a number: YAML 1.1 reads it as a number only with a decimal point."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _write(value: Any) -> str:
    """Return a value as text that `_read` converts back."""
    if isinstance(value, str) and _read(value, value) == value:
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value, separators=(",", ":"))
