"""Settings out of the environment: what they become, and which variable an error names."""

import os
import ssl
from collections.abc import Mapping
from pathlib import Path

import pytest

from stream.config import ENV_PREFIX, SECRETS, Settings, load_settings, misspelt
from stream.errors import ConfigError
from stream.kafka.connection import aiokafka_config, librdkafka_config


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> "Loader":
    """Loads settings from variables, given without their prefix."""
    return Loader(monkeypatch)


class Loader:
    """See `load`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def __call__(self, **variables: str) -> Settings:
        for name, value in variables.items():
            self._monkeypatch.setenv(ENV_PREFIX + name.upper(), value)
        return load_settings()


def test_defaults_are_those_of_the_contract(load: Loader) -> None:
    settings = load()
    assert settings.event_topics == ("user-events.view", "user-events.like")
    topics = (settings.deletion_topic, settings.output_topic, settings.dlq_topic)
    assert topics == ("user-deletions", "user-embeddings", "user-events.dlq")
    assert settings.event_types == {"view": 1, "like": 2}
    assert (settings.event_fields, settings.event_ts_unit, settings.event_type_by_topic) == ({}, "ms", {})
    assert settings.ignored_types == ()
    assert (settings.history_limit, settings.encoder, settings.publish) == (100, "mix", "all")
    assert (settings.output_format, settings.dlq_max_bytes) == ("avro", 64 << 20)
    assert settings.kv_url.startswith("rocksdb:///")
    assert settings.changelog_topic == "user-embeddings-user-history-changelog"
    assert settings.versioned_encoder.version == "mix-edd8f311"
    assert settings.rules.native


def test_every_setting_is_explained() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("variables", "name", "value"),
    [
        ({"event_topics": "clicks"}, "event_topics", ("clicks",)),
        ({"event_topics": " a, b ,,c,"}, "event_topics", ("a", "b", "c")),
        ({"ignored_types": "impression, skip"}, "ignored_types", ("impression", "skip")),
        ({"ignored_types": ""}, "ignored_types", ()),
        ({"event_types": "view:1, like : 2,share:16383"}, "event_types", {"view": 1, "like": 2, "share": 16383}),
        (
            {"event_fields": "user_id=uid,item_id=product.id,type=event,ts=occurred_at"},
            "event_fields",
            {"user_id": "uid", "item_id": "product.id", "type": "event", "ts": "occurred_at"},
        ),
        ({"event_topics": "a,b", "event_type_by_topic": "a=view"}, "event_type_by_topic", {"a": "view"}),
        (
            {"encoder_params": "alpha_short=0.5,decay_long=1e-3"},
            "encoder_params",
            {"alpha_short": 0.5, "decay_long": 1e-3},
        ),
        ({"type_weights": "like=2"}, "type_weights", {"like": 2.0}),
        ({"event_ts_unit": "iso8601"}, "event_ts_unit", "iso8601"),
        ({"history_limit": "10000"}, "history_limit", 10_000),
        ({"replication_factor": "-1"}, "replication_factor", -1),
        ({"state_dir": "~/state"}, "state_dir", Path.home() / "state"),
        ({"items": "~/items/v1"}, "items", Path.home() / "items" / "v1"),
        ({"cache_dir": "relative"}, "cache_dir", Path("relative")),
        ({"session_timeout_s": "2.5"}, "session_timeout_s", 2.5),
        ({}, "erasure_marker_retention_ms", None),
        ({"erasure_marker_retention": ""}, "erasure_marker_retention_ms", None),
        ({"erasure_marker_retention": "90"}, "erasure_marker_retention_ms", 90_000),
        ({"erasure_marker_retention": "0.5s"}, "erasure_marker_retention_ms", 500),
        ({"erasure_marker_retention": " 45m "}, "erasure_marker_retention_ms", 45 * 60_000),
        ({"erasure_marker_retention": "36h"}, "erasure_marker_retention_ms", 36 * 3_600_000),
        ({"erasure_marker_retention": "30d"}, "erasure_marker_retention_ms", 30 * 86_400_000),
        ({"user_version": "user_v7"}, "user_version", "user_v7"),
        ({"group_instance_id": "uemb-0"}, "group_instance_id", "uemb-0"),
        ({"group_instance_id": "user-embeddings"}, "group_instance_id", "user-embeddings"),
        ({"group_instance_id": ""}, "group_instance_id", None),
        ({"stop_timeout_s": "50"}, "stop_timeout_s", 50.0),
        ({}, "http_address", ("127.0.0.1", 9464)),
        ({"http": ""}, "http_address", None),
        ({"http": " "}, "http_address", None),
        ({"http": "0.0.0.0:0"}, "http_address", ("0.0.0.0", 0)),
        ({"http": "[::1]:9464"}, "http_address", ("::1", 9464)),
        ({"http": "[::1]:9464"}, "http", "[::1]:9464"),
        ({"http": "worker-1.local:65535"}, "http_address", ("worker-1.local", 65_535)),
    ],
)
def test_a_value_as_it_is_written(load: Loader, variables: Mapping[str, str], name: str, value: object) -> None:
    assert getattr(load(**variables), name) == value


def test_names_are_read_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("uemb_history_limit", "7")
    assert load_settings().history_limit == 7


def test_overrides_win_and_none_overrides_nothing(load: Loader) -> None:
    load(items="/from/environment", history_limit="7")
    assert load_settings(items=Path("/given"), history_limit=None).items == Path("/given")
    assert load_settings(items=None).items == Path("/from/environment")
    assert load_settings(items=None).history_limit == 7


TOKEN = {"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}
#: What is wrong, the variable that the error must name (only its prefix where several take part), and the reason.
WRONG: dict[str, tuple[dict[str, str], str, str]] = {
    "partitions_0": ({"partitions": "0"}, "PARTITIONS", "1"),
    "partitions_many": ({"partitions": "10001"}, "PARTITIONS", "10000"),
    "partitions_text": ({"partitions": "four"}, "PARTITIONS", "integer"),
    "replication_0": ({"replication_factor": "0"}, "REPLICATION_FACTOR", ""),
    "replication_negative": ({"replication_factor": "-2"}, "REPLICATION_FACTOR", "-1"),
    "session_0": ({"session_timeout_s": "0"}, "SESSION_TIMEOUT_S", "greater than 0"),
    "session_nan": ({"session_timeout_s": "nan"}, "SESSION_TIMEOUT_S", ""),
    "session_infinite": ({"session_timeout_s": "inf"}, "SESSION_TIMEOUT_S", ""),
    "marker_0": ({"erasure_marker_retention": "0"}, "ERASURE_MARKER_RETENTION", "greater than 0"),
    "marker_week": ({"erasure_marker_retention": "2w"}, "ERASURE_MARKER_RETENTION", "like 30d"),
    "marker_infinite": ({"erasure_marker_retention": "inf"}, "ERASURE_MARKER_RETENTION", "like 30d"),
    "marker_negative": ({"erasure_marker_retention": "-1d"}, "ERASURE_MARKER_RETENTION", "like 30d"),
    "marker_millennium": ({"erasure_marker_retention": "365000d"}, "ERASURE_MARKER_RETENTION", "less than"),
    "gather_0": ({"gather_ms": "0"}, "GATHER_MS", "1"),
    "gather_long": ({"gather_ms": "1001"}, "GATHER_MS", "1000"),
    "delivery_0": ({"delivery_timeout_s": "0"}, "DELIVERY_TIMEOUT_S", "greater than 0"),
    "patience_negative": ({"kv_lock_patience_s": "-1"}, "KV_LOCK_PATIENCE_S", "0"),
    "hot_users_0": ({"hot_users": "0"}, "HOT_USERS", "1"),
    "dlq_small": ({"dlq_max_bytes": "65535"}, "DLQ_MAX_BYTES", "65536"),
    "history_1": ({"history_limit": "1"}, "HISTORY_LIMIT", "2"),
    "history_long": ({"history_limit": "10001"}, "HISTORY_LIMIT", "10000"),
    "protocol": ({"security_protocol": "TLS"}, "SECURITY_PROTOCOL", "SASL_SSL"),
    "mechanism": ({"sasl_mechanism": "GSSAPI"}, "SASL_MECHANISM", "PLAIN"),
    "key_without_certificate": ({"ssl_keyfile": "/k.pem"}, "SSL_KEYFILE", "UEMB_SSL_CERTFILE"),
    "secret_file_missing": ({"sasl_password_file": "/nowhere/secret"}, "SASL_PASSWORD_FILE", "can't be read (No such"),
    "secret_file_folder": ({"ssl_key_password_file": "/"}, "SSL_KEY_PASSWORD_FILE", "can't be read (Is a dir"),
    "secret_file_empty": ({"sasl_oauth_client_secret_file": "/dev/null"}, "SASL_OAUTH_CLIENT_SECRET_FILE", "is empty"),
    "secret_twice": ({"sasl_password": "x", "sasl_password_file": "/dev/null"}, "SASL_PASSWORD", "are both set; set"),
    "token_without_source": (TOKEN, "SASL_MECHANISM", "UEMB_SASL_OAUTH_TOKEN_URL or UEMB_SASL_TOKEN_PROVIDER"),
    "token_of_two": (
        {**TOKEN, "sasl_oauth_token_url": "https://i/", "sasl_token_provider": "a:b"},
        "SASL_MECHANISM",
        "not both",
    ),
    "token_url": ({**TOKEN, "sasl_oauth_token_url": "file:///etc/passwd"}, "SASL_OAUTH_TOKEN_URL", "https://host/path"),
    "token_url_login": ({**TOKEN, "sasl_oauth_token_url": "https://a:b@i/"}, "SASL_OAUTH_TOKEN_URL", "without a login"),
    "token_nobody": (
        {**TOKEN, "sasl_oauth_token_url": "https://i"},
        "SASL_OAUTH_TOKEN_URL",
        "UEMB_SASL_OAUTH_CLIENT_ID",
    ),
    "token_ca": ({"sasl_oauth_cafile": "/nowhere/ca.pem"}, "SASL_OAUTH_CAFILE", "there is no file"),
    "token_function": ({**TOKEN, "sasl_token_provider": "os.system"}, "SASL_TOKEN_PROVIDER", "module:function"),
    "token_extensions": ({"sasl_oauth_extensions": "a"}, "SASL_OAUTH_EXTENSIONS", "name=value"),
    "unit": ({"event_ts_unit": "h"}, "EVENT_TS_UNIT", "iso8601"),
    "publish": ({"publish": "some"}, "PUBLISH", "latest"),
    "format": ({"output_format": "protobuf"}, "OUTPUT_FORMAT", "avro"),
    "level": ({"log_level": "loud"}, "LOG_LEVEL", "warning"),
    "types_without_codes": ({"event_types": "view,like"}, "EVENT_TYPES", "name:value"),
    "types_with_text_codes": ({"event_types": "view:a"}, "EVENT_TYPES", "integer"),
    "types_twice": ({"event_types": "view:1,view:2"}, "EVENT_TYPES", "twice"),
    "types_without_names": ({"event_types": ":1"}, "EVENT_TYPES", "name:value"),
    "codes_twice": ({"event_types": "view:1,like:1"}, "EVENT_TYPES", "code"),
    "code_0": ({"event_types": "view:0"}, "EVENT_TYPES", "from 1"),
    "code_large": ({"event_types": "view:16384"}, "EVENT_TYPES", "16383"),
    "no_types": ({"event_types": ""}, "EVENT_TYPES", "at least one"),
    "type_ignored_and_admitted": ({"ignored_types": "view"}, "", "exactly one"),
    "fields_without_values": ({"event_fields": "user_id="}, "EVENT_FIELDS", "name=value"),
    "fields_unknown": ({"event_fields": "user=uid"}, "EVENT_FIELDS", "'user'"),
    "fields_twice": ({"event_fields": "ts=a,ts=b"}, "EVENT_FIELDS", "twice"),
    "type_of_no_topic": ({"event_type_by_topic": "other=view"}, "EVENT_TYPE_BY_TOPIC", "'other'"),
    "type_by_topic_unknown": ({"event_type_by_topic": "user-events.view=buy"}, "EVENT_TYPE", "exactly one"),
    "no_event_topics": ({"event_topics": " ,"}, "EVENT_TOPICS", "at least one"),
    "event_topics_twice": ({"event_topics": "a,a"}, "EVENT_TOPICS", "different"),
    "topics_twice": ({"output_topic": "user-deletions"}, "", "different"),
    "topic_name": ({"dlq_topic": "dead letters"}, "DLQ_TOPIC", "'dead letters'"),
    "topic_name_long": ({"deletion_topic": "x" * 250}, "DELETION_TOPIC", "name"),
    "app_name": ({"app_id": "my/app"}, "APP_ID", "'my/app'"),
    "instance_name": ({"group_instance_id": "pod/0"}, "GROUP_INSTANCE_ID", "'pod/0'"),
    "instance_name_dots": ({"group_instance_id": ".."}, "GROUP_INSTANCE_ID", "'..'"),
    "instance_name_long": ({"group_instance_id": "x" * 250}, "GROUP_INSTANCE_ID", "name"),
    "no_time_to_stop": ({"stop_timeout_s": "0"}, "STOP_TIMEOUT_S", ""),
    "encoder": ({"encoder": "sum"}, "ENCODER", "avg, mix"),
    "encoder_param_unknown": ({"encoder_params": "alpha=1"}, "ENCODER_PARAMS", "alpha_short"),
    "encoder_param_of_another": ({"encoder": "avg", "encoder_params": "alpha_short=1"}, "ENCODER_PARAMS", "decay"),
    "encoder_param_text": ({"encoder_params": "alpha_short=much"}, "ENCODER_PARAMS", "number"),
    "encoder_param_negative": ({"encoder_params": "decay_long=-1"}, "ENCODER_PARAMS", "not negative"),
    "encoder_param_nan": ({"encoder_params": "decay_long=nan"}, "ENCODER_PARAMS", "finite"),
    "encoder_param_large": ({"encoder_params": "alpha_short=1.5"}, "ENCODER_PARAMS", "at most 1"),
    "weight_0": ({"type_weights": "like=0"}, "TYPE_WEIGHTS", "weights"),
    "weight_infinite": ({"type_weights": "like=inf"}, "TYPE_WEIGHTS", "weights"),
    "weight_of_no_type": ({"type_weights": "buy=2"}, "TYPE_WEIGHTS", "'buy'"),
    "user_version_shape": ({"user_version": "user:7"}, "USER_VERSION", "[A-Za-z0-9._-]"),
    "user_version_reserved": ({"user_version": "watermark"}, "USER_VERSION", "reserved"),
    "kv_scheme": ({"kv_url": "leveldb:///x"}, "KV_URL", "rocksdb:///"),
    "kv_relative": ({"kv_url": "rocksdb://kv"}, "KV_URL", "absolute"),
    "kv_redis_db": ({"kv_url": "redis://host/first"}, "KV_URL", "number of a database"),
    "kv_empty": ({"kv_url": ""}, "KV_URL", "rocksdb:///"),
    "http_port_alone": ({"http": "9464"}, "HTTP", "like 127.0.0.1:9464"),
    "http_no_port": ({"http": "127.0.0.1"}, "HTTP", "like 127.0.0.1:9464"),
    "http_large_port": ({"http": "127.0.0.1:65536"}, "HTTP", "65535"),
    "http_ipv6_bare": ({"http": "::1:9464"}, "HTTP", "host:port"),
    "http_url": ({"http": "http://127.0.0.1:9464"}, "HTTP", "host:port"),
    "ready_0": ({"ready_max_lag_s": "0"}, "READY_MAX_LAG_S", "greater than 0"),
    "registry_no_url": ({"schema_registry_url": "registry:8081"}, "SCHEMA_REGISTRY_URL", "http://host:port"),
    "registry_one_of_two": ({"schema_registry_url": "http://a,b"}, "SCHEMA_REGISTRY_URL", "http://host:port"),
    "registry_login": ({"schema_registry_url": "http://me:it@host"}, "SCHEMA_REGISTRY_URL", "SCHEMA_REGISTRY_USERNAME"),
    "registry_no_password": ({"schema_registry_username": "me"}, "SCHEMA_REGISTRY_USERNAME", "both, or neither"),
    "registry_no_user": ({"schema_registry_password": "it"}, "SCHEMA_REGISTRY_USERNAME", "both, or neither"),
    "registry_two_logins": (
        {"schema_registry_username": "me", "schema_registry_password": "it", "schema_registry_token": "t"},
        "SCHEMA_REGISTRY_TOKEN",
        "or those",
    ),
    "registry_token_twice": (
        {"schema_registry_token": "t", "schema_registry_token_file": "/t"},
        "SCHEMA_REGISTRY_TOKEN_FILE",
        "set one of them",
    ),
    "registry_cafile": ({"schema_registry_cafile": "/no/ca.pem"}, "SCHEMA_REGISTRY_CAFILE", "/no/ca.pem"),
    "registry_subject": ({"schema_registry_subject": "event"}, "SCHEMA_REGISTRY_SUBJECT", "topic_record"),
    "no_brokers": ({"bootstrap_servers": ""}, "BOOTSTRAP_SERVERS", ""),
    "home_of_nobody": ({"state_dir": "~nobody-of-that-name/state"}, "STATE_DIR", ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_error_is_one_line_that_names_its_variable(load: Loader, name: str) -> None:
    variables, names, why = WRONG[name]
    with pytest.raises(ConfigError) as raised:
        load(**variables)
    said = str(raised.value)
    assert "\n" not in said
    assert len(said) < 300
    assert ENV_PREFIX + names in said
    assert why in said
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_may_lie_in_a_file(load: Loader, name: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("open-sesame\n")
    beside = {"schema_registry_username": "ann"} if name == "schema_registry_password" else {}
    settings = load(**{f"{name}_file": str(file)}, **beside)
    assert settings.secret(name) == "open-sesame"
    file.write_text("an other ß")
    assert settings.secret(name) == "an other ß"
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=rf"^UEMB_{name.upper()}_FILE: \S+ is no text in UTF-8"):
        settings.secret(name)
    assert "open-sesame" not in settings.model_dump_json()


def test_every_secret_may() -> None:
    given = {name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)}
    assert given == set(SECRETS)
    assert {f"{name}_file" for name in given} < set(Settings.model_fields)


def test_an_error_repeats_no_secret(load: Loader) -> None:
    with pytest.raises(ConfigError) as raised:
        load(sasl_password="open-sesame", sasl_mechanism="PALIN", kv_url="redis://:open-sesame@host")
    assert "open-sesame" not in str(raised.value)


# -- what clients get ---------------------------------------------------------------------------------------------


def test_secrets_are_masked_everywhere(load: Loader) -> None:
    settings = load(sasl_password="open-sesame", sasl_username="ali", schema_registry_token="open-sesame")
    for text in (repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump(mode="json"))):
        assert "open-sesame" not in text
        assert "ali" in text


def test_a_password_within_the_store_url_is_shown_nowhere(load: Loader) -> None:
    settings = load(kv_url="redis://ali:open-sesame@host:6379/0")
    for text in (repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert "open-sesame" not in text
    assert settings.model_dump()["kv_url"] == "redis://ali:**********@host:6379/0"
    assert settings.kv_url == "redis://ali:open-sesame@host:6379/0", "the store could not be opened"
    with pytest.raises(ConfigError, match="needs a host") as caught:
        load(kv_url="redis://:open-sesame@")
    assert "open-sesame" not in str(caught.value)


def test_plain_connections_need_no_credentials(load: Loader) -> None:
    settings = load(bootstrap_servers="a:1,b:2")
    assert aiokafka_config(settings) == {"bootstrap_servers": "a:1,b:2", "security_protocol": "PLAINTEXT"}
    assert librdkafka_config(settings) == {"bootstrap.servers": "a:1,b:2", "security.protocol": "PLAINTEXT"}


def test_both_clients_get_the_same_credentials(load: Loader) -> None:
    settings = load(
        security_protocol="SASL_SSL", sasl_mechanism="SCRAM-SHA-512", sasl_username="ali", sasl_password="open-sesame"
    )
    client = aiokafka_config(settings)
    assert isinstance(client.pop("ssl_context"), ssl.SSLContext)
    assert client == {
        "bootstrap_servers": "127.0.0.1:9092",
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "ali",
        "sasl_plain_password": "open-sesame",
    }
    assert librdkafka_config(settings) == {
        "bootstrap.servers": "127.0.0.1:9092",
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "ali",
        "sasl.password": "open-sesame",
    }


@pytest.mark.parametrize(
    "variables",
    [
        {"security_protocol": "SASL_PLAINTEXT"},
        {"security_protocol": "SASL_SSL", "sasl_username": "ali"},
        {"security_protocol": "SASL_SSL", "sasl_password": "open-sesame"},
    ],
)
def test_sasl_needs_a_user_and_a_password(load: Loader, variables: Mapping[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"UEMB_SASL_(USERNAME|PASSWORD)"):
        load(**variables)


def test_certificates_that_are_not_there_are_named(load: Loader) -> None:
    with pytest.raises(ConfigError, match="UEMB_SSL_CAFILE") as raised:
        _ = aiokafka_config(load(security_protocol="SSL", ssl_cafile="/nowhere/ca.pem"))
    assert "/nowhere/ca.pem" in str(raised.value)


def test_rules_say_how_events_are_read(load: Loader) -> None:
    settings = load(
        event_topics="clicks,hearts",
        event_fields="user_id=uid",
        event_ts_unit="s",
        event_types="view:7,heart:9",
        event_type_by_topic="clicks=view,hearts=heart",
        ignored_types="impression",
    )
    rules = settings.rules
    assert (rules.types, rules.ignored) == ({"view": 7, "heart": 9}, frozenset({"impression"}))
    assert (rules.fields, rules.ts_unit) == ({"user_id": "uid"}, "s")
    assert rules.type_by_topic == {"clicks": "view", "hearts": "heart"}
    assert not rules.native


def test_whatever_decides_a_vector_changes_the_versions_name(load: Loader) -> None:
    names = {load().versioned_encoder.version}
    for variables in (
        {"history_limit": "50"},
        {"encoder_params": "alpha_short=0.5"},
        {"type_weights": "like=2"},
        {"encoder": "avg", "encoder_params": "decay=0.05"},
        {"encoder": "mix_time", "encoder_params": ""},
        {"encoder": "mix_time", "encoder_params": "half_life_short_h=1"},
    ):
        names.add(load(**variables).versioned_encoder.version)
    assert len(names) == 7
    assert load(user_version="user_v7").versioned_encoder.version == "user_v7"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"encoder": "learned"}, "UEMB_ENCODER_FOLDER is for UEMB_ENCODER=learned"),
        ({"encoder_folder": "/nowhere"}, "UEMB_ENCODER_FOLDER is for UEMB_ENCODER=learned"),
        ({"encoder": "learned", "encoder_folder": "/nowhere"}, "UEMB_ENCODER_FOLDER: encoder /nowhere: encoder.json"),
        (
            {"encoder": "learned", "encoder_folder": "/nowhere", "type_weights": "like=2"},
            "UEMB_TYPE_WEIGHTS: a learned encoder has its own",
        ),
        (
            {"encoder": "learned", "encoder_folder": "/nowhere", "encoder_params": "decay=2"},
            "UEMB_ENCODER_PARAMS: a learned encoder has its own",
        ),
        ({"encoder": "mix_time", "encoder_params": "half_life_long_h=0"}, "UEMB_ENCODER_PARAMS: a half-life"),
        ({"own_sources": "ann"}, "UEMB_OWN_SOURCES are values of UEMB_EVENT_SOURCE"),
        ({"event_source": "a..b"}, "UEMB_EVENT_SOURCE: 'a..b' is no path"),
    ],
)
def test_settings_that_can_not_be_together_are_refused(load: Loader, variables: Mapping[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(**variables)


@pytest.mark.parametrize(
    ("variables", "same_as"),
    [
        ({"type_weights": "like=1"}, {}),
        ({"encoder_params": "alpha_short=0.6"}, {}),
        ({"event_types": "view:1,like:2,share:3"}, {}),
        ({"ignored_types": "impression"}, {}),
    ],
)
def test_what_decides_no_vector_does_not(
    load: Loader, variables: Mapping[str, str], same_as: Mapping[str, str]
) -> None:
    before = load(**same_as).versioned_encoder
    after = load(**variables).versioned_encoder
    assert (after.version, after.hash) == (before.version, before.hash)


def test_a_misspelt_variable_is_warned_of_by_name(load: Loader, caplog: pytest.LogCaptureFixture) -> None:
    load(HISTORY_LIMT="20")
    assert [record.getMessage() for record in caplog.records] == [
        "UEMB_HISTORY_LIMT is not a setting and has no effect; is UEMB_HISTORY_LIMIT meant?"
    ]


def test_settings_and_variables_of_others_are_not() -> None:
    settings = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    assert misspelt({*settings, "uemb_items", "UEMB_ITEMS_DIR", "UEMB_COMPOSE_KV_URL", "HISTORY_LIMT"}) == {}


def test_a_login_among_the_brokers_addresses_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UEMB_BOOTSTRAP_SERVERS", "ann:secret-9@127.0.0.1:9092")
    with pytest.raises(ConfigError, match="UEMB_BOOTSTRAP_SERVERS: write host:port") as caught:
        load_settings()
    assert "secret-9" not in str(caught.value)
