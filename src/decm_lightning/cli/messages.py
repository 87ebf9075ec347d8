"""One-line error messages: the cause without the parser's context, and a suggestion for misspelled words."""

import inspect
import pkgutil
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import Any, get_args, get_type_hints

# Compared by name, because importing their modules takes seconds.
OURS = {"ArgumentError", "ValueError", "OSError", "ImportError", "NonFiniteError", "NoTangentError"}
OURS |= {"MisconfigurationException", "SafetensorError", "CheckpointException"}
# Lines of the parser's messages that list what it tried, not the cause.
LAYERS = (
    r"Does not validate against|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value|Problem with given|"
    r"Subclass types expect|a class path \(str\)|a dict with"
)
# Lines that say nothing if there are others.
GENERAL = (
    "Not a valid subclass", "Expected a <class", "Expected a path but", "Expected a dot import path",
    "Expected a typing.Literal",
)  # fmt: skip
TYPES = {
    "int": "an integer", "float": "a number", "str": "text", "bool": "true or false",
    "list": "a list, such as '[1, 2]'", "dict": "keys with values, such as '{key: 1}'",
}  # fmt: skip
# What the parser says of a value in terms of Python's types, and the same for the user.
WORDS = (
    (r"Expected a dot import path string: \S+?(?=;|\. Got value|$)", "expected the name or the path of a class"),
    (r"Unable to load config '(.*?)'; Unable to load config \"\1\"", f"expected {TYPES['dict']}, or a file of them"),
    (r"Unexpected import path format: .*?(?=\. Got value|$)", f"expected {TYPES['dict']}, or the path of a class"),
    (r"Expected a typing\.Literal\[(.*?)\]", lambda found: f"expected one of {found[1].replace(chr(39), '')}"),
    (r"Expected a <class '(\w+)'>", lambda found: f"expected {TYPES.get(found[1], found[1])}"),
    (r"(expected [^;]*?)\. Got value: ", r"\1: got "),
)
SEVERAL = r"((?:[\w.-]+, )+[\w.-]+)"
"""Matches a comma-separated list of words."""


def is_for_the_user(error: BaseException) -> bool:
    """Return whether an error is caused by the input or the machine rather than by a bug."""
    return any(cls.__name__ in OURS for cls in type(error).__mro__)


def describe(error: BaseException) -> str:
    """Return an error, a suggestion and its notes on one line."""
    if type(error).__name__ == "CheckpointException":
        from decm_lightning.networks.sharded import cause

        what = f"a sharded checkpoint cannot be read or written: {cause(error)}"
    elif isinstance(error, OSError) and error.filename is not None:
        what = f"{error.filename}: {error.strerror}"
    else:
        what = essence(str(error))
    options = [option for each in _chain(error) for option in getattr(each, "options", ())]
    suggestion = next((found for pair in _unknown(str(error), options) if (found := did_you_mean(*pair))), ())
    return "; ".join([what.rstrip("."), *suggestion, *getattr(error, "__notes__", ())])


def essence(message: str) -> str:
    """Shorten a parser's message to one line: the key and the cause."""
    lines = [re.sub(r"^\s*- ", "", line).strip() for line in message.splitlines()]
    keys = [key for line in lines for key in re.findall(r'Parser key "([^"]+)"', line)]
    causes = [re.sub(r'^Parser key "[^"]+":\s*', "", line) for line in lines if not re.match(LAYERS, line)]
    causes = [cause for cause in causes if cause]
    # These lines accompany the real cause, for example for a valid class with wrong arguments.
    for general in GENERAL:
        causes = [cause for cause in causes if not cause.startswith(general)] or causes
    what = "; ".join(dict.fromkeys(causes))
    # A parameter of several types has its value on a separate line. A long value would hide the cause.
    values = [line.removeprefix("Given value: ") for line in lines if re.match(r"Given value: .{1,60}$", line)]
    values = [re.sub(r"^NestedArg\(key='.*', val='?(.*?)'?\)$", r"\1", value) for value in values]
    what += "".join(f". Got value: {value}" for value in values[:1])
    for pattern, words in WORDS:
        what = re.sub(pattern, words, what)
    return f"{'.'.join(keys)}: {what}" if keys else what


def did_you_mean(wrong: str, known: Iterable[str]) -> tuple[str, ...]:
    """Return a question with the known word closest to a wrong one, or an empty tuple if none is close.

    Example:
        >>> did_you_mean("smaple", ["sample", "export"])
        ('did you mean sample?',)
    """
    known = list(known)
    if wrong in known:
        return ()
    # A name without its module, or a config without its option.
    found = [word for word in known if re.search(rf"[. ]{re.escape(wrong)}$", word)] or get_close_matches(wrong, known)
    return tuple(f"did you mean {word}?" for word in found[:1])


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unknown(message: str, options: Collection[str]) -> Iterator[tuple[str, Collection[str]]]:
    """Yield each word of an error that may be misspelled, with the words that are valid in its place."""
    for arguments in re.findall(r"unrecognized arguments: (.*)", message):
        for argument in arguments.split():
            is_config = argument.endswith((".yaml", ".yml"))
            yield argument.partition("=")[0], [f"--config {argument}"] if is_config else options
    classes = re.findall(r"class_path '([\w.]+)'", message) or [""]
    for group, name in re.findall(r"(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'", message):
        yield name, _parameters(classes[-1], group)
    for name in re.findall(r"does not accept option '([\w.]+)'", message):
        yield name, [option.lstrip("-") for option in options]
    for module, name in re.findall(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        yield f"{module}.{name}", _modules(module) + [f"{module}.{known}" for known in dir(sys.modules.get(module))]
    for name in re.findall(r"No module named '([\w.]+)'", message):
        yield name, _modules(name.rpartition(".")[0])
    for name in re.findall(r"Expected a dot import path string: (\w+)", message):
        modules = list(sys.modules.values())
        yield name, [known for module in modules for known in _public(module)]
        yield name, sorted((f"{module.__name__}.{name}" for module in modules if name in _public(module)), key=len)
    lists = [re.findall(r"'([^']+)'", words) for words in re.findall(r"Literal\[(.*?)\]", message)]
    lists += [words.split(", ") for words in re.findall(f"(?:one of|expected) {SEVERAL}", message)]
    for value in re.findall(r"(?:Given value|Got value|got):? '?([^'\n]+)'?", message):
        yield from ((part, known) for part in re.split(r"[/?&=]", value) if not part.isdecimal() for known in lists)


def _parameters(path: str, group: str) -> list[str]:
    """Return the parameters of a class, or of the class of one of its parameters."""
    module, _, name = path.rpartition(".")
    try:
        target: Any = getattr(import_module(module), name)
        if group:
            hint = get_type_hints(target.__init__)[group]
            target = next((part for part in get_args(hint) if inspect.isclass(part)), hint)
        return list(inspect.signature(target).parameters)
    except (ImportError, AttributeError, TypeError, ValueError, KeyError, NameError):
        return []


def _modules(package: str) -> list[str]:
    # Not all packages: for a missing optional package, a similar name would be a wrong suggestion.
    path = getattr(sys.modules.get(package), "__path__", ())
    return [f"{package}.{found.name}" for found in pkgutil.iter_modules(path)] if package else ["decm_lightning"]


def _public(module: object) -> Collection[str]:
    ours = str(getattr(module, "__name__", "")).partition(".")[0] in ("decm_lightning", "lightning")
    return getattr(module, "__all__", ()) if ours else ()
