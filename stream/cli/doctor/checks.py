"""What a worker of these settings depends on, in the order in which one thing follows from another."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from stream.cli.doctor.run import Check
from stream.config import Settings
from stream.errors import ConfigError
from stream.findings import Finding, ok, skipped
from stream.items.manifest import file_sha256
from stream.items.space import ItemSpace
from stream.kafka.checkup import EMBEDDED, BrokerCheckup
from stream.kafka.schema_registry import open_registry
from stream.kv.checkup import StoreLook, look_at_store
from stream.kv.folders import look_at_folder
from stream.kv.protocol import Meta
from stream.rollout.checkup import catalogue_now, look_at_versions
from stream.rollout.records import NOTHING_SAID, Catalogue
from stream.worker.checkup import look_at_claims
from stream.worker.registration import registered

#: Seconds that a check may take. What follows from one another adds up to less than 15 where nobody answers: what is
#: behind a check that failed is skipped, and the others run beside it. Items may take as long as a worker lets them,
#: once their folder has been read from.
ANSWER_S: Final = 6.0
LOOK_S: Final = 3.0
LOG_S: Final = 12.0
_PARTS: Final = ("faust-streaming", "aiokafka", "confluent-kafka", "rocksdict", "redis", "numpy")
_PRODUCE, _FETCH = 0, 1


class Checkup:
    """The checks of one run, and what they tell each other.

    Args:
        settings: the worker's own.
        role: of whose grants to look for.
    """

    def __init__(self, settings: Settings, role: str) -> None:
        self._settings = settings
        self._role = role
        self._brokers = BrokerCheckup(settings, role)
        self._store: StoreLook | None = None
        self._base: ItemSpace | None = None
        self._catalogue: Catalogue | None = None

    @property
    def checks(self) -> list[Check]:
        """All of them."""
        brokers, log, there = self._brokers, "see the brokers' logs", ("advertised addresses",)
        load_s = self._settings.items_timeout_s
        own = [Check("own certificate", brokers.own_certificate, LOOK_S, "see the file")]
        if self._settings.ssl_certfile is None or not self._settings.security_protocol.endswith("SSL"):
            own = []
        way = "see whether UEMB_BOOTSTRAP_SERVERS and UEMB_SECURITY_PROTOCOL are right"
        store = "see whether UEMB_KV_URL is right, and its server runs"
        items = "see the file system of UEMB_ITEMS, and `uemb items check`"
        registry = Check("schema registry", self._registry, ANSWER_S, "see whether UEMB_SCHEMA_REGISTRY_URL is right")
        return [
            Check("names", brokers.names, ANSWER_S, way),
            Check("ports", brokers.ports, ANSWER_S, way, ("names",)),
            *own,
            Check("TLS", brokers.handshakes, ANSWER_S, way, ("ports",)),
            Check("login", brokers.login, ANSWER_S, way, ("TLS",)),
            Check("advertised addresses", brokers.advertised, ANSWER_S, log, ("login",)),
            Check("grants", brokers.grants, ANSWER_S, log, there),
            Check("items' folder", self._folder, LOOK_S, items),
            Check("items", self._items, load_s, items, ("items' folder",)),
            Check("topics", self._topics, ANSWER_S, log, there, ("items",)),
            Check("topics' owner", brokers.owners, ANSWER_S, log, there),
            Check("group", brokers.group, ANSWER_S, log, there),
            Check("clock", brokers.clock, ANSWER_S, log, there, ("topics",)),
            Check("changelog", self._changelog, LOG_S, log, there, ("topics",)),
            Check("store", self._look_at_store, ANSWER_S, store),
            Check("store's owner", self._owner, LOOK_S, store, ("store",), ("topics",)),
            Check("control topic", self._said, ANSWER_S, log, there, ("topics",)),
            Check("versions", self._versions, load_s, items, ("items",), ("control topic", "store")),
            *([] if self._settings.schema_registry_url is None else [registry]),
            Check("state folder", self._state, LOOK_S, "see the file system of UEMB_STATE_DIR"),
            Check("releases", self._releases, LOOK_S, "install it anew", (), ("TLS",)),
        ]

    def _folder(self) -> Sequence[Finding]:
        if (folder := self._settings.items) is None:
            return [ok("UEMB_ITEMS is not set: what the control topic names is served")]
        file_sha256(folder / "manifest.json")
        return [ok(f"{folder} can be read")]

    def _items(self) -> Sequence[Finding]:
        if (folder := self._settings.items) is None:
            return [ok("none in the settings")]
        self._base = space = ItemSpace.load(folder)
        return [ok(f"{space.version} in {folder}: {len(space):,} items, {space.dim} dims, {space.metric}")]

    def _topics(self) -> Sequence[Finding]:
        return self._brokers.topics(self._base.dim if self._base is not None else 1)

    def _changelog(self) -> Sequence[Finding]:
        partitions = self._found(self._settings.changelog_topic)
        if not self._brokers.administered:
            return [skipped(EMBEDDED)]
        if not partitions:
            return [ok("there is none yet")]
        return [look_at_claims(self._settings, self._brokers.admin, partitions)]

    def _look_at_store(self) -> Sequence[Finding]:
        self._store = look_at_store(self._settings.kv_url, to_write=self._role == "worker")
        return self._store.findings

    def _owner(self) -> Sequence[Finding]:
        if (meta := self._meta) is None:
            return [ok("it is empty: a worker makes it its own")]
        survey = self._brokers.survey
        partitions = survey.partitions if survey is not None and survey.found else meta.partitions
        registered(self._settings, partitions or self._settings.partitions, meta)
        return [ok(f"it belongs to {meta.app}, {meta.partitions} partitions")]

    def _said(self) -> Sequence[Finding]:
        catalogue, topic = NOTHING_SAID, self._settings.item_versions_topic
        if not self._brokers.administered:
            self._catalogue = catalogue
            return [skipped(EMBEDDED)]
        if self._found(topic):
            catalogue = catalogue_now(self._settings, self._brokers.admin)
        items, encoders = catalogue.live, catalogue.live_encoders
        for record in items.values():
            file_sha256(Path(record.path) / "manifest.json")
        self._catalogue = catalogue
        return [ok(f"it names {len(items)} item versions and {len(encoders)} encoders beside those of the settings")]

    def _versions(self) -> Sequence[Finding]:
        if self._catalogue is None:
            return [skipped("control topic must be in order first")]
        hashes = {} if self._meta is None else self._meta.encoders
        return look_at_versions(self._settings, self._catalogue, self._base, self._brokers.largest_dim, hashes)

    def _registry(self) -> Sequence[Finding]:
        registry = open_registry(self._settings)
        if registry is None:
            return []
        if self._settings.output_format != "avro":
            return [ok("the output is JSON, which it is not asked about")]
        try:
            number = registry.ask_output_id(register=False)
        except ConfigError:
            if not self._settings.schema_registry_register:
                raise
            return [ok(f"it answers; a worker registers the output's schema under subject {registry.subject}")]
        finally:
            registry.close()
        return [ok(f"the output's schema is {number}, under subject {registry.subject}")]

    def _state(self) -> Sequence[Finding]:
        return look_at_folder(self._settings.state_dir / self._settings.app_id, "UEMB_STATE_DIR")

    def _releases(self) -> Sequence[Finding]:
        levels = self._brokers.levels
        parts = [f"Python {platform.python_version()}", *map(_installed, ("user-embedding-stream", *_PARTS))]
        if levels:
            parts.append(f"brokers answer Produce up to v{levels.get(_PRODUCE)}, Fetch up to v{levels.get(_FETCH)}")
        return [ok(", ".join(parts))]

    @property
    def _meta(self) -> Meta | None:
        return None if self._store is None else self._store.meta

    def _found(self, topic: str) -> int:
        """Number of partitions of a topic, 0 where it is not there."""
        survey = self._brokers.survey
        return 0 if survey is None else survey.found.get(topic, 0)


def _installed(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} of unknown version"
