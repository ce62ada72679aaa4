"""Settings: every ``UEMB_*`` environment variable, typed, checked and masked in one class."""

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple
from urllib.parse import urlsplit

try:
    from pydantic import Field, SecretStr, ValidationError, field_serializer, field_validator, model_validator
    from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
except ModuleNotFoundError:
    from stream.extras import need_worker

    need_worker(__name__)
    raise

from stream.core.encoders import VersionedEncoder, make_encoder
from stream.core.events import FIELDS, EventRules, TsUnit
from stream.core.exposure import Exposure
from stream.encoders.folder import open_encoder
from stream.errors import ConfigError, EncoderError
from stream.foreign_text import one_line
from stream.kv.urls import masked_kv_url, parse_kv_url
from stream.logs import LogForm
from stream.security.credentials import FreshContext, TlsFiles, read_secret

log = logging.getLogger(__name__)

#: Topics, groups and their members.
_NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")
ENV_PREFIX: Final = "UEMB_"
MAX_TYPE_CODE: Final = 16_383
#: The kind of encoder that is no formula.
LEARNED: Final = "learned"
#: Ends the name of an application's status topic.
ITEM_STATUS: Final = "-item-status"
#: From here on two names are alike; others with our prefix may be somebody's own, as those of a compose file are.
_ALIKE: Final = 0.8
_ADDRESS = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")
MAX_PORT: Final = 65_535
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)")
#: A setting may be any text, of which a fault shows the beginning.
_FAULT_MAX_CHARS: Final = 900
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}
#: Settings that may be given in a file as well.
SECRETS: Final = (
    "sasl_password",
    "sasl_oauth_client_secret",
    "ssl_key_password",
    "schema_registry_password",
    "schema_registry_token",
    "inspect_token",
)
#: The mechanism that logs in with a token.
OAUTHBEARER: Final = "OAUTHBEARER"
_TLS_SETTINGS: Final = {
    "ca": "UEMB_SSL_CAFILE",
    "certificate": "UEMB_SSL_CERTFILE",
    "key": "UEMB_SSL_KEYFILE",
    "key_password": "UEMB_SSL_KEY_PASSWORD",
    "key_password_file": "UEMB_SSL_KEY_PASSWORD_FILE",
}
_URL = re.compile(r"https?://[^/?#@\s]+([/?]\S*)?")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_DATA: Final = Path("~/.local/share/user-embedding-stream")

Topics = Annotated[tuple[str, ...], NoDecode]
Mapped = Annotated[dict[str, str], NoDecode]
Numbers = Annotated[dict[str, float], NoDecode]
Codes = Annotated[dict[str, int], NoDecode]


class Address(NamedTuple):
    """A host and a port, written ``host:port``, or ``[host]:port`` where the host is an address of IPv6."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read one.

        Raises:
            ValueError: the text is none.
        """
        found = _ADDRESS.fullmatch(text.strip())
        if found is None or int(found[3]) > MAX_PORT:
            msg = f"write host:port, with a port from 0 to {MAX_PORT}, like 127.0.0.1:9464"
            raise ValueError(msg)
        return cls(found[1] or found[2], int(found[3]))


