"""The one way of librdkafka's clients to the brokers: a first contact that fails names its cause, and the setting.

The client tells causes to its error callback, and only some of them: it takes a port that hangs up for one that is
busy. So what it does not tell is looked at over a connection of our own.
"""

import logging
import re
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, Final, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient, ClusterMetadata

from stream.config import Settings
from stream.errors import ConfigError, DeliveryError, NotAllowed
from stream.kafka.connection import librdkafka_config
from stream.kafka.grants import REFUSED
from stream.kafka.tokens import uses_tokens
from stream.security.certificates import has_ended
from stream.security.credentials import server_fault
from stream.security.tls_probe import speaks_tls

#: So long a first contact is tried while nothing says that it can't succeed.
PATIENCE_S: Final = 10.0
_FIRST_LOOK_S: Final = 0.25
_PROBE_S: Final = 1.0
#: The client's own lines on stderr; what matters of them is in our errors.
_QUIET: Final = {"log_level": 0}
#: The same for producers, whose fatal errors are told at any level.
SILENT: Final = logging.getLogger("librdkafka")
SILENT.addHandler(logging.NullHandler())
SILENT.propagate = False
#: In place of a partition's number.
BY_KEY: Final = -1
#: Answers of brokers that are not all up yet; librdkafka's own errors, below 0, tell of no answer.
_LATER: Final = (
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.NOT_CONTROLLER,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.INVALID_REPLICATION_FACTOR,
)
_PROVIDER: Final = "UEMB_SASL_TOKEN_PROVIDER"
# ApiVersions, version 0, which every broker answers to every client; then Metadata, version 1, of no topic.
_HELLO: Final = struct.pack(">ihhih", 10, 18, 0, 1, -1)
#: An answer begins with the number of its request; one that is said to be larger is of somebody who speaks otherwise.
_NUMBER: Final = struct.pack(">i", 1)
_LARGEST_ANSWER: Final = 1 << 20
_WHO: Final = struct.pack(">ihhihi", 14, 3, 1, 2, -1, 0)

#: How the client begins to speak of a broker that it was told of: with its number behind the address.
_LEARNED: Final = re.compile(
    r"(?:\w+://)?(?P<address>\S+:\d+)/\d+: (?:Connect to|Failed to resolve|Connection setup timed out)"
)

_Consumer = TypeVar("_Consumer")
_reached: set[tuple[tuple[str, Any], ...]] = set()


def admin_client(settings: Settings) -> AdminClient:
    """A client that asks and orders; keep it while its futures are awaited.

    Raises:
        ConfigError: the brokers can't be reached, and why.
        DeliveryError: no broker answers.
    """
    reach(settings)
    return AdminClient({**librdkafka_config(settings), **_QUIET})


def consumer(settings: Settings, config: Mapping[str, Any], kind: Callable[[dict[str, Any]], _Consumer]) -> _Consumer:
    """A client that reads; `kind` makes it of `config` and the settings of the connection.

    Raises:
        ConfigError: the brokers can't be reached, and why.
        DeliveryError: no broker answers.
    """
    reach(settings)
    return kind({**librdkafka_config(settings), **_QUIET, **config})


def producer(settings: Settings, config: Mapping[str, Any]) -> Producer:
    """A client that writes; `config` are its settings beside those of the connection.

    Raises:
        ConfigError: the brokers can't be reached, and why.
        DeliveryError: no broker answers.
    """
    reach(settings)
    return Producer({**librdkafka_config(settings), **_QUIET, "logger": SILENT, **config})


def list_topics(client: AdminClient | Consumer, settings: Settings, topic: str | None = None) -> ClusterMetadata:
    """What the brokers say of themselves and of all topics, or of one.

    Raises:
        DeliveryError: no broker answers.
    """
    try:
        return client.list_topics(topic, timeout=PATIENCE_S) if topic else client.list_topics(timeout=PATIENCE_S)
    except KafkaException as exc:
        raise _no_answer(settings, exc.args[0].str()) from exc


