"""Shell completion: every command and option, and bash's answers to what is typed."""

import shutil
import subprocess
import sys

import pytest

from decm_lightning import cli
from decm_lightning.cli.completion import completion, options
from decm_lightning.cli.shipped_configs import shipped_names


@pytest.fixture
def script(capsys):
    def of(shell: str) -> str:
        completion(shell)
        return capsys.readouterr().out

    return of


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_has_every_command_option_and_config(shell, script):
    words = set(script(shell).replace("'", " ").replace('"', " ").replace("(", " ").replace(")", " ").split())
    dashes = "" if shell == "fish" else "--"
    for name, command in cli.COMMANDS.items():
        assert {name, name + ":" + command.help.split()[0]} & words, name
        assert {dashes + option for option in options(name)} <= words, name
    assert set(shipped_names()) <= words


def test_options_are_those_of_the_parser(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decm", "configs", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    found = options("configs")
    assert found == ["config", "out"]
    assert all(f"--{option} " in shown for option in found)


@pytest.mark.parametrize("command", ["fit", "test", "tune-guidance"])
def test_options_of_the_trainer_s_commands_are_those_of_the_parser(command, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    parsers = []

    def stop(self, parser, args):
        parsers.append(parser)
        raise ValueError

    monkeypatch.setattr(LightningCLI, "parse_arguments", stop)
    monkeypatch.setattr(sys, "argv", ["decm", command, "--trainer.max_steps", "1"])
    monkeypatch.setattr("decm_lightning.cli.test.ModelCLI.parse_arguments", stop)
    monkeypatch.setattr("decm_lightning.cli.tune_guidance.TuneCLI.parse_arguments", stop)
    assert cli.main() == 2
    long = {name[2:] for name in parsers[0]._option_string_actions if name.startswith("--") and not name.endswith("+")}
    assert set(options(command)) == {name for name in long if not name.endswith("help")} - {"trainer"}


def test_options_are_read_without_an_import():
    code = "from decm_lightning.cli.completion import completion; completion('bash'); import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--trainer.max_steps" in done.stdout
    assert not {"torch", "lightning"} & set(done.stdout.splitlines()[-1].split())
    assert {"config", "latent_norm", "vae"} <= set(found := options("validate-data"))
    assert "folder" not in found


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["va"], {"validate", "validate-data"}),
        (["fit", "--c"], {"--config", "--ckpt_path"}),
        (["fit", "--config", "digits/"], {"digits/decm.yaml", "digits/teacher.yaml"}),
        (["configs", "sd"], {"sd35.yaml"}),
        (["export", "--dt"], {"--dtype"}),
        (["tune-guidance", "--s"], {"--scales", "--samples", "--steps", "--seed_everything"}),
    ],
)
def test_bash_completes_what_is_typed(typed, expected, script, tmp_path):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    words = " ".join(f"'{word}'" for word in ["decm", *typed])
    ask = f"COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _decm; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(
        ["bash", "-c", script("bash") + ask], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert set(done.stdout.split()) >= expected
    assert all(word.startswith(typed[-1]) for word in done.stdout.split())


@pytest.mark.parametrize(("shell", "check"), [("bash", "-n"), ("zsh", "-n"), ("fish", "--no-execute")])
def test_a_shell_accepts_its_script(shell, check, script, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "completion").write_text(script(shell))
    assert subprocess.run([shell, check, tmp_path / "completion"], check=False).returncode == 0
