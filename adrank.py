"""The command line. Its subcommands are in `adrank_cli/`."""

import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import click

from adrank_cli import loop, measuring, offline, online, trying, versions
from features.errors import AdrankError

# Threads that spin while they wait make training tens of times slower on a machine that does anything else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
COMMANDS: tuple[click.Command, ...] = (
    offline.init,
    offline.prepare,
    offline.train,
    offline.tune,
    measuring.evaluate,
    measuring.score,
    measuring.compare,
    online.load,
    online.serve,
    online.doctor,
    online.redis_command,
    loop.join,
    loop.bridge,
    loop.attribute,
    loop.skew,
    loop.replay_command,
    loop.compare_arms,
    loop.retrain,
    versions.models_command,
    versions.promote,
    versions.rollback,
    trying.demo,
    trying.bench,
    trying.benchmark,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="adrank")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress and no warnings: adrank -q train ...")
def cli(quiet: bool) -> None:
    """Rank ads: train CTR models on an impression log, and serve them."""


for command in COMMANDS:
    cli.add_command(command)


def _stand_any_terminal() -> None:
    """Print where there is nobody to read, and in place of letters that the terminal does not have."""
    if sys.stdout is None:
        sys.stdout = _nowhere()
    if sys.stderr is None:
        sys.stderr = _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w")


def main(words: Sequence[str] | None = None) -> None:
    """Run `adrank`: a mistake that a person can mend is one sentence and exit code 2, an interruption is exit code 130."""
    _stand_any_terminal()
    try:
        cli(words, prog_name="adrank", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
    except click.ClickException as error:
        if isinstance(error, click.BadParameter) and error.param and isinstance(error.param.type, click.Path):
            error.ctx = None  # a matter of this machine: how the command is used would say nothing about it
        error.show()
        sys.exit(2)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except BrokenPipeError:  # whoever read what is printed has left
        sys.stdout = _nowhere()  # so that nothing is flushed to nobody at the end
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            sys.stdout = _nowhere()
            where = error.filename or "a file, or what is printed"
            sys.stderr.write(f"Error: {error.strerror}, while writing {where}\n")
            sys.exit(2)
        if not isinstance(error, AdrankError):
            raise
        sys.stderr.write(f"Error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