def refused(error: KafkaError, msg: str) -> ConfigError | DeliveryError:
    """The error for what brokers did not do: whether they may do it a little later, when all of them are up."""
    return DeliveryError(msg) if error.code() < 0 or error.code() in _LATER else ConfigError(msg)


def check_allowed(error: KafkaError | None, topic: str) -> None:
    """Look at why a record was not taken.

    Raises:
        NotAllowed: it may not be written there.
    """
    if error is not None and error.code() in REFUSED:
        raise NotAllowed(topic, to="Write topic")


def write_all(
    writer: Producer, topic: str, records: Iterable[tuple[bytes | None, int, bytes | None]], timeout_s: float, then: str
) -> None:
    """Write records and wait until all are acknowledged.

    Args:
        writer: see `producer`.
        topic: where to.
        records: of each key, partition (`BY_KEY` where the key decides) and value; few enough for the client's queue.
        timeout_s: how long to wait for the last.
        then: what to do if some are not acknowledged, for the error.

    Raises:
        DeliveryError: some were not acknowledged.
        NotAllowed: the topic may not be written to.
    """
    errors: list[KafkaError] = []
    acknowledged = 0

    def on_delivery(error: KafkaError | None, _: object) -> None:
        nonlocal acknowledged
        if error is None:
            acknowledged += 1
        else:
            errors.append(error)

    count = 0
    try:
        for key, partition, value in records:
            count += 1
            writer.produce(topic, value, key, partition, on_delivery=on_delivery)
        writer.flush(timeout_s)
    except KafkaException as exc:
        errors.append(exc.args[0])
    if acknowledged != count:
        error = errors[0] if errors else None
        check_allowed(error, topic)
        why = error.str() if error else "no answer"
        msg = f"{topic}: {count - acknowledged} of {count} records were not acknowledged ({why}); {then}"
        raise DeliveryError(msg)


@contextmanager
def writing(topics: Callable[[], str]) -> Iterator[None]:
    """Say why an idempotent client has given up as a whole: it has no leave to write to any topic.

    Raises:
        NotAllowed: to write to `topics`.
    """
    try:
        yield
    except KafkaException as exc:
        check_allowed(exc.args[0], topics())
        raise


def reach(settings: Settings) -> None:
    """Make sure, once a process, that the brokers can be reached; blocking.

    Raises:
        ConfigError: they can't, and why.
        DeliveryError: no broker answers.
    """
    if _key(librdkafka_config(settings)) not in _reached:
        first_contact(settings, PATIENCE_S)


def _key(config: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(config.items()))


def first_contact(settings: Settings, patience_s: float) -> ClusterMetadata:
    """What the brokers say of themselves and of all topics; blocking.

    Args:
        settings: where they are, and how to log in.
        patience_s: how long to try while nothing says that it can't succeed.

    Raises:
        ConfigError: they can't be reached, and why.
        DeliveryError: no broker answers, or nobody who gives tokens for them.
    """
    begun = time.monotonic()
    config, tls = _patient_config(settings, begun + patience_s), settings.tls_context()
    troubles: list[KafkaError] = []
    try:
        client = AdminClient({**config, **_QUIET, "error_cb": troubles.append})
    except KafkaException as exc:
        msg = f"the Kafka client refuses its settings: {exc.args[0].str()}"
        raise ConfigError(msg) from exc
    look_s, said = _FIRST_LOOK_S, "no answer"
    fault: str | None = None
    astray: str | None = None
    while True:
        try:
            cluster = client.list_topics(timeout=look_s)
        except KafkaException as exc:
            said = exc.args[0].str()
        else:
            _reached.add(_key(config))
            return cluster
        client.poll(0)
        astray = next(filter(None, (_sent_astray(settings, trouble.str()) for trouble in troubles)), astray)
        if any(trouble.code() == KafkaError._ALL_BROKERS_DOWN for trouble in troubles):
            causes = _causes(settings, tls, troubles)
            fault = next(filter(None, causes), fault)
            if fault is not None and None not in causes:
                raise ConfigError(fault)
            troubles.clear()  # of the others one may be on its way
        left_s = begun + patience_s - time.monotonic()
        if left_s <= 0:
            raise _no_answer(settings, said) if not (fault or astray) else ConfigError(fault or astray or "")
        look_s = min(2 * look_s, left_s)


