"""What earlier releases wrote is read as they meant it, and what this one writes is what it says it writes.

A folder a release, by `freeze.py`; 0.0.0 holds what was written before the first one. They are never changed.
"""

import io
import json
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any, Final

import avro.io
import avro.schema
import fastavro
import pytest
from avro.compatibility import ReaderWriterCompatibilityChecker, SchemaCompatibilityType
from fastavro.schema import fingerprint, parse_schema, to_parsing_canonical_form
from fastavro.utils import generate_many
from freeze import HERE, ROOT, present_version, unpacked
from jsonschema import Draft202012Validator
from stored_formats import FORMATS, Format, Parts

from stream.core.records import SCHEMA_FILES

SCHEMAS: Final = ROOT / "schemas"


def _order(release: Path) -> tuple[int, ...]:
    return tuple(map(int, release.name.split(".")))


RELEASES: Final = sorted((path.parent for path in HERE.glob("*/histories.json")), key=_order)
NEWEST: Final = RELEASES[-1]


@cache
def frozen(release: Path) -> dict[str, dict[str, tuple[Parts, Any]]]:
    """What a release wrote and read out of it, by format and case."""
    found: dict[str, dict[str, tuple[Parts, Any]]] = {}
    for file in sorted(release.glob("*.json")):
        cases = json.loads(file.read_text())
        found[file.stem] = {
            case: ({part: unpacked(data) for part, data in kept["parts"].items()}, kept["says"])
            for case, kept in cases.items()
        }
    return found


every_case = pytest.mark.parametrize(
    ("release", "name", "case"),
    [
        pytest.param(release, name, case, id=f"{release.name}-{name}-{case}")
        for release in RELEASES
        for name, cases in frozen(release).items()
        for case in cases
    ],
)


@every_case
def test_what_was_written_is_read_as_it_was_meant(release: Path, name: str, case: str) -> None:
    parts, says = frozen(release)[name][case]
    assert json.loads(json.dumps(FORMATS[name].read(parts))) == says


@pytest.mark.parametrize("name", [name for name, stored in FORMATS.items() if stored.is_repeatable])
def test_this_release_writes_the_same_bytes(name: str) -> None:
    kept = {case: parts for case, (parts, _) in frozen(NEWEST).get(name, {}).items()}
    assert FORMATS[name].write() == kept, (
        f"{name} is not written as release {NEWEST.name} did: give the format a new number that this release can tell "
        "from the old one, and freeze a folder of this release (python tests/compat/freeze.py)"
    )


def test_every_format_is_kept() -> None:
    assert frozen(NEWEST).keys() == FORMATS.keys()
    for release in RELEASES:
        assert frozen(release).keys() <= FORMATS.keys(), f"{release.name} wrote what nothing reads any more"


def test_this_release_has_a_folder() -> None:
    assert NEWEST.name == present_version(), "python tests/compat/freeze.py"


# -- JSON Schemas -----------------------------------------------------------------------------------------------------


def documents(stored: Format, parts: Parts) -> list[tuple[str, Any]]:
    """What a case holds that has a JSON Schema: the name of its file, and the document."""
    found = []
    for part, name in stored.schema.items():
        if (data := parts[part]) is not None:
            document = json.loads(data)
            if part == "headers":  # names may be there twice, ours last
                document = {name: bytes.fromhex(value).decode(errors="replace") for name, value in document}
            found.append((name, document))
    return found


def folders() -> list[Path]:
    """Schemas of this release and of all that were frozen."""
    return [SCHEMAS, *(release / "schemas" for release in RELEASES if (release / "schemas").exists())]


@every_case
def test_what_was_written_is_valid_under_the_schemas_of_every_release(release: Path, name: str, case: str) -> None:
    for schema, document in documents(FORMATS[name], frozen(release)[name][case][0]):
        for folder in folders():
            if (folder / schema).exists():
                Draft202012Validator(json.loads((folder / schema).read_text())).validate(document)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What a new text of a schema may not change; notes, fields that nobody must send, and further values it may."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [where]
    found = []
    for name in sorted({*old, *new} - {"title", "description"}):
        at = f"{where}/{name}"
        if name not in old or name not in new:
            found.append(at)
        elif name in ("properties", "$defs"):
            same = {key: value for key, value in new[name].items() if key in old[name]}
            found += [f"{at}/{key}" for key in sorted(old[name].keys() - same.keys())]
            found += [text for key in same for text in differences(old[name][key], same[key], f"{at}/{key}")]
        elif name == "enum" and isinstance(old[name], list):
            found += [] if new[name][: len(old[name])] == old[name] else [at]
        elif name == "enum":
            found += [f"{at}/{key}" for key in old[name].keys() - new[name].keys()]
        else:
            found += differences(old[name], new[name], at)
    return found


