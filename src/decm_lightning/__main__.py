"""The program `decm`, also `python -m decm_lightning`."""

import sys
from typing import NoReturn

from decm_lightning.signals import end


def main() -> NoReturn:
    """Run the command line, and end it in one line at a signal."""
    end.install()
    code = 0
    try:
        from decm_lightning import cli

        code = cli.main()
    except BaseException:
        # Some libraries replace the exception of the signal.
        if not end.received:
            raise
    finally:
        end.at_once = True
    sys.exit(end.report() if end.received else code)


if __name__ == "__main__":
    main()
