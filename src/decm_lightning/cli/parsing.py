"""Turn the arguments of a function into the options of a command."""

from argparse import ArgumentError
from collections.abc import Callable, Collection, Sequence
from inspect import Parameter, signature, unwrap
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser


class Parser(ArgumentParser):
    """A parser that accepts no abbreviated options, not even of classes. Its errors list its options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # jsonargparse creates the parser for the arguments of a class with this class's defaults.
        super().__init__(*args, **{"exit_on_error": False, "allow_abbrev": False} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an ArgumentError with `options`, the names of all options."""
        try:
            super().error(message, ex)
        except ArgumentError as error:
            error.options = [name for name in self._option_string_actions if not name.endswith("+")]  # type: ignore
            raise


def call(function: Callable[..., None], program: str, positional: Collection[str], argv: Sequence[str]) -> None:
    """Call a function with the arguments of a command line.

    Args:
        function: the function. Its signature gives names, types and defaults, and its docstring gives the help.
        program: the name of the command.
        positional: names of the positional arguments. One with the type list[str] takes all remaining values.
        argv: the command line after the command's name.
    """
    parser = Parser(prog=program)
    parser.add_argument("--config", action=ActionConfigFile, help="a file with these options")
    parameters = signature(function).parameters
    several = {name for name in positional if parameters[name].annotation == list[str]}
    named = set(parameters) - set(positional)
    options: dict[str, Any] = {"as_group": False, "sub_configs": True}
    parser.add_function_arguments(function, as_positional=True, skip={*named, *several}, **options)
    for name in several:
        default = parameters[name].default
        number: dict[str, Any] = {"nargs": "+"} if default is Parameter.empty else {"nargs": "*", "default": default}
        parser.add_argument(name, type=str, **number)
    parser.add_function_arguments(function, skip={*positional}, **options)
    config = parser.instantiate(parser.parse_args(list(argv)))
    config.pop("config")
    function(**config)


def keep_whole_numbers(function: Callable[..., Any]) -> None:
    """Let the parser read 1 as an int where an argument is an int or a float.

    For the trainer's limits 1.0 would mean all batches.
    """
    # typing caches Optional[Union[int, float]] in the order in which a library first wrote it.
    annotations = unwrap(function).__annotations__
    numbers = int | float | None
    annotations.update({name: numbers for name, kind in annotations.items() if kind == numbers})
