"""The command ``uemb acl``: which grants the brokers' access lists must hold for these settings."""

import shlex

import click

from stream.cli.terminal import out, print_json
from stream.config import load_settings
from stream.kafka.grants import NEEDS, worker_extras


@click.command()
@click.argument("who", type=click.Choice(list(NEEDS)), default="worker")
@click.option("--json", "as_json", is_flag=True, help="print the grants as one JSON document")
def acl(who: str, as_json: bool) -> None:
    """Print the least grants that WHO needs (default: worker), as calls of kafka-acls.sh for these settings."""
    settings = load_settings()
    needs = NEEDS[who](settings)
    extras = worker_extras(settings) if who == "worker" else []
    if as_json:
        print_json({"needs": [grant._asdict() for grant in needs], "extras": [grant._asdict() for grant in extras]})
        return
    user = f"User:{settings.sasl_username or 'NAME'}"
    call = shlex.join(
        ["kafka-acls.sh", "--bootstrap-server", settings.bootstrap_servers, "--add", "--allow-principal", user]
    )
    for grant in needs:
        out.print(f"{call} {grant.arguments}")
    if extras:
        out.print("# only where the worker shall make its topics, and check their settings:")
    for grant in extras:
        out.print(f"{call} {grant.arguments}")
