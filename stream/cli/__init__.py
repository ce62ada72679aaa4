"""The command line `uemb`: one file or folder per command."""


def main() -> None:
    """Run the command that the process was started with."""
    from stream.cli.root import main as run

    run()
