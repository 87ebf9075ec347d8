"""Shell completion of decm, generated from the command table without importing any command."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from decm_lightning.cli import COMMANDS, TRAINING
from decm_lightning.cli.shipped_configs import shipped_names

HERE = Path(__file__).parent
SHARED = ("config", "print_config", "seed_everything", "model", "data")
"""Options of all commands of Lightning's command line."""
METHODS = ("fit", "validate", "test", "predict")
"""Commands that are methods of the trainer. The others run `validate`."""
OBJECTS = ("self", "model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule")
"""Arguments of these methods that the command line builds itself."""

BASH = """\
# bash completion of decm. Add to ~/.bashrc: eval "$(decm completion bash)"
_decm() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} options
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    case $command in
{cases}
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$word"))
    elif [[ $previous == --config || $command == configs ]]; then
        COMPREPLY=($(compgen -W "{configs}" -- "$word") $(compgen -f -- "$word"))
    fi
}}
complete -o default -F _decm decm
"""
ZSH = """\
#compdef decm
# zsh completion of decm. Add to ~/.zshrc, after compinit: eval "$(decm completion zsh)"
_decm() {{
    local -a commands options configs
    commands=({commands})
    configs=({configs})
    if ((CURRENT == 2)); then
        _describe command commands
        return
    fi
    case $words[2] in
{cases}
    esac
    if [[ $words[CURRENT] == -* ]]; then
        compadd -- $options
    else
        [[ $words[CURRENT-1] == --config || $words[2] == configs ]] && compadd -- $configs
        _files
    fi
}}
compdef _decm decm
"""
FISH = "# fish completion of decm. Save as ~/.config/fish/completions/decm.fish"


def completion(shell: Literal["bash", "zsh", "fish"]) -> None:
    """Print the completion of commands, options and shipped configs for a shell.

    Args:
        shell: the shell. The first lines of the output tell where it belongs.
    """
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](), end="")


def options(name: str) -> list[str]:
    """Return the options of a command, read from the source of its module, without dashes.

    Those of the trainer's commands are read from Lightning's source, too. They do not include the arguments of the
    config's classes.
    """
    command = COMMANDS[name]
    module, _, function = command.function.partition(":")
    if command.group != TRAINING:
        names = _arguments(_parsed(HERE / f"{module}.py"), function)
        return ["config", *(name for name in names if name not in command.positional)]
    lightning = find_spec("lightning")
    assert lightning is not None
    assert lightning.origin is not None
    trainer = _parsed(Path(lightning.origin).parent / "pytorch" / "trainer" / "trainer.py")
    method = name if name in METHODS else "validate"
    called = [argument for argument in _arguments(trainer, method) if argument not in OBJECTS]
    built = [f"trainer.{argument}" for argument in _arguments(trainer, "__init__") if argument != "self"]
    return list(dict.fromkeys([*SHARED, *called, *_added(module), *built]))


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _arguments(tree: ast.Module, function: str) -> list[str]:
    """Return the arguments of the first function or method of that name."""
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    return [argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)]


def _added(module: str) -> Iterator[str]:
    """Yield the options of all calls of add_argument with a literal name, in a module and those that it imports."""
    for node in ast.walk(_parsed(HERE / f"{module}.py")):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("decm_lightning.cli."):
            yield from _added(str(node.module).rpartition(".")[2])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            name = next((word.value for word in node.args[:1] if isinstance(word, ast.Constant)), "")
            if isinstance(name, str) and name.startswith("--"):
                yield name.removeprefix("--")


def _bash() -> str:
    cases = _cases('        {name}) options="{words}" ;;')
    return BASH.format(commands=" ".join(COMMANDS), cases=cases, configs=" ".join(shipped_names()))


def _zsh() -> str:
    commands = " ".join(f"'{name}:{_escaped(command.help)}'" for name, command in COMMANDS.items())
    cases = _cases("        {name}) options=({words}) ;;")
    return ZSH.format(commands=commands, cases=cases, configs=" ".join(shipped_names()))


def _cases(line: str) -> str:
    words = {name: " ".join(f"--{option}" for option in options(name)) for name in COMMANDS}
    return "\n".join(line.format(name=name, words=each) for name, each in words.items())


def _fish() -> str:
    lines = [FISH]
    for name, command in COMMANDS.items():
        lines.append(f"complete -c decm -n __fish_use_subcommand -f -a {name} -d '{_escaped(command.help)}'")
        seen = f"complete -c decm -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{seen} -r -l {option}" for option in options(name) if option != "config"]
        lines.append(f"{seen} -r -l config -a '{' '.join(shipped_names())}'")
    lines.append(f"complete -c decm -n '__fish_seen_subcommand_from configs' -a '{' '.join(shipped_names())}'")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("'", "")
