"""The application that ``faust -A stream.app worker`` asks for."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Make it when it is asked for, not on import."""
    if name != "app":
        raise AttributeError(name)
    # Imported here: importing this module costs nothing.
    from stream.config import load_settings, wants_json_lines
    from stream.errors import ConfigError
    from stream.logs import print_error, setup_logging
    from stream.worker.app import HostedApp, guard_secrets

    guard_secrets()
    if wants_json_lines():
        setup_logging("info", "json")
    try:
        settings = load_settings()
        guard_secrets(settings.kv_group)
        globals()["app"] = HostedApp(settings)
    except ConfigError as exc:
        print_error(str(exc))
        raise SystemExit(exc.exit_code) from exc
    return globals()["app"]
