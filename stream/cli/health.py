"""``uemb health``: asks a worker whether it is alive, or ready; for supervisors and containers that have no curl."""

import http.client
import json
import sys
from typing import Any, Final

import click

from stream.cli.terminal import out, print_json
from stream.config import Address, load_settings
from stream.errors import ExitCode

#: As long as a probe waits as a rule.
_PATIENCE_S: Final = 5.0
_MAX_BYTES: Final = 1 << 20


@click.command()
@click.option("--ready", is_flag=True, help="ask whether it is ready, not only whether it is alive")
@click.option("--address", metavar="HOST:PORT", help="where the worker listens; default UEMB_HTTP")
@click.option("--json", "as_json", is_flag=True, help="print the answer as one JSON document")
def health(ready: bool, address: str | None, as_json: bool) -> None:
    """Ask a worker whether it is alive; exit 0 if it is, 1 if it is not."""
    verdict = _ask(_address(address), "/readyz" if ready else "/healthz")
    if as_json:
        print_json(verdict)
    else:
        what = "ready" if ready else "alive"
        out.print(what if verdict["ok"] else f"not {what}: {'; '.join(map(str, verdict['reasons']))}")
    sys.exit(ExitCode.OK if verdict["ok"] else ExitCode.FAULT)


def _address(given: str | None) -> Address:
    if given is not None:
        try:
            found: Address | None = Address.parse(given)
        except ValueError as exc:
            raise click.BadParameter(str(exc), param_hint="--address") from exc
    else:
        found = load_settings().http_address
    if found is None or not found.port:
        msg = "UEMB_HTTP names no port; give the worker's with --address"
        raise click.UsageError(msg)
    return found


def _ask(address: Address, path: str) -> dict[str, Any]:
    """The worker's verdict, or one of our own where it gives none."""
    connection = http.client.HTTPConnection(address.host, address.port, timeout=_PATIENCE_S)
    try:
        connection.request("GET", path)
        verdict = json.loads(connection.getresponse().read(_MAX_BYTES))
        if isinstance(verdict["ok"], bool) and isinstance(verdict["reasons"], list):
            return dict(verdict)
        why = "what answers there is no worker"
    except (http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError):
        why = "what answers there is no worker"
    except OSError as exc:
        why = f"no worker answers ({exc.strerror or exc})"
    finally:
        connection.close()
    return {"ok": False, "reasons": [f"{address}: {why}"]}