def _patient_config(settings: Settings, until_s: float) -> dict[str, Any]:
    """A client's settings; who gives tokens for the brokers is waited for as they are."""
    while True:
        try:
            return librdkafka_config(settings)
        except DeliveryError:
            if time.monotonic() + _PROBE_S >= until_s:
                raise
        time.sleep(_FIRST_LOOK_S)


def _no_answer(settings: Settings, said: str) -> DeliveryError:
    return DeliveryError(f"no broker answers at {settings.bootstrap_servers} ({said}); set UEMB_BOOTSTRAP_SERVERS")


def _causes(settings: Settings, tls: ssl.SSLContext | None, troubles: Sequence[KafkaError]) -> list[str | None]:
    """Why brokers can't be reached, with the setting that is to be changed; None for what may pass by itself."""
    for trouble in troubles:
        if trouble.code() == KafkaError._AUTHENTICATION:
            return [_refused_login(settings, trouble.str())]
    return [look_at(address, settings, tls) for address in addresses(settings)]


def addresses(settings: Settings) -> list[str]:
    """Each of the bootstrap servers, host:port."""
    return [address.strip() for address in settings.bootstrap_servers.split(",")]


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of an address; ``ValueError`` where it is none."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _sent_astray(settings: Settings, said: str) -> str | None:
    """What to say of a broker that can't be reached under the address that it gave its clients; None for others."""
    found = _LEARNED.match(said)
    if found is None or found["address"] in addresses(settings):
        return None
    return (
        f"{settings.bootstrap_servers} sends its clients to {found['address']}, where they reach nobody; correct the "
        "broker's advertised.listeners, or open the way to it"
    )


def _refused_login(settings: Settings, said: str) -> str:
    where = settings.bootstrap_servers
    if "mechanism handshake failed" not in said:
        if not uses_tokens(settings):
            return f"{where} refuses the login; check UEMB_SASL_USERNAME and UEMB_SASL_PASSWORD"
        who = "UEMB_SASL_OAUTH_CLIENT_ID and _SCOPE" if settings.sasl_token_provider is None else _PROVIDER
        return f"{where} refuses the token; check {who}, and in the broker's log whom and what it expects in one"
    _, _, offered = said.partition("supported mechanisms: ")
    if offered := offered.partition("(")[0].strip():
        return f"{where} takes no login by {settings.sasl_mechanism}; set UEMB_SASL_MECHANISM to one of: {offered}"
    return f"{where} takes no login; set UEMB_SECURITY_PROTOCOL to {settings.security_protocol.removeprefix('SASL_')}"


def look_at(address: str, settings: Settings, tls: ssl.SSLContext | None) -> str | None:
    """What one broker has against a client of these settings; None for nothing that lasts."""
    try:
        host, port = host_and_port(address)
        with socket.create_connection((host, port), _PROBE_S) as connection:
            if tls is None:
                return _exchange(address, settings, connection)
            return _shake_hands(host, address, settings, tls, connection)
    except (OSError, ValueError):  # it is not there, or not yet
        return None


