"""Shell completion of decm, generated from the command table without importing any command."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from decm_lightning.cli import COMMANDS, TRAINING, Command
from decm_lightning.cli.shipped_configs import shipped_names

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


def options(command: Command) -> list[str]:
    """Return the options of a command, read from the source of its module, without dashes.

    Of the trainer's commands these are the command's own: a config may hold hundreds.
    """
    module, _, function = command.function.partition(":")
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    if command.group == TRAINING:
        names = [*command.reads, *_added(tree)]
    else:
        found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
        names = [argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)]
    return ["config", *(name for name in names if name not in command.positional)]


def _added(tree: ast.Module) -> Iterator[str]:
    """Yield the options of all calls of add_argument with a literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
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
    words = {name: " ".join(f"--{option}" for option in options(command)) for name, command in COMMANDS.items()}
    return "\n".join(line.format(name=name, words=each) for name, each in words.items())


def _fish() -> str:
    lines = [FISH]
    for name, command in COMMANDS.items():
        lines.append(f"complete -c decm -n __fish_use_subcommand -f -a {name} -d '{_escaped(command.help)}'")
        seen = f"complete -c decm -n '__fish_seen_subcommand_from {name}'"
        lines += [f"{seen} -r -l {option}" for option in options(command) if option != "config"]
        lines.append(f"{seen} -r -l config -a '{' '.join(shipped_names())}'")
    lines.append(f"complete -c decm -n '__fish_seen_subcommand_from configs' -a '{' '.join(shipped_names())}'")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("'", "")