class Settings(BaseSettings):
    """What a worker, a reader or the command line is told from outside."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True, validate_default=True)

    # Kafka
    bootstrap_servers: str = Field("127.0.0.1:9092", min_length=1, description="Kafka brokers, host:port,host:port")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to talk to the brokers"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = Field(
        "PLAIN", description="SASL mechanism"
    )
    sasl_username: str | None = Field(None, description="SASL user")
    sasl_password: SecretStr | None = Field(None, description="SASL password")
    sasl_password_file: Path | None = Field(None, description="a file with the SASL password instead")
    sasl_oauth_token_url: str | None = Field(
        None, description="where an issuer gives tokens (OAuth client credentials)"
    )
    sasl_oauth_client_id: str | None = Field(None, description="who this client is to the issuer")
    sasl_oauth_client_secret: SecretStr | None = Field(None, description="its secret there")
    sasl_oauth_client_secret_file: Path | None = Field(None, description="a file with that secret instead")
    sasl_oauth_scope: str | None = Field(None, description="scopes to ask the issuer for, separated by blanks")
    sasl_oauth_extensions: Mapped = Field({}, description="SASL extensions to send with a token, logicalCluster=lkc-1")
    sasl_oauth_cafile: Path | None = Field(
        None, description="CA certificates (PEM) to check the issuer against, where not UEMB_SSL_CAFILE"
    )
    sasl_token_provider: str | None = Field(
        None, description="a function that gives tokens instead of an issuer, module:function"
    )
    ssl_cafile: Path | None = Field(None, description="CA certificates (PEM) to check the brokers against")
    ssl_certfile: Path | None = Field(None, description="this client's certificate (PEM), where brokers demand one")
    ssl_keyfile: Path | None = Field(None, description="its private key (PEM)")
    ssl_key_password: SecretStr | None = Field(None, description="what the key is encrypted with")
    ssl_key_password_file: Path | None = Field(None, description="a file with that password instead")
    app_id: str = Field("user-embeddings", description="consumer group and owner of the key-value store")
    partitions: int = Field(4, ge=1, le=10_000, description="partitions of topics that the worker creates")
    replication_factor: int = Field(-1, ge=-1, description="replicas of topics that the worker creates; -1: broker's")
    standbys: int = Field(0, ge=0, le=10, description="workers that keep a copy of each partition's histories current")
    group_instance_id: str | None = Field(
        None,
        description="a name of this worker's own: back within the session timeout, it keeps its partitions",
    )
    session_timeout_s: float = Field(30.0, gt=0, le=1800, description="the group drops a worker silent for so long")
    gather_ms: int = Field(
        12,
        ge=1,
        le=1000,
        description="events that come in quickly are taken in together for so long: more cost less, each is later",
    )
    delivery_timeout_s: float = Field(
        60.0, gt=0, le=86_400, description="the worker stops when brokers or the store are away for so long"
    )
    stop_timeout_s: float = Field(
        24.0, gt=0, le=3600, description="a stop that takes longer is cut short; less than what the supervisor waits"
    )

    # topics
    event_topics: Topics = Field(("user-events.view", "user-events.like"), description="input topics")
    deletion_topic: str = Field("user-deletions", description="erasures (compacted)")
    output_topic: str = Field("user-embeddings", description="vectors (compacted)")
    dlq_topic: str = Field("user-events.dlq", description="dead letters")
    item_versions_topic: str = Field("item-versions", description="what shall become of item versions (compacted)")
    dlq_max_bytes: int = Field(64 << 20, ge=1 << 16, description="largest value that is dead-lettered whole")

    # events
    event_fields: Mapped = Field({}, description="field mapping, user_id=uid,item_id=product.id,type=event,ts=at")
    event_ts_unit: TsUnit = Field("ms", description="unit of the event's time field")
    event_type_by_topic: Mapped = Field({}, description="topic=type,… for topics whose events have no type field")
    event_types: Codes = Field({"view": 1, "like": 2}, description="admitted types with permanent codes, view:1,like:2")
    ignored_types: Topics = Field((), description="types that are valid but never admitted to a history")
    event_source: str | None = Field(
        None, description="path of the field that says what led to an event, to be counted"
    )
    own_sources: Topics = Field((), description="values of it for what was found with user vectors")

    erasure_marker_retention: float | None = Field(
        None,
        gt=0,
        le=100 * 366 * 86_400,
        description="keep the marker of an erased user for so long, in seconds or like 30d; empty: for ever",
    )

    # vectors
    history_limit: int = Field(100, ge=2, le=10_000, description="interactions retained per user (L)")
    encoder: str = Field("mix", description="avg, mix, mix_time or learned; served while no other is activated")
    encoder_folder: Path | None = Field(None, description="folder of the learned encoder")
    encoder_params: Numbers = Field({}, description="parameters, for example alpha_short=0.6,decay_long=0.01")
    type_weights: Numbers = Field({}, description="factor per type, like=2.0; types not listed weigh 1")
    user_version: str | None = Field(None, description="alias of the user-embedding version; default is its hash")
    items: Path | None = Field(None, description="item space folder that is served")
    items_timeout_s: float = Field(
        600.0, gt=0, le=86_400, description="a worker refuses a folder not loaded in so long"
    )
    publish: Literal["all", "latest"] = Field("all", description="one record per applied event, or per batch and user")
    output_format: Literal["avro", "json"] = Field("avro", description="format on the output topic")

    # schema registry
    schema_registry_url: str | None = Field(
        None, description="schema registry (Confluent's API) of events and output, https://host:port,…; empty: none"
    )
    schema_registry_username: str | None = Field(None, description="user of the schema registry")
    schema_registry_password: SecretStr | None = Field(None, description="password of the schema registry")
    schema_registry_password_file: Path | None = Field(None, description="a file with that password instead")
    schema_registry_token: SecretStr | None = Field(None, description="bearer token of the schema registry")
    schema_registry_token_file: Path | None = Field(
        None, description="a file with that token instead, read again for each request"
    )
    schema_registry_cafile: Path | None = Field(None, description="CA certificates (PEM) to check the registry against")
    schema_registry_register: bool = Field(
        True, description="a worker registers the schema of the output at its start; false: it must be registered"
    )
    schema_registry_subject: Literal["topic", "record", "topic_record"] = Field(
        "topic", description="how the subject of the output's schema is named: Confluent's three strategies"
    )

    # stores
    kv_url: str = Field(
        default_factory=lambda: f"rocksdb://{_DATA.expanduser()}/kv",
        repr=False,  # it may hold a password
        description="key-value store that retrieval reads, rocksdb:///path or redis[s]://[user:password@]host[:port][/db]",
    )
    kv_group: str | None = Field(None, description="a group, by name or number, that may read an embedded store, too")
    state_dir: Path = Field(_DATA / "state", description="this worker's local tables; one folder per worker")
    hot_users: int = Field(10_000, ge=1, description="users kept in memory, all partitions together")
    kv_lock_patience_s: float = Field(
        30.0, ge=0, le=86_400, description="wait for another process to let go of a database"
    )
    cache_dir: Path = Field(Path("~/.cache/user-embedding-stream"), description="downloads of the demo")
    http: str = Field(
        "127.0.0.1:9464",
        description="where a worker serves metrics and health, host:port; 0 takes a free port; empty: nowhere",
    )
    inspect: str = Field("127.0.0.1:9470", description="where `uemb inspect` serves its page, host:port")
    inspect_token: SecretStr | None = Field(
        None, description="what whoever opens that page must know; needed where others can reach it"
    )
    inspect_token_file: Path | None = Field(None, description="a file with that token instead")
    inspect_workers: Topics = Field(
        (), description="workers that it looks at, host:port or host:port-port; empty: the one at UEMB_HTTP"
    )
    inspect_titles: Path | None = Field(
        None, description="what it calls items: CSV or tab-separated, with the columns item_id and title"
    )
    ready_max_lag_s: float = Field(
        30.0, gt=0, le=366 * 86_400, description="a worker that is further behind than this is not ready"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log line")
    log_format: LogForm = Field("text", description="log lines of a worker: text, or json with one object a line")

    @field_validator("event_topics", "ignored_types", "own_sources", "inspect_workers", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(filter(None, (p.strip() for p in value.split(",")))) if isinstance(value, str) else value

    @field_validator(
        "event_fields", "event_type_by_topic", "encoder_params", "type_weights", "sasl_oauth_extensions", mode="before"
    )
    @classmethod
    def _equals(cls, value: object) -> object:
        return _pairs(value, "=")

    @field_validator("event_types", mode="before")
    @classmethod
    def _colons(cls, value: object) -> object:
        return _pairs(value, ":")

    @field_validator(
        "items",
        "encoder_folder",
        "event_source",
        "group_instance_id",
        "kv_group",
        "inspect_token_file",
        "inspect_titles",
        "schema_registry_url",
        "schema_registry_password_file",
        "schema_registry_token_file",
        "schema_registry_cafile",
        "sasl_password_file",
        "sasl_oauth_token_url",
        "sasl_oauth_client_secret_file",
        "sasl_oauth_scope",
        "sasl_oauth_cafile",
        "sasl_token_provider",
        "ssl_key_password_file",
        mode="before",
    )
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("erasure_marker_retention", mode="before")
    @classmethod
    def _duration(cls, value: object) -> object:
        if isinstance(value, str):
            return _seconds(value) if value.strip() else None
        return value

    @field_validator("cache_dir", "state_dir", "items", "encoder_folder", "inspect_titles", mode="after")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        try:
            return value.expanduser() if value is not None else None
        except RuntimeError as exc:
            msg = "there is no home folder for ~; give a whole path"
            raise ValueError(msg) from exc

    @field_validator("kv_url")
    @classmethod
    def _known_store(cls, value: str) -> str:
        try:
            parse_kv_url(value)
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc
        return value

    @field_validator("bootstrap_servers")
    @classmethod
    def _no_login(cls, value: str) -> str:
        if "@" in value:
            msg = "write host:port,host:port; a login belongs in UEMB_SASL_USERNAME and UEMB_SASL_PASSWORD"
            raise ValueError(msg)
        return value

    @field_validator("http")
    @classmethod
    def _address(cls, value: str) -> str:
        return str(Address.parse(value)) if value.strip() else ""

    @field_validator("inspect")
    @classmethod
    def _some_address(cls, value: str) -> str:
        return str(Address.parse(value))

    @field_serializer("kv_url")
    def _without_password(self, value: str) -> str:
        return masked_kv_url(value)

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        faults = []
        for check in (
            self._check_names,
            self._check_events,
            self._check_encoder,
            self._check_kafka,
            self._check_secrets,
            self._check_login,
            self._check_registry,
        ):
            try:
                check()
            except ValueError as exc:
                faults.append(str(exc))
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _check_kafka(self) -> None:
        if self.replication_factor == 0:
            msg = "UEMB_REPLICATION_FACTOR must be at least 1, or -1 for the broker's own"
            raise ValueError(msg)
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            msg = "UEMB_SSL_KEYFILE is of UEMB_SSL_CERTFILE; set that, too"
            raise ValueError(msg)
        for name in ("ssl_cafile", "sasl_oauth_cafile"):
            # pathlib fails on a name that is too long
            if (path := getattr(self, name)) is not None and not os.path.isfile(path):
                msg = f"{ENV_PREFIX}{name.upper()}: there is no file {path}"
                raise ValueError(msg)

    def _check_secrets(self) -> None:
        for name in SECRETS:
            value, file = getattr(self, name), getattr(self, f"{name}_file")
            if file is not None and value is not None and value.get_secret_value():
                msg = f"{ENV_PREFIX}{name.upper()} and {ENV_PREFIX}{name.upper()}_FILE are both set; set one of them"
                raise ValueError(msg)
            try:
                self.secret(name)
            except ConfigError as exc:
                raise ValueError(str(exc)) from exc

    def _check_login(self) -> None:
        if not self.uses_sasl:
            return
        if self.sasl_mechanism == OAUTHBEARER:
            self._check_tokens()
        elif not (self.sasl_username and (self.sasl_password_file or self.secret("sasl_password"))):
            msg = "UEMB_SECURITY_PROTOCOL with SASL needs UEMB_SASL_USERNAME and UEMB_SASL_PASSWORD, or its _FILE"
            raise ValueError(msg)

    def _check_tokens(self) -> None:
        if (self.sasl_oauth_token_url is None) == (self.sasl_token_provider is None):
            msg = (
                "UEMB_SASL_MECHANISM=OAUTHBEARER needs UEMB_SASL_OAUTH_TOKEN_URL or UEMB_SASL_TOKEN_PROVIDER, not both"
            )
            raise ValueError(msg)
        if self.sasl_token_provider is not None:
            if not _FUNCTION.fullmatch(self.sasl_token_provider):
                msg = "UEMB_SASL_TOKEN_PROVIDER: write module:function"
                raise ValueError(msg)
            return
        if not _URL.fullmatch(self.sasl_oauth_token_url or ""):
            msg = "UEMB_SASL_OAUTH_TOKEN_URL: write https://host/path, or http://, without a login in it"
            raise ValueError(msg)
        secret = self.sasl_oauth_client_secret_file or self.secret("sasl_oauth_client_secret")
        if not (self.sasl_oauth_client_id and secret):
            msg = (
                "UEMB_SASL_OAUTH_TOKEN_URL needs UEMB_SASL_OAUTH_CLIENT_ID and UEMB_SASL_OAUTH_CLIENT_SECRET, "
                "or its _FILE"
            )
            raise ValueError(msg)

    def _check_registry(self) -> None:
        for url in (self.schema_registry_url or "").split(",") if self.schema_registry_url else ():
            parts = urlsplit(url.strip())
            if parts.scheme not in ("http", "https") or not parts.hostname:
                msg = "UEMB_SCHEMA_REGISTRY_URL: write http://host:port or https://host:port"
                raise ValueError(msg)
            if parts.username is not None or parts.query or parts.fragment:
                msg = (
                    "UEMB_SCHEMA_REGISTRY_URL may hold no login; set UEMB_SCHEMA_REGISTRY_USERNAME and "
                    "UEMB_SCHEMA_REGISTRY_PASSWORD"
                )
                raise ValueError(msg)
        if (path := self.schema_registry_cafile) is not None and not path.is_file():
            msg = f"UEMB_SCHEMA_REGISTRY_CAFILE: there is no file {path}"
            raise ValueError(msg)
        has_password = bool(self.schema_registry_password or self.schema_registry_password_file)
        if has_password != bool(self.schema_registry_username):
            msg = (
                "UEMB_SCHEMA_REGISTRY_USERNAME and UEMB_SCHEMA_REGISTRY_PASSWORD belong together; set both, or neither"
            )
            raise ValueError(msg)
        if has_password and (self.schema_registry_token or self.schema_registry_token_file):
            msg = "UEMB_SCHEMA_REGISTRY_TOKEN stands for a user and password; set it, or those"
            raise ValueError(msg)

    def _group_names(self) -> dict[str, str]:
        """What may be called as a topic is."""
        instance = {} if self.group_instance_id is None else {"UEMB_GROUP_INSTANCE_ID": self.group_instance_id}
        return {"UEMB_APP_ID": self.app_id, **instance}

    def _check_names(self) -> None:
        names = {
            "UEMB_DELETION_TOPIC": self.deletion_topic,
            "UEMB_OUTPUT_TOPIC": self.output_topic,
            "UEMB_DLQ_TOPIC": self.dlq_topic,
            "UEMB_ITEM_VERSIONS_TOPIC": self.item_versions_topic,
            **self._group_names(),
        }
        topics = [*(("UEMB_EVENT_TOPICS", t) for t in self.event_topics), *names.items()]
        if not self.event_topics:
            msg = "UEMB_EVENT_TOPICS needs at least one topic"
            raise ValueError(msg)
        seen: dict[str, str] = {}
        for variable, name in topics:
            if not _NAME.fullmatch(name) or name in (".", ".."):
                msg = f"{variable}: {name[:60]!r} is no name that Kafka admits"
                raise ValueError(msg)
            if variable not in self._group_names() and name in seen:
                msg = f"{variable}: topic {name!r} is given twice (also in {seen[name]}); all must be different"
                raise ValueError(msg)
            seen.setdefault(name, variable)

    def _check_events(self) -> None:
        if unknown := set(self.event_fields) - set(FIELDS):
            msg = f"UEMB_EVENT_FIELDS maps {', '.join(FIELDS)}; it can't map {sorted(unknown)[0]!r}"
            raise ValueError(msg)
        try:
            for topic in self.event_topics:
                self.rules.paths(topic)
        except ValueError as exc:
            msg = f"UEMB_EVENT_FIELDS: {exc}"
            raise ValueError(msg) from exc
        if self.own_sources and self.event_source is None:
            msg = "UEMB_OWN_SOURCES are values of UEMB_EVENT_SOURCE; set that, too"
            raise ValueError(msg)
        try:
            if self.event_source is not None:
                Exposure(self.event_source, frozenset(self.own_sources))
        except ValueError as exc:
            msg = f"UEMB_EVENT_SOURCE: {exc}"
            raise ValueError(msg) from exc
        if unknown := set(self.event_type_by_topic) - set(self.event_topics):
            msg = f"UEMB_EVENT_TYPE_BY_TOPIC names {sorted(unknown)[0]!r}, which is not among UEMB_EVENT_TOPICS"
            raise ValueError(msg)
        codes = list(self.event_types.values())
        if not codes or len(set(codes)) != len(codes) or min(codes) < 1 or max(codes) > MAX_TYPE_CODE:
            msg = f"UEMB_EVENT_TYPES needs at least one type, each with its own code from 1 to {MAX_TYPE_CODE}"
            raise ValueError(msg)
        if both := set(self.ignored_types) & set(self.event_types):
            msg = (
                f"UEMB_IGNORED_TYPES: {sorted(both)[0]!r} is in UEMB_EVENT_TYPES too; each type must be in exactly one"
            )
            raise ValueError(msg)
        if unknown := {*self.event_type_by_topic.values()} - {*self.event_types, *self.ignored_types}:
            msg = (
                f"UEMB_EVENT_TYPE_BY_TOPIC: type {sorted(unknown)[0]!r} must be in exactly one of "
                "UEMB_EVENT_TYPES and UEMB_IGNORED_TYPES"
            )
            raise ValueError(msg)
        if unknown := set(self.type_weights) - set(self.event_types):
            msg = f"UEMB_TYPE_WEIGHTS names {sorted(unknown)[0]!r}, which is not among UEMB_EVENT_TYPES"
            raise ValueError(msg)

    def _check_encoder(self) -> None:
        if (self.encoder == LEARNED) != (self.encoder_folder is not None):
            msg = f"UEMB_ENCODER_FOLDER is for UEMB_ENCODER={LEARNED}, which can't do without; set both, or neither"
            raise ValueError(msg)
        if self.encoder == LEARNED:
            self._check_learned()
            return
        steps: list[tuple[str, Callable[[], object]]] = [
            ("UEMB_ENCODER", lambda: make_encoder(self.encoder, {}, {})),
            ("UEMB_ENCODER_PARAMS", lambda: make_encoder(self.encoder, self.encoder_params, {})),
            ("UEMB_TYPE_WEIGHTS", lambda: make_encoder(self.encoder, {}, self.type_weights)),
            ("UEMB_USER_VERSION", lambda: self.versioned_encoder.version),
        ]
        for variable, make in steps:
            try:
                make()
            except ValueError as exc:
                msg = f"{variable}: {exc}"
                raise ValueError(msg) from exc

    def _check_learned(self) -> None:
        given = {"UEMB_ENCODER_PARAMS": self.encoder_params, "UEMB_TYPE_WEIGHTS": self.type_weights}
        for variable, params in given.items():
            if params:
                msg = f"{variable}: a learned encoder has its own, in its folder; leave it empty"
                raise ValueError(msg)
        try:
            _ = self.versioned_encoder.version
        except EncoderError as exc:
            msg = f"UEMB_ENCODER_FOLDER: {exc}"
            raise ValueError(msg) from exc
        except ValueError as exc:
            msg = f"UEMB_USER_VERSION: {exc}"
            raise ValueError(msg) from exc

    @property
    def rules(self) -> EventRules:
        """Which events are admitted, and how they are read."""
        return EventRules(
            types=self.event_types,
            ignored=frozenset(self.ignored_types),
            fields=self.event_fields,
            ts_unit=self.event_ts_unit,
            type_by_topic=self.event_type_by_topic,
            source=self.event_source,
            own_sources=frozenset(self.own_sources),
        )

    @property
    def http_address(self) -> Address | None:
        """Where metrics and health are served; None: nowhere."""
        return Address.parse(self.http) if self.http else None

    @property
    def erasure_marker_retention_ms(self) -> int | None:
        """How long the marker of an erased user is kept, None for ever."""
        return None if self.erasure_marker_retention is None else int(self.erasure_marker_retention * 1000)

    def topic_of(self, kind: str) -> str:
        """The event topic for interactions of a type.

        Raises:
            ValueError: none of the topics is for it.
        """
        for topic, fixed in self.event_type_by_topic.items():
            if fixed == kind:
                return topic
        free = [topic for topic in self.event_topics if topic not in self.event_type_by_topic]
        for topic in free:
            if topic == kind or topic.endswith((f".{kind}", f"-{kind}", f"_{kind}")):
                return topic
        if len(free) == 1:
            return free[0]
        msg = "no topic of UEMB_EVENT_TOPICS is for its type; name one in UEMB_EVENT_TYPE_BY_TOPIC"
        raise ValueError(msg)

    @property
    def versioned_encoder(self) -> VersionedEncoder:
        """The encoder with its history length and name; the model of a learned one is loaded when it is first asked."""
        if self.encoder_folder is not None:
            return VersionedEncoder(open_encoder(self.encoder_folder), self.history_limit, self.user_version)
        encoder = make_encoder(self.encoder, self.encoder_params, self.type_weights)
        return VersionedEncoder(encoder, self.history_limit, self.user_version)

    @property
    def changelog_topic(self) -> str:
        """Changelog of the history table, named as Faust names it."""
        return f"{self.app_id}-user-history-changelog"

    @property
    def item_status_topic(self) -> str:
        """How far each partition is with each item version (compacted)."""
        return f"{self.app_id}{ITEM_STATUS}"

    @property
    def uses_sasl(self) -> bool:
        """Whether the brokers want a login."""
        return self.security_protocol.startswith("SASL")

    def secret(self, name: str) -> str | None:
        """One of `SECRETS`, out of the setting or, anew at each call, out of its file; None where neither is set.

        Raises:
            ConfigError: the file can't be read, or is empty.
        """
        if (file := getattr(self, f"{name}_file")) is not None:
            return read_secret(file, f"{ENV_PREFIX}{name.upper()}_FILE")
        value: SecretStr | None = getattr(self, name)
        return value.get_secret_value() if value is not None else None

    def tls_context(self) -> FreshContext | None:
        """What certificates are checked and shown with; None where the brokers speak no TLS.

        Raises:
            ConfigError: a file of certificates can't be used.
        """
        if not self.security_protocol.endswith("SSL"):
            return None
        password = self.ssl_key_password.get_secret_value() if self.ssl_key_password else None
        return FreshContext(
            TlsFiles(
                self.ssl_cafile,
                self.ssl_certfile,
                self.ssl_keyfile,
                password,
                self.ssl_key_password_file,
                _TLS_SETTINGS,
            )
        )


def _pairs(value: object, separator: str) -> object:
    """A mapping from a text like ``a:1,b:2``; what is no text stays as it is.

    Raises:
        ValueError: the text is none like that, or names something twice.
    """
    if not isinstance(value, str):
        return value
    out: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in value.split(","))):
        name, found, rest = part.partition(separator)
        if not found or not name.strip() or not rest.strip():
            msg = f"write name{separator}value, separated by commas"
            raise ValueError(msg)
        if name.strip() in out:
            msg = f"{name.strip()} is given twice"
            raise ValueError(msg)
        out[name.strip()] = rest.strip()
    return out


def numbers_of(text: str) -> dict[str, float]:
    """Numbers by name, from a text like ``alpha_short=0.5,decay_long=0.02``.

    Raises:
        ValueError: the text is none like that.
    """
    found = _pairs(text, "=")
    try:
        return {name: float(value) for name, value in found.items()} if isinstance(found, dict) else {}
    except ValueError:
        msg = "write name=number, separated by commas"
        raise ValueError(msg) from None


def _seconds(text: str) -> float:
    """Seconds that a text like ``30d``, ``36h`` or ``90`` stands for.

    Raises:
        ValueError: it stands for none.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        msg = "write seconds, or a number with s, m, h or d, like 30d"
        raise ValueError(msg)
    return float(found[1]) * _SECONDS[found[2]]


