"""The command line `uemb`: one file or folder per command."""

import sys


def main() -> None:
    """Run the command that the process was started with."""
    from stream.errors import ExitCode
    from stream.extras import need_worker
    from stream.logs import print_error

    try:
        need_worker("uemb")
    except ImportError as exc:
        print_error(str(exc))
        sys.exit(ExitCode.WRONG)
    from stream.cli.root import main as run

    run()
