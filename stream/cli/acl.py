"""The command ``uemb acl``: what the access lists of brokers and store must hold for these settings, role by role."""

import shlex
from collections.abc import Callable, Sequence
from typing import Any, Final

import click

from stream.cli.terminal import out, print_json
from stream.config import Settings, load_settings
from stream.errors import ConfigError
from stream.kafka.grants import ROLES, Grant
from stream.kv.redis import grants as redis_grants
from stream.kv.redis.grants import Access
from stream.kv.urls import RedisAddress, parse_kv_url

#: What each role needs of a Redis; the others need nothing of it.
_STORE: Final[dict[str, Callable[[RedisAddress], Access]]] = {
    "worker": redis_grants.writer,
    "reader": redis_grants.reader,
    "release": redis_grants.reader,
    "eraser": redis_grants.reader,
    "auditor": redis_grants.looker,
    "operator": redis_grants.writer,
}


@click.command()
@click.option("--role", type=click.Choice(list(ROLES)), help="only this one  [default: all]")
@click.option(
    "--format",
    "form",
    type=click.Choice(["kafka-acls", "redis-acl", "json"]),
    default="kafka-acls",
    show_default=True,
    help="calls of kafka-acls.sh, commands of redis-cli, or one JSON document with both",
)
@click.option("--user", help="whom to allow  [default: with --role the user of the settings, else the role's name]")
def acl(role: str | None, form: str, user: str | None) -> None:
    """Print the least that brokers and store must allow, with the reason of each grant.

    The roles are worker, sender (`uemb send`), reader (vectors, from topic or store), release (versions of items and
    encoders), eraser (`uemb delete`), auditor (looks at all, changes nothing), replayer (dead letters), operator
    (`uemb repartition`) and bench.
    """
    settings = load_settings()
    roles = list(ROLES) if role is None else [role]
    address = parse_kv_url(settings.kv_url)
    redis = address if isinstance(address, RedisAddress) else None
    if form == "json":
        print_json({name: _document(name, settings, redis) for name in roles})
    elif form == "kafka-acls":
        for name in roles:
            default = settings.sasl_username if role else None
            _print_kafka_acls(name, ROLES[name].grants(settings), settings, user or default or name)
    else:
        if redis is None:
            msg = "UEMB_KV_URL names no Redis, so none has to allow anything; set it, or use another --format"
            raise ConfigError(msg)
        for name in (name for name in roles if name in _STORE):
            default = redis.username if role else None
            _print_redis_acl(name, _STORE[name](redis), user or default or name)


def _document(role: str, settings: Settings, redis: RedisAddress | None) -> dict[str, Any]:
    access = _STORE[role](redis) if redis is not None and role in _STORE else None
    return {
        "runs": ROLES[role].commands,
        "kafka": [grant._asdict() for grant in ROLES[role].grants(settings)],
        "redis": None if access is None else {"keys": access.keys, "commands": access.commands},
    }


def _print_kafka_acls(role: str, grants: Sequence[Grant], settings: Settings, user: str) -> None:
    call = shlex.join(
        [
            "kafka-acls.sh",
            "--bootstrap-server",
            settings.bootstrap_servers,
            "--add",
            "--allow-principal",
            f"User:{user}",
        ]
    )
    out.print(f"# {role}: {', '.join(ROLES[role].commands)}")
    said = None
    for grant in grants:
        reason = f"not a must: {grant.why}" if grant.optional else grant.why
        if reason != said:
            out.print(f"#   {reason}")
            said = reason
        out.print(f"{call} {grant.arguments}")


def _print_redis_acl(role: str, access: Access, user: str) -> None:
    out.print(f"# {role}: {', '.join(ROLES[role].commands)}")
    for command, why in access.commands.items():
        out.print(f"#   {command}: {why}")
    out.print(f"ACL SETUSER {user} reset on >PASSWORD {access.rules}")
