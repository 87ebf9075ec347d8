"""At any moment a signal ends the program in one line, with the exit code that shells expect."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from decm_lightning import signals

WAIT = "print('ready', flush=True); threading.Event().wait()"
COMMANDS = {
    "a command": f"def main():\n    try: {WAIT}\n    finally: print('cleaned')",
    "an exception that a library replaces": (
        f"def main():\n    try: {WAIT}\n    except BaseException: raise ValueError('cannot load module more than once')"
    ),
    "an import": "def main(): import slow; threading.Event().wait()",
    "a finalizer": (
        f"class Loader:\n    def __del__(self): {WAIT}\ndef main():\n    loader = Loader()\n    del loader\n"
        "    threading.Event().wait()"
    ),
    "the end": f"import atexit\ndef wait(): {WAIT}\natexit.register(wait)\ndef main(): return 0",
    "a worker": (
        "def main():\n    from multiprocessing import get_context\n"
        f"    def work(): {WAIT}\n    worker = get_context('fork').Process(target=work)\n"
        "    worker.start()\n    worker.join()"
    ),
}
PROGRAM = """
import sys, threading
{command}
from decm_lightning import cli
cli._run = lambda name, argv: main()
from decm_lightning.__main__ import main as program
program()
"""


def start(command, folder):
    """Start the program with a command, and wait until it is ready for a signal."""
    Path(folder, "slow.py").write_text(f"import threading\ntry: {WAIT}\nexcept BaseException: pass\n")
    path = os.pathsep.join([str(folder), str(Path(signals.__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(command=command), "slow"], env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell may start the tests with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("signum", "line"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_the_program_in_one_line(signum, line, command, tmp_path):
    process = start(COMMANDS[command], tmp_path)
    # A terminal sends Ctrl-C to the workers as well.
    os.killpg(process.pid, signum)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + signum, f"decm: {line}\n")
    assert out == ("cleaned\n" if command == "a command" else "")


def test_a_second_ctrl_c_ends_it_at_once_and_sigterm_does_not(tmp_path):
    cleaning = WAIT.replace("ready", "cleaning").replace("; ", "\n        ")
    process = start(f"def main():\n    try: {WAIT}\n    finally:\n        {cleaning}", tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "decm: terminated\n")
    assert process.returncode == 128 + signal.SIGTERM
