"""Brokers, grants, topics and group as a worker's start would find them: asked, and nothing made, joined or written.

A consumer is opened only where a topic has records that only a worker writes: brokers make the topic of all groups'
offsets for whoever asks for a coordinator first, as consumers do by themselves.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from confluent_kafka.admin import AdminClient, ClusterMetadata, OffsetSpec

from stream.config import Settings
from stream.errors import ConfigError, UembError
from stream.findings import Finding, Status, failed, of_error, ok, skipped, warning
from stream.kafka.brokers import (
    addresses,
    admin_client,
    certificate_and_levels,
    first_contact,
    host_and_port,
    look_at,
)
from stream.kafka.grants import needed
from stream.kafka.group import look_at_group
from stream.kafka.log_reader import log_ends
from stream.kafka.topic_owners import check_owners
from stream.kafka.topics import (
    Survey,
    create_topics,
    hidden_topics,
    is_administered,
    missing_grants,
    room_for_dims,
    survey_topics,
)
from stream.security.certificates import end_of, own_validity, validity

#: Longest wait for a name, for a connection and for a first answer.
NAME_S: Final = 3.0
CONNECT_S: Final = 2.0
LOGIN_S: Final = 5.0
#: A record this far ahead of our clock was stamped by another one.
CLOCK_S: Final = 5.0
EMBEDDED: Final = "embedded broker"
_GRANT: Final = "grant it to this client's user (see `uemb acl`)"
_Found = TypeVar("_Found")


class BrokerCheckup:
    """Looks at one thing after another; each method relies on what those before it have found.

    Args:
        settings: the worker's own.
        role: of whose grants to look for.

    Attributes:
        survey: the topics, once `topics` has looked at them.
        levels: newest version of each request that a broker answers, once `handshakes` has looked.
    """

    def __init__(self, settings: Settings, role: str) -> None:
        self._needed = needed(role, settings)
        self.survey: Survey | None = None
        self.levels: dict[int, int] = {}
        self._settings = settings
        self._sound = addresses(settings)
        self._admin: AdminClient | None = None
        self._cluster: ClusterMetadata | None = None

    @property
    def admin(self) -> AdminClient:
        """The client that `login` has made.

        Raises:
            ConfigError: it has made none.
        """
        if self._admin is None:
            msg = "the brokers were not reached"
            raise ConfigError(msg)
        return self._admin

    @property
    def administered(self) -> bool:
        """Whether the brokers answer admin requests."""
        return self._cluster is not None and is_administered(self._cluster)

    @property
    def largest_dim(self) -> int:
        """What a record of the output topic has room for, as far as that is known."""
        configs = {} if self.survey is None else self.survey.configs
        return room_for_dims(self._settings, configs.get(self._settings.output_topic, {}))

    # -- the way there --------------------------------------------------------------------------------------------

    def names(self) -> list[Finding]:
        """Whether the names of the bootstrap servers can be resolved."""
        return self._of_each(_resolve, NAME_S, "no answer to the question for its name", "see this host's name server")

    def ports(self) -> list[Finding]:
        """Whether somebody listens there."""
        todo = "start the broker, open the way to it, or correct UEMB_BOOTSTRAP_SERVERS"
        return self._of_each(_connect, CONNECT_S, "no answer", todo)

    def own_certificate(self) -> list[Finding]:
        """How long the certificate that this client shows is valid yet.

        Raises:
            ConfigError: there is none in the file.
        """
        path = self._settings.ssl_certfile
        if path is None:
            return [ok("there is none: UEMB_SSL_CERTFILE is not set")]
        return [own_validity(path, "UEMB_SSL_CERTFILE")]

    def handshakes(self) -> list[Finding]:
        """Whether both sides mean the same protocol, trust each other's certificates, and for how long."""
        settings = self._settings
        try:
            tls = settings.tls_context()
        except ConfigError as exc:
            return [of_error(exc, "name files that this user can read, in PEM")]

        def shake_hands(address: str) -> Finding:
            if (trouble := look_at(address, settings, tls)) is not None:
                return of_error(ConfigError(trouble), "")
            certificate, self.levels = certificate_and_levels(address, tls)
            if certificate is None:
                return ok("plain text, as UEMB_SECURITY_PROTOCOL says")
            return validity(end_of(certificate), "its certificate", "have whoever runs the brokers renew it")

        silence, todo = "no answer", "see whether it is a Kafka broker, and its log"
        return self._of_each(shake_hands, LOGIN_S, silence, todo)

    def login(self) -> list[Finding]:
        """Whether a client of these settings is let in.

        Raises:
            ConfigError: it isn't, and why.
        """
        self._cluster = first_contact(self._settings, LOGIN_S)
        self._admin = admin_client(self._settings)
        how = self._settings.sasl_mechanism if self._settings.uses_sasl else "without login"
        count = len(self._cluster.brokers)
        return [ok(f"let in ({how}); the cluster has {count} broker{'s'[: count != 1]}")]

    def advertised(self) -> list[Finding]:
        """Whether the brokers can be reached where they say that clients find them."""
        brokers = () if self._cluster is None else self._cluster.brokers.values()
        places = [f"[{b.host}]:{b.port}" if ":" in b.host else f"{b.host}:{b.port}" for b in brokers]
        found = _side_by_side(
            lambda place: (_resolve(place), _connect(place)),
            [place for place in places if place not in self._sound],
            NAME_S + CONNECT_S,
        )
        todo = "correct the broker's advertised.listeners, or open the way to it"
        bad = [failed(_said(error), todo, place) for place, error in found if isinstance(error, Exception | None)]
        away = {finding.about for finding in bad}
        reached = [place for place in places if place not in away]
        return [*bad, *([ok(f"{', '.join(reached)} can be reached")] if reached else [])]

    # -- what is there --------------------------------------------------------------------------------------------

    def grants(self) -> list[Finding]:
        """Whether each grant on a topic is there that the role needs."""
        if not self.administered:
            return [skipped(EMBEDDED)]
        missing = missing_grants(self.admin, self._needed)
        found = [failed(f"not allowed to {grant}", _GRANT) for grant in missing]
        unasked = [grant for grant in self._needed if grant.kind == "transactional id"]
        return [
            *(found or [ok(f"{sum(grant.kind == 'topic' for grant in self._needed)} topics may be used as needed")]),
            *(skipped(f"{grant}: no broker tells before it is used", grant.kind) for grant in unasked),
        ]

    def topics(self, dim: int) -> list[Finding]:
        """Whether the topics are what they must be, or could be made.

        Args:
            dim: dimension of the largest item space.

        Raises:
            ConfigError: the settings of a topic can't be read.
        """
        settings, cluster = self._settings, self._cluster
        if cluster is None:
            return [skipped("the brokers were not reached")]
        self.survey = survey = survey_topics(settings, self.admin, cluster, dim)
        found = [of_error(trouble, "") for trouble in survey.troubles(settings)]
        if not self.administered:
            return found or [skipped(EMBEDDED)]
        if survey.missing:
            hidden = hidden_topics(self.admin, [topic.name for topic in survey.missing])
            for topic in (topic for topic in survey.missing if topic.name not in hidden):
                try:
                    create_topics(self.admin, [topic], settings, survey.partitions, dry_run=True)
                except ConfigError as exc:
                    found.append(of_error(exc, ""))
        if untold := survey.untold:
            detail = f"not allowed to DescribeConfigs topic {', '.join(untold)}: these settings are not checked"
            found.append(warning(detail, _GRANT))
        if found:
            return found
        made = f"; a worker makes {', '.join(topic.name for topic in survey.missing)}" if survey.missing else ""
        return [ok(f"{len(survey.there)} are there, {survey.partitions} partitions{made}")]

    def owners(self) -> list[Finding]:
        """Whether no other application writes to the same topics.

        Raises:
            ConfigError: one does.
        """
        if not self.administered:
            return [skipped(EMBEDDED)]
        check_owners(self._settings)
        return [ok("no other application writes to the output or the dead letters")]

    def group(self) -> list[Finding]:
        """Whether this client may do with the group what its role does, and the members read what a worker would.

        Raises:
            ConfigError: they read other topics.
            NotAllowed: it may not join.
        """
        if not self.administered:
            return [skipped(EMBEDDED)]
        grant = next(grant for grant in self._needed if grant.kind == "group")
        (operation,) = grant.operations
        members = look_at_group(self._settings, operation)
        if members is None:
            return [skipped(f"no broker tells of it before somebody joins; {grant} is needed")]
        return [ok(f"{members} worker{'s'[: members != 1]} in {self._settings.app_id}")]

    def clock(self) -> list[Finding]:
        """Whether the newest record that a worker wrote is ahead of this host's clock: brokers don't tell their time.

        Raises:
            DeliveryError: the brokers don't tell of their records.
            NotAllowed: they may not be asked for them.
        """
        survey = self.survey
        if survey is None or not self.administered:
            return [skipped(EMBEDDED)]
        topics = (self._settings.changelog_topic, self._settings.output_topic)
        places = [(topic, p) for topic in topics for p in range(survey.found.get(topic, 0))]
        told = log_ends(self.admin, places, OffsetSpec.max_timestamp()) if places else {}
        newest_ms = max((info.timestamp for info in told.values()), default=-1)
        if newest_ms < 0:
            return [skipped("no worker has written a record to compare with; brokers don't tell their time")]
        ahead_s = newest_ms / 1000 - time.time()
        if ahead_s > CLOCK_S:
            detail = f"the newest record of a worker is {ahead_s:.0f} s ahead of this host's clock"
            return [warning(detail, "set the clocks of all hosts by NTP")]
        return [ok(f"the newest record of a worker is {max(0.0, -ahead_s):,.0f} s old by this host's clock")]

    # -- several at a time ----------------------------------------------------------------------------------------

    def _of_each(self, look: Callable[[str], Finding], timeout_s: float, silence: str, todo: str) -> list[Finding]:
        """One line for each server that is sound so far; what some of several lack is no more than a warning."""
        found = []
        for address, result in _side_by_side(look, self._sound, timeout_s):
            if isinstance(result, Finding):
                found.append(result._replace(about=address))
            elif isinstance(result, UembError):
                found.append(of_error(result, todo, address))
            else:
                found.append(failed(silence if result is None else _said(result), todo, address))
        self._sound = [finding.about for finding in found if finding.status is not Status.FAILED]
        if not self._sound:
            return found
        return [f._replace(status=Status.WARNING) if f.status is Status.FAILED else f for f in found]


def _resolve(address: str) -> Finding:
    host, port = host_and_port(address)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return ok(", ".join(dict.fromkeys(str(place[0]) for *_, place in found)))


def _connect(address: str) -> Finding:
    socket.create_connection(host_and_port(address), CONNECT_S).close()
    return ok("takes connections")


def _said(error: Exception | None) -> str:
    """What went wrong, in the system's words."""
    if isinstance(error, TimeoutError) or error is None:
        return "no answer"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "is no host:port" if isinstance(error, ValueError) else type(error).__name__


def _side_by_side(
    look: Callable[[str], _Found], things: Sequence[str], timeout_s: float
) -> Iterator[tuple[str, "_Found | Exception | None"]]:
    """What was found of each, or what it raised; None for what did not come to an end in time.

    No pool of threads: Python waits for the threads of one at its exit, however long they take to resolve a name.
    """
    found: dict[str, _Found | Exception] = {}

    def run(thing: str) -> None:
        try:
            found[thing] = look(thing)
        except Exception as exc:  # noqa: BLE001 - told to who asked
            found[thing] = exc

    threads = [threading.Thread(target=run, args=[thing], daemon=True) for thing in things]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    done = dict(found)
    return ((thing, done.get(thing)) for thing in things)