def wants_json_lines() -> bool:
    """Whether the log shall be JSON, where settings are not read yet, or can't be."""
    return any(name.upper() == f"{ENV_PREFIX}LOG_FORMAT" and value == "json" for name, value in os.environ.items())


def load_settings(**overrides: object) -> Settings:
    """Read the environment; `overrides` that are not None win. Warns of variables that look misspelt.

    Raises:
        ConfigError: in one line, which variable is wrong and why.
    """
    for name, meant in misspelt(os.environ).items():
        log.warning("%s is not a setting and has no effect; is %s meant?", name, meant)
    try:
        return _from_environment({name: value for name, value in overrides.items() if value is not None})
    except ValidationError as exc:
        raise ConfigError(_faults(exc)[0]) from None
    except UnicodeEncodeError:
        raise ConfigError(_not_utf8()[0]) from None


def _not_utf8() -> list[str]:
    """The variables whose text is not UTF-8: pydantic can't speak of what is wrong with them."""
    found = sorted(name for name, value in os.environ.items() if name.startswith(ENV_PREFIX) and not _is_utf8(value))
    return [f"{name} is not UTF-8" for name in found] or ["a value is not UTF-8"]


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def settings_faults() -> list[str]:
    """What is wrong in the environment, a line for each variable; empty where `load_settings` takes all of it."""
    try:
        _from_environment({})
    except ValidationError as exc:
        return _faults(exc)
    except UnicodeEncodeError:
        return _not_utf8()
    return []


def _from_environment(overrides: Mapping[str, object]) -> Settings:
    return Settings(**overrides)  # type: ignore[arg-type]


def _faults(exc: ValidationError) -> list[str]:
    found = []
    for error in exc.errors(include_url=False, include_input=False):
        where = f"{ENV_PREFIX}{str(error['loc'][0]).upper()}: " if error["loc"] else ""
        found += [
            one_line(where + text, _FAULT_MAX_CHARS) for text in error["msg"].removeprefix("Value error, ").splitlines()
        ]
    return found


def misspelt(names: Iterable[str]) -> dict[str, str]:
    """Of environment variables, those that are no setting but nearly one, each with the setting it resembles."""
    known = [name.upper() for name in Settings.model_fields]
    given = {name: name.upper().removeprefix(ENV_PREFIX) for name in names if name.upper().startswith(ENV_PREFIX)}
    found = {name: difflib.get_close_matches(rest, known, 1, _ALIKE) for name, rest in given.items()}
    return {name: ENV_PREFIX + near[0] for name, near in found.items() if near and near[0] != given[name]}