def _shake_hands(
    host: str, address: str, settings: Settings, tls: ssl.SSLContext, connection: socket.socket
) -> str | None:
    try:
        secured = tls.wrap_socket(connection, server_hostname=host)
    except ssl.SSLCertVerificationError as exc:
        fault = server_fault(exc, settings.ssl_cafile)
        if fault == "expired":
            return f"the certificate of {address}, or of its CA, has expired; have whoever runs the brokers renew it"
        if fault == "host":
            return f"the certificate of {address} is for another host; name it in UEMB_BOOTSTRAP_SERVERS as that does"
        return f"the certificate of {address} is signed {fault} ({exc.verify_message}); set UEMB_SSL_CAFILE to its CA's"
    except (ssl.SSLError, ConnectionError):
        plain = settings.security_protocol.replace("SSL", "PLAINTEXT")
        return f"{address} speaks no TLS; set UEMB_SECURITY_PROTOCOL to {plain}, or the port to that of TLS"
    try:
        with secured:
            return _exchange(address, settings, secured)
    except (ssl.SSLError, ConnectionError):  # such a refusal comes after the client has shaken hands
        if settings.ssl_certfile is None:
            return f"{address} demands a client's certificate; set UEMB_SSL_CERTFILE and UEMB_SSL_KEYFILE"
        if has_ended(settings.ssl_certfile):
            return f"{address} refuses the certificate in UEMB_SSL_CERTFILE, which has expired; renew it"
        return f"{address} refuses the certificate in UEMB_SSL_CERTFILE; set one that is signed by a CA that it trusts"


def _exchange(address: str, settings: Settings, connection: socket.socket) -> str | None:
    with connection.makefile("rb") as answers:
        connection.sendall(_HELLO)
        if not (answer := _answered(answers)):
            return None if isinstance(connection, ssl.SSLSocket) else _plain_to_tls(address, settings)
        if answer[:4] != _NUMBER:
            return f"{address} does not speak Kafka's protocol; name a Kafka broker in UEMB_BOOTSTRAP_SERVERS"
        if settings.uses_sasl:
            return None
        connection.sendall(_WHO)
        if _answered(answers):
            return None
    secured = "SASL_SSL" if settings.security_protocol == "SSL" else "SASL_PLAINTEXT"
    return f"{address} demands a login; set UEMB_SECURITY_PROTOCOL to {secured}, and UEMB_SASL_USERNAME and _PASSWORD"


def _answered(answers: BinaryIO) -> bytes:
    """An answer, empty when the other side hung up, or sent an alert of TLS.

    Raises:
        TimeoutError: it does neither.
    """
    try:
        head = answers.read(4)
        if len(head) < 4 or head[:2] == b"\x15\x03":
            return b""
        (size,) = struct.unpack(">I", head)
        return answers.read(size) if size <= _LARGEST_ANSWER else head
    except ConnectionResetError:
        return b""


def certificate_and_levels(address: str, tls: ssl.SSLContext | None) -> tuple[bytes | None, dict[int, int]]:
    """What a sound broker shows before any login: its certificate (DER), and the newest version of each request.

    Raises:
        OSError: it shows nothing.
    """
    host, port = host_and_port(address)
    with socket.create_connection((host, port), _PROBE_S) as connection:
        if tls is None:
            return None, _levels(connection)
        with tls.wrap_socket(connection, server_hostname=host) as secured:
            return secured.getpeercert(binary_form=True), _levels(secured)


def _levels(connection: socket.socket) -> dict[int, int]:
    with connection.makefile("rb") as answers:
        connection.sendall(_HELLO)
        answer = _answered(answers)
    told = answer[10:]  # behind correlation id, error code and a count: key, oldest and newest version of each
    return {key: newest for key, _, newest in struct.iter_unpack(">hhh", told[: len(told) // 6 * 6])}


def _plain_to_tls(address: str, settings: Settings) -> str | None:
    """What to say of a port that hangs up on plain text."""
    if not speaks_tls(*host_and_port(address)):
        return None
    secured = settings.security_protocol.replace("PLAINTEXT", "SSL")
    perhaps = "" if secured == "SASL_SSL" else ", or to SASL_SSL if it demands a login"
    return f"{address} speaks TLS; set UEMB_SECURITY_PROTOCOL to {secured}{perhaps}"
