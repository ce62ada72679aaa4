"""The application that ``faust -A stream.app worker`` asks for."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Make it when it is asked for, not on import."""
    if name != "app":
        raise AttributeError(name)
    # Imported here: importing this module costs nothing.
    from stream.config import load_settings
    from stream.worker.app import HostedApp, guard_secrets

    guard_secrets()
    globals()["app"] = HostedApp(load_settings())
    return globals()["app"]