@pytest.mark.parametrize(
    "file",
    [file for folder in folders()[1:] for file in sorted(folder.glob("*.json"))],
    ids=lambda file: f"{file.parents[1].name}-{file.name}",
)
def test_a_schema_stays_what_it_is(file: Path) -> None:
    assert differences(json.loads(file.read_text()), json.loads((SCHEMAS / file.name).read_text())) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"title": "other words"}, []),
        ({"properties": {"a": {"type": "string", "description": "?"}, "b": {"enum": [1]}, "c": {}}}, []),
        ({"properties": {"a": {"type": "string"}, "b": {"enum": [1, 2]}}}, []),
        ({"properties": {"a": {"type": "integer"}, "b": {"enum": [1]}}}, ["/properties/a/type"]),
        ({"properties": {"a": {"type": "string"}, "b": {"enum": [2]}}}, ["/properties/b/enum"]),
        ({"properties": {"a": {"type": "string"}}}, ["/properties/b"]),
        ({"required": ["a", "b"]}, ["/required"]),
        ({"additionalProperties": False}, ["/additionalProperties"]),
    ],
)
def test_a_schema_that_became_another_is_found(change: dict[str, Any], found: list[str]) -> None:
    old = {"title": "t", "required": ["a"], "properties": {"a": {"type": "string"}, "b": {"enum": [1]}}}
    assert differences(old, {**old, **change}) == found


# -- Avro: FULL_TRANSITIVE, by two implementations --------------------------------------------------------------------


def avro_schemas() -> dict[str, Any]:
    """Every schema of vectors that was ever written, by its fingerprint."""
    files = [file for folder in folders() for file in sorted(folder.glob("user_embedding.v*.avsc"))]
    found = [json.loads(file.read_text()) for file in files]
    return {fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO"): schema for schema in found}


def apache_objects(writer: Any, reader: Any) -> bool:
    """Whether Apache Avro's checker says that one can't read the other."""
    checked = ReaderWriterCompatibilityChecker().get_compatibility(
        avro.schema.parse(json.dumps(reader)), avro.schema.parse(json.dumps(writer))
    )
    return bool(checked.compatibility != SchemaCompatibilityType.compatible)


def readers_object(writer: Any, reader: Any) -> bool:
    """Whether fastavro or Apache Avro can't read with the one what was written with the other, or they differ."""
    schemas = [avro.schema.parse(json.dumps(schema)) for schema in (writer, reader)]
    for value in generate_many(parse_schema(writer), 20):
        data = io.BytesIO()
        fastavro.schemaless_writer(data, parse_schema(writer), value)
        data.seek(0)
        try:
            read = fastavro.schemaless_reader(data, parse_schema(writer), parse_schema(reader))
            data.seek(0)
            if avro.io.DatumReader(*schemas).read(avro.io.BinaryDecoder(data)) != read:
                return True
        except Exception:  # they raise many kinds
            return True
    return False


CHECKS: Final = {"Apache Avro's checker": apache_objects, "fastavro, and both as readers": readers_object}


def incompatible(schemas: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Writer, reader and who objects, for every pair in both directions."""
    found = []
    for writer, reader in permutations(schemas, 2):
        for name, objects in CHECKS.items():
            if objects(schemas[writer], schemas[reader]):
                found.append((writer, reader, name))
    return found


def test_every_schema_of_vectors_can_read_and_be_read_by_every_other() -> None:
    assert incompatible(avro_schemas()) == []


def test_a_schema_of_vectors_has_a_number_for_itself() -> None:
    """Bytes name their schema by its fingerprint: a file that changed would orphan what was written with it."""
    by_name: dict[str, set[str]] = {}
    for folder in folders():
        for file in folder.glob("*.avsc"):
            by_name.setdefault(file.name, set()).add(to_parsing_canonical_form(json.loads(file.read_text())))
    assert {name for name, forms in by_name.items() if len(forms) > 1} == set()
    assert by_name.keys() == set(SCHEMA_FILES), "this release can't read what was written with one of them"


def test_the_vector_comes_last() -> None:
    """So that its bytes end the record, whatever is added."""
    for schema in avro_schemas().values():
        last = schema["fields"][-1]
        assert (last["name"], last["type"]["fields"][-1]["name"]) == ("user_embedding", "vector")


def changed(how: str) -> Any:
    """The newest schema with a change."""
    schema = json.loads((SCHEMAS / SCHEMA_FILES[-1]).read_text())
    fields = schema["fields"]
    match how:
        case "a field with a default":
            fields.insert(-1, {"name": "segment", "type": ["null", "string"], "default": None})
        case "a field without one":
            fields.insert(-1, {"name": "segment", "type": "string"})
        case "a field taken away":
            fields.pop(2)
        case "a field under another name":
            fields[2]["name"] = "version"
        case "a narrower type":
            fields[1]["type"] = "int"
        case "a wider type":
            fields[5]["type"] = "long"
        case "null no more":
            fields[7]["type"] = "long"
    return schema


@pytest.mark.parametrize(
    ("how", "objected"),
    [
        ("a field with a default", set()),
        ("a field without one", {"new reads old"}),
        ("a field taken away", {"old reads new"}),
        ("a field under another name", {"old reads new", "new reads old"}),
        ("a narrower type", {"new reads old"}),
        ("a wider type", {"old reads new"}),
        ("null no more", {"new reads old"}),
    ],
)
def test_a_change_that_is_none_in_both_directions_is_found(how: str, objected: set[str]) -> None:
    schemas = avro_schemas()
    (old,) = (key for key, schema in schemas.items() if schema == json.loads((SCHEMAS / SCHEMA_FILES[-1]).read_text()))
    found = incompatible({old: schemas[old], "new": changed(how)})
    for name in CHECKS:
        directions = {"old reads new" if writer == "new" else "new reads old" for writer, _, by in found if by == name}
        assert directions == objected, name
