"""The document of all topics, held against the code and read by AsyncAPI's own parser."""

import json
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
import numpy as np
import pytest
import yaml
from documents import ROOT
from jsonschema import Draft202012Validator
from npm_packages import npm_home, why_no_node

from stream.config import load_settings
from stream.core.events import DeletionDecoder, EventDecoder, EventRules, Reason, Reject, UserDeletion, UserEvent
from stream.core.records import SCHEMA_FILES, EmbeddingRecord, to_json
from stream.kafka.dead_letters import Header
from stream.kafka.grants import worker
from stream.kafka.topic_owners import KEY, Written
from stream.kafka.topics import _wanted
from stream.keys import RESERVED_WORDS
from stream.rollout.records import STAGES, STATES, BadRecord, ControlRecord, EncoderRecord, Stage, State, Status

SCHEMAS: Final = ROOT / "schemas"
DOCUMENT: Final = SCHEMAS / "asyncapi.v1.yaml"
_PARSER: Final = ROOT / "tests" / "asyncapi_parser"
HASH: Final = "ab" * 32
SETTINGS: Final = load_settings()


def schema(name: str) -> dict[str, Any]:
    """A schema of ``schemas/``, by the name of its file."""
    document: dict[str, Any] = json.loads((SCHEMAS / name).read_text())
    return document


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The document as it stands, references left alone."""
    loaded: dict[str, Any] = yaml.safe_load(DOCUMENT.read_text())
    return loaded


# -- AsyncAPI's parser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parser() -> Path:
    """The program beside its packages, which npm fetches on first use, those of the lock file and no others."""
    if reason := why_no_node():
        pytest.skip(reason)
    home = npm_home(_PARSER)
    shutil.copyfile(_PARSER / "check.mjs", home / "check.mjs")
    return home / "check.mjs"


def parsed(parser: Path, file: Path) -> dict[str, Any]:
    """What the parser says of a document."""
    ended = subprocess.run(["node", str(parser), str(file)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    said: dict[str, Any] = json.loads(ended.stdout)
    return said


def test_asyncapis_own_parser_has_nothing_against_it(parser: Path, document: dict[str, Any]) -> None:
    said = parsed(parser, DOCUMENT)
    assert said["faults"] == []
    assert said["channels"] == [channel["address"] for channel in document["channels"].values()]


@pytest.mark.parametrize(
    ("file", "right", "wrong", "says"),
    [
        ("asyncapi.v1.yaml", "action: send", "action: shout", "operations.publishVectors.action"),
        ("user_embedding.v1.avsc", '"type": "record",', '"type": "rekord",', "components.messages.embedding.payload"),
        pytest.param(
            *("asyncapi.v1.yaml", "item_status.v1", "item_status.v7", "components.messages.status.payload"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("user_event.v1.schema.json", '"type": "object"', '"type": "objekt"', "to one of the allowed values"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_parser_finds_faults_in_the_files_beside_it_too(
    file: str, right: str, wrong: str, says: str, parser: Path, tmp_path: Path
) -> None:
    """Else its silence would mean nothing."""
    folder = shutil.copytree(SCHEMAS, tmp_path / "schemas")
    text = (folder / file).read_text()
    assert right in text
    (folder / file).write_text(text.replace(right, wrong, 1))
    assert says in "\n".join(parsed(parser, folder / DOCUMENT.name)["faults"])


# -- against the code -------------------------------------------------------------------------------------------------


def test_topics_are_those_of_the_settings(document: dict[str, Any]) -> None:
    by_setting: dict[str, list[str]] = {}
    for channel in document["channels"].values():
        by_setting.setdefault(channel["x-setting"], []).append(channel["address"])
    assert by_setting == {
        "UEMB_EVENT_TOPICS": list(SETTINGS.event_topics),
        "UEMB_DELETION_TOPIC": [SETTINGS.deletion_topic],
        "UEMB_OUTPUT_TOPIC": [SETTINGS.output_topic],
        "UEMB_DLQ_TOPIC": [SETTINGS.dlq_topic],
        "UEMB_ITEM_VERSIONS_TOPIC": [SETTINGS.item_versions_topic],
        "UEMB_APP_ID": [SETTINGS.item_status_topic, SETTINGS.changelog_topic],
    }


def test_topics_are_made_as_the_document_says(document: dict[str, Any]) -> None:
    made = {wanted.name: wanted for wanted in _wanted(SETTINGS, SETTINGS.partitions, dim=48, event_limits={})}
    for channel in document["channels"].values():
        kafka, wanted = channel["bindings"]["kafka"], made.pop(channel["address"])
        told = {
            name: ",".join(value) if isinstance(value, list) else str(value)
            for name, value in kafka["topicConfiguration"].items()
        }
        # the limit follows from the settings; an event topic is made with the broker's own settings
        config = {name: value for name, value in wanted.config.items() if name != "max.message.bytes"}
        assert told == {"cleanup.policy": "delete"} | config, channel["address"]
        assert kafka["partitions"] == (wanted.partitions or wanted.create_partitions or SETTINGS.partitions)
    assert made == {}


def test_operations_are_what_a_worker_is_granted(document: dict[str, Any]) -> None:
    granted = {grant.name: grant.operations for grant in worker(SETTINGS) if grant.kind == "topic"}
    for name, operation in document["operations"].items():
        channel = document["channels"][operation["channel"]["$ref"].removeprefix("#/channels/")]
        needed = {"receive": "Read", "send": "Write"}[operation["action"]]
        assert needed in granted.pop(channel["address"]), name
        group = operation.get("bindings", {}).get("kafka", {}).get("groupId")
        assert group is None or group["default"] == SETTINGS.app_id
    assert granted == {}


def test_every_schema_is_referred_to(document: dict[str, Any]) -> None:
    referred = set(re.findall(r"\{\$ref: \./([\w.]+)\}", DOCUMENT.read_text()))
    assert referred == {file.name for file in (*SCHEMAS.glob("*.schema.json"), SCHEMAS / SCHEMA_FILES[-1])}


def test_examples_are_valid(document: dict[str, Any]) -> None:
    examples = [message for message in document["components"]["messages"].values() if "examples" in message]
    assert examples
    for message in examples:
        validator = Draft202012Validator(schema(message["payload"]["$ref"].removeprefix("./")))
        for example in message["examples"]:
            validator.validate(example["payload"])


@pytest.mark.parametrize("file", sorted(SCHEMAS.glob("*.schema.json")), ids=lambda file: file.name)
def test_schemas_are_sound(file: Path) -> None:
    Draft202012Validator.check_schema(schema(file.name))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (UserEvent, "user_event.v1.schema.json"),
        (UserDeletion, "user_deletion.v1.schema.json"),
        (ControlRecord, "item_version.v1.schema.json"),
        (EncoderRecord, "encoder_version.v1.schema.json"),
        (Status, "item_status.v1.schema.json"),
        (Written, "written_topics.v1.schema.json"),
    ],
)
def test_fields_are_those_of_the_code(kind: type[msgspec.Struct], name: str) -> None:
    told, own = schema(name), msgspec.structs.fields(kind)
    assert list(told["properties"]) == [field.encode_name for field in own]
    assert told.get("required", []) == [field.encode_name for field in own if field.required]
    for field in own:
        if not field.required:
            default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            assert told["properties"][field.encode_name].get("default", msgspec.NODEFAULT) == default, field.name


def test_states_and_stages_are_those_of_the_code() -> None:
    assert tuple(schema("item_version.v1.schema.json")["properties"]["state"]["enum"]) == STATES == get_args(State)
    assert tuple(schema("encoder_version.v1.schema.json")["properties"]["state"]["enum"]) == STATES
    assert tuple(schema("item_status.v1.schema.json")["properties"]["stage"]["enum"]) == STAGES == get_args(Stage)


def test_reserved_words_are_those_of_the_code() -> None:
    for name, field in (("item_version.v1.schema.json", "version"), ("encoder_version.v1.schema.json", "user_version")):
        _, reserved = schema(name)["properties"][field]["not"]["anyOf"]
        assert reserved["enum"] == sorted(RESERVED_WORDS)


def test_headers_and_reasons_are_those_of_the_code() -> None:
    told = schema("dead_letter_headers.v1.schema.json")
    assert list(told["properties"]) == [name for name in Header if name is not Header.REPLAYED]
    left_out = {Header.VALUE_SHA256, Header.VALUE_SIZE}
    assert told["required"] == [name for name in told["properties"] if name not in left_out]
    reasons = schema("dead_letter_reasons.v1.json")["enum"]
    assert told["properties"]["dlq.reason"]["enum"] == list(reasons) == [str(reason) for reason in Reason]


def test_a_vector_has_the_same_fields_in_avro_and_json() -> None:
    avro, told = schema(SCHEMA_FILES[-1]), schema("user_embedding.v1.schema.json")
    vector = np.float32([0.6, 0.8])
    shown = to_json(EmbeddingRecord("42", 7, 184, "ok", "", 4, 1, None, "mix-1", "films_v1", vector, 1.0))
    names = [field["name"] for field in avro["fields"]]
    assert names == list(told["properties"]) == told["required"] == list(shown)
    for field in avro["fields"]:
        inner = field["type"]
        if isinstance(inner, dict):
            names = [field["name"] for field in inner["fields"]]
            within = told["properties"][field["name"]]
            assert names == list(within["properties"]) == within["required"] == list(shown[field["name"]])
    flat = {field.name for field in fields(EmbeddingRecord)}
    assert flat == {*shown, "item_embedding_version", "vector", "norm"} - {"depends_on", "user_embedding"}
    Draft202012Validator(told).validate(shown)


def test_keys_are_those_of_the_code(document: dict[str, Any]) -> None:
    def pattern(message: str) -> str:
        told = document["components"]["messages"][message]["bindings"]["kafka"]["key"]
        return str(told.get("pattern") or re.escape(told["const"]))

    status = Status("mix-1", "films_v1", 3, 7, "covered").encode()[0]
    for message, key in {
        "embedding": b"uemb:mix-1:films_v1:a:b",
        "itemVersion": ControlRecord("v1", "/items", HASH, "active").encode()[0],
        "encoderVersion": EncoderRecord("avg-1", "retired").encode()[0],
        "status": status,
        "writtenTopics": KEY,
    }.items():
        assert re.search(pattern(message), key.decode()), message
        others = {"itemVersion", "encoderVersion", "status", "writtenTopics"} - {message, "itemVersion"}
        assert not any(re.search(pattern(other), key.decode()) for other in others), message


EVENT: Final = {"user_id": 42, "item_id": "311", "type": "view", "ts": 1_700_000_000_000}
LEFT_OUT: Final = object()


@pytest.mark.parametrize("change", [
    {}, {"later": 1}, {"user_id": "Zoë"}, {"user_id": ""}, {"user_id": "a" * 256}, {"user_id": "a" * 257},
    {"user_id": "a\nb"}, {"user_id": "a\x85b"}, {"user_id": True}, {"user_id": None}, {"user_id": 1.5},
    {"user_id": -(2**63)}, {"user_id": 2**63}, {"user_id": LEFT_OUT}, {"item_id": ""}, {"item_id": [1]},
    {"item_id": LEFT_OUT}, {"type": 1}, {"type": LEFT_OUT}, {"ts": "now"}, {"ts": 1.5}, {"ts": 315_532_799_999},
    {"ts": 315_532_800_000}, {"ts": 2**48 - 1}, {"ts": 2**48}, {"ts": LEFT_OUT},
])  # fmt: skip
def test_an_event_or_erasure_is_refused_by_code_and_schema_alike(change: dict[str, object]) -> None:
    event = {name: value for name, value in {**EVENT, **change}.items() if value is not LEFT_OUT}
    key, value = str(event.get("user_id")).encode(), json.dumps(event).encode()
    sent_at = event["ts"] if isinstance(event.get("ts"), int) else EVENT["ts"]  # no event is ahead of its record
    decoded = EventDecoder(EventRules({"view": 1})).decode("user-events", key, value, sent_at)
    valid = Draft202012Validator(schema("user_event.v1.schema.json")).is_valid(event)
    assert valid == (not isinstance(decoded, Reject)), decoded
    erased = DeletionDecoder().decode(key, value, sent_at)
    valid = Draft202012Validator(schema("user_deletion.v1.schema.json")).is_valid(event)
    assert valid == (not isinstance(erased, Reject)), erased


CONTROL: Final = {"version": "v1", "uri": "/items", "sha256": HASH, "state": "active"}
ENCODER: Final = {"user_version": "avg-1", "state": "active", "hash": HASH, "encoder": "avg"}


@pytest.mark.parametrize("change", [
    {}, {"force": True}, {"force": "yes"}, {"later": 1}, {"state": "served"}, {"uri": "items"}, {"uri": "s3://b/items"},
    {"uri": "file:///items"}, {"uri": 7}, {"sha256": "AB"}, {"version": "a:b"}, {"version": ""}, {"version": None},
    {"version": "current"}, {"version": ".."},
])  # fmt: skip
def test_a_control_record_is_refused_by_code_and_schema_alike(change: dict[str, object]) -> None:
    record = {**CONTROL, **change}
    valid = Draft202012Validator(schema("item_version.v1.schema.json")).is_valid(record)
    assert valid == accepts(ControlRecord.decode, str(record["version"]).encode(), record)


@pytest.mark.parametrize("change", [
    {}, {"force": True}, {"later": 1}, {"state": "x"}, {"hash": "xyz"}, {"params": {"decay": 0.3}}, {"uri": "relative"},
    {"params": {"decay": "x"}}, {"type_weights": 3}, {"uri": "/e"}, {"uri": ""}, {"epochs": {"0": 5}}, {"epochs": None},
    {"epochs": {"0": "x"}}, {"epochs": {"a": 1}}, {"epochs": 3}, {"user_version": "a:b"}, {"encoder": None},
    {"user_version": "meta"}, {"user_version": "."},
])  # fmt: skip
def test_an_encoders_record_is_refused_by_code_and_schema_alike(change: dict[str, object]) -> None:
    record = {**ENCODER, **change}
    valid = Draft202012Validator(schema("encoder_version.v1.schema.json")).is_valid(record)
    assert valid == accepts(EncoderRecord.decode, f"user-version:{record['user_version']}".encode(), record)


def accepts(decode: Any, key: bytes, record: dict[str, object]) -> bool:
    """Whether the code takes a record."""
    try:
        decode(key, json.dumps(record).encode())
    except BadRecord:
        return False
    return True
