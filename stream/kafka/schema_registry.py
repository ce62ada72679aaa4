"""The schema registry (Confluent's API): schemas of framed events by their ids, and the id of the output's own schema.

Events are decoded where nobody waits for anything. So what a batch needs is asked for before, once for each id, in a
thread. A registry that is away is waited for as brokers are; only its own word that it has no such schema counts.
"""

import asyncio
import base64
import binascii
import importlib
import importlib.util
import logging
import re
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from stream.config import Settings
from stream.core.framing import AvroReader, JsonReader, NotOfSchema, ReadBody, Schemas
from stream.core.records import is_newest_schema, newest_schema, schema_name
from stream.errors import ConfigError, RegistryError, RegistryRefused

log = logging.getLogger(__name__)

#: One request may take so long.
TIMEOUT_S: Final = 5.0
#: What is awaited while it is asked, as an activity has it.
REGISTRY: Final = "the schema registry"
_PAUSES_S: Final = (0.1, 1.0)
#: An id that a registry does not have is asked for once more so much later: one of several may be a moment behind.
_BEHIND_S: Final = 0.5
#: And again so long after that, should it come up again.
_UNKNOWN_S: Final = 60.0
_SCHEMA_UNKNOWN: Final = 40403
_NOT_THERE: Final = (40401, 40402, _SCHEMA_UNKNOWN)
_NEEDS: Final = (
    "UEMB_SCHEMA_REGISTRY_URL needs more than is installed; run: pip install 'user-embedding-stream[registry]'"
)
_MAX_REFERENCES: Final = 200
_COMPILE_S: Final = 60.0
_FILE_NAME: Final = re.compile(r"(?!/)(?!.*(^|/)\.\.?(/|$))[\w./+-]{1,200}\.proto")
_WORDS: Final = 300
_T = TypeVar("_T")


class _NotThere(Exception):
    """The registry says that it does not have what it was asked for."""


class SchemaRegistry:
    """Asks the registry of the settings; `open_registry` makes one.

    All but `fetch` and `output_id` block for as long as the registry takes to answer, at most `TIMEOUT_S` a request.

    Args:
        settings: where it is, how it is logged in to, and how long it may be away.

    Attributes:
        schemas: what reads the bodies of framed values, by schema id.

    Raises:
        ConfigError: the extra is not installed, or a file of the settings can't be used.
    """

    def __init__(self, settings: Settings) -> None:
        try:
            api = importlib.import_module("confluent_kafka.schema_registry")
            self._http = importlib.import_module("httpx2")
            importlib.import_module("stream.core.protobuf_reader")
        except ImportError as exc:
            raise ConfigError(_NEEDS) from exc
        if importlib.util.find_spec("grpc_tools") is None:
            raise ConfigError(_NEEDS)
        logging.getLogger("httpx2").setLevel(logging.WARNING)  # it tells of every request
        self.schemas = Schemas()
        self._api: Any = api
        self._settings = settings
        self._forgot_s = time.monotonic()
        self._checked: dict[int, bool] = {}
        self._is_closed = False
        try:
            self._client = api.SchemaRegistryClient(self._config())
        except OSError as exc:  # ssl.SSLError too
            msg = f"UEMB_SCHEMA_REGISTRY_CAFILE {settings.schema_registry_cafile} can't be used: no certificates in PEM"
            raise ConfigError(msg) from exc

    def close(self) -> None:
        """Close its connections; any number of times. Who still waits for it does until cancelled."""
        self._is_closed = True
        self._client.close()

    @property
    def subject(self) -> str:
        """Under which the output's schema is registered."""
        topic, record = self._settings.output_topic, schema_name()
        names = {"topic": f"{topic}-value", "record": record, "topic_record": f"{topic}-{record}"}
        return names[self._settings.schema_registry_subject]

    # -- events ---------------------------------------------------------------------------------------------------

    def missing(self, values: Iterable[bytes | None]) -> set[int]:
        """Ids in the framing of some values that were not asked for yet."""
        if time.monotonic() - self._forgot_s > _UNKNOWN_S:
            self._forgot_s = time.monotonic()
            self.schemas.forget_unknown()
        return self.schemas.missing(values)

    async def fetch(self, ids: Iterable[int]) -> None:
        """Have `schemas` read the bodies of some ids, however long that takes within the patience of the settings.

        Raises:
            RegistryError: the registry is away for longer.
        """
        unknown = [number for number in sorted(ids) if not await self._insist(partial(self._load, number))]
        if unknown:
            await asyncio.sleep(_BEHIND_S)
        for number in unknown:
            if not await self._insist(partial(self._load, number)):
                self.schemas.add(number, None)

    def load(self, ids: Iterable[int]) -> None:
        """The same, at once or not at all.

        Raises:
            RegistryError: the registry is away.
        """
        for number in sorted(ids):
            if not self._load(number):
                self.schemas.add(number, None)

    def _load(self, number: int) -> bool:
        """Add a schema to `schemas`; return whether the registry has it."""
        try:
            schema = self._ask(lambda: self._client.get_schema(number))
        except _NotThere:
            return False
        reader: ReadBody | NotOfSchema
        try:
            reader = self._reader(number, schema)
        except _NotThere:
            reader = NotOfSchema("it refers to a schema that the registry does not have")
        except NotOfSchema as exc:
            reader = exc
        if isinstance(reader, NotOfSchema):
            log.warning("schema %s of the registry: %s; values with its id are dead-lettered", number, reader)
        self.schemas.add(number, reader)
        return True

    def _reader(self, number: int, schema: Any) -> ReadBody:
        kind = (schema.schema_type or "AVRO").upper()
        if kind == "AVRO":
            return AvroReader(schema.schema_str, [one.schema_str for one in self._references(schema).values()])
        if kind == "JSON":
            return JsonReader()
        if kind != "PROTOBUF":
            msg = f"schemas of type {kind[:20]!r} can't be read"
            raise NotOfSchema(msg)
        from stream.core.protobuf_reader import ProtobufReader

        self._client.clear_caches()  # else the schema as it is
        schema = self._ask(lambda: self._client.get_schema(number, fmt=_SERIALIZED))
        return ProtobufReader(
            protobuf_files(
                schema.schema_str, {name: one.schema_str for name, one in self._references(schema, _SERIALIZED).items()}
            )
        )

    def _references(self, schema: Any, fmt: str | None = None) -> dict[str, Any]:
        """All schemas that one takes names from, by the name that it calls them; each after those it needs itself."""
        found: dict[str, Any] = {}

        def visit(needs: Any, depth: int) -> None:
            for needed in needs or ():
                if needed.name in found:
                    continue
                if depth > _MAX_REFERENCES or len(found) >= _MAX_REFERENCES:
                    msg = f"it refers to itself, or to more than {_MAX_REFERENCES} schemas"
                    raise NotOfSchema(msg)
                get = partial(self._client.get_version, needed.subject, needed.version, deleted=True, fmt=fmt)
                one = self._ask(get).schema
                visit(one.references, depth + 1)
                found[needed.name] = one

        visit(schema.references, 0)
        return found

    # -- the output -----------------------------------------------------------------------------------------------

    async def output_id(self) -> int:
        """The id of the output's schema, registered or looked up as the settings say; for the start of a worker.

        Raises:
            ConfigError: the registry refuses the schema, or does not have it.
            RegistryError: it is away for longer than brokers may be, or lets nobody in.
        """
        return await self._insist(self.ask_output_id, is_start=True)

    def ask_output_id(self, *, register: bool | None = None) -> int:
        """The same, at once or not at all; `register` stands for that of the settings."""
        schema = self._api.Schema(newest_schema(), "AVRO")
        register = self._settings.schema_registry_register if register is None else register
        try:
            if register:
                return int(self._ask(lambda: self._client.register_schema(self.subject, schema)))
            return int(self._ask(lambda: self._client.lookup_schema(self.subject, schema)).schema_id)
        except _NotThere:
            msg = (
                f"the schema registry has not the output's schema under subject {self.subject}; register "
                "schemas/user_embedding.v1.avsc there, or set UEMB_SCHEMA_REGISTRY_REGISTER=true"
            )
            raise ConfigError(msg) from None

    def is_output_id(self, number: int) -> bool:
        """Whether an id is that of a schema of output records, whatever its subject; asked once.

        Raises:
            RegistryError: the registry is away.
        """
        if number not in self._checked:
            try:
                schema = self._ask(lambda: self._client.get_schema(number))
                self._checked[number] = is_newest_schema(schema.schema_str)
            except _NotThere:
                self._checked[number] = False
        return self._checked[number]

    # -- asking ---------------------------------------------------------------------------------------------------

    async def _insist(self, call: Callable[[], _T], *, is_start: bool = False) -> _T:
        clock, patience_s = time.monotonic, self._settings.delivery_timeout_s
        give_up_at, pause_s, is_first = clock() + patience_s, _PAUSES_S[0], True
        while True:
            try:
                result = await asyncio.to_thread(call)
            except RegistryError as exc:
                if clock() >= give_up_at or (is_start and not exc.retriable):
                    raise
                if is_first:
                    log.warning("%s; trying again for %g s, nothing is committed meanwhile", exc, patience_s)
            else:
                if not is_first:
                    log.info("the schema registry answers again")
                return result
            is_first = False
            await asyncio.sleep(min(pause_s, max(0.0, give_up_at - clock())))
            pause_s = min(2 * pause_s, _PAUSES_S[1])

    def _ask(self, call: Callable[[], Any]) -> Any:
        """What the registry answers.

        Raises:
            _NotThere: it says that it does not have that.
            ConfigError: it refuses a schema.
            RegistryError: it is away, lets nobody in, or is none.
        """
        where = self._settings.schema_registry_url
        try:
            return call()
        except self._api.SchemaRegistryError as exc:
            raise self._fault(exc) from exc
        except self._http.TransportError as exc:
            if (certificate := _certificate_fault(exc)) is not None:
                msg = f"the schema registry's certificate is refused ({certificate}); see UEMB_SCHEMA_REGISTRY_CAFILE"
                raise RegistryRefused(msg) from exc
            msg = f"no schema registry answers at {where} ({type(exc).__name__}); see UEMB_SCHEMA_REGISTRY_URL"
            raise RegistryError(msg) from exc
        except RuntimeError as exc:  # the client's, once it is closed; a worker that stops waits for nothing then
            if not self._is_closed:
                raise
            msg = "the schema registry isn't asked any more, for the worker stops"
            raise RegistryError(msg) from exc
        except (ValueError, TypeError, KeyError, AttributeError, self._http.HTTPError) as exc:
            msg = f"what answers at {where} is no schema registry; see UEMB_SCHEMA_REGISTRY_URL"
            raise RegistryError(msg) from exc

    def _fault(self, exc: Any) -> Exception:
        status, said = exc.http_status_code, " ".join(str(exc.error_message).split())[:_WORDS]
        if status == 404 and exc.error_code in _NOT_THERE:
            return _NotThere()
        if status in (401, 403):
            has_token = self._settings.schema_registry_token or self._settings.schema_registry_token_file
            setting = "TOKEN" if has_token else "USERNAME and UEMB_SCHEMA_REGISTRY_PASSWORD"
            return RegistryRefused(f"the schema registry lets nobody in ({status}); see UEMB_SCHEMA_REGISTRY_{setting}")
        if status == 409:
            return ConfigError(
                f"the schema registry refuses the output's schema, subject {self.subject}, as incompatible ({said}); "
                "see who else registers there, and its compatibility"
            )
        if status == 422:
            return ConfigError(f"the schema registry refuses a schema under subject {self.subject}: {said}")
        where = self._settings.schema_registry_url
        return RegistryError(f"the schema registry at {where} answers with an error ({status}); see its log")

    def _config(self) -> dict[str, Any]:
        settings = self._settings
        config: dict[str, Any] = {"url": settings.schema_registry_url, "timeout": TIMEOUT_S, "max.retries": 0}
        if settings.schema_registry_cafile is not None:
            config["ssl.ca.location"] = str(settings.schema_registry_cafile)
        if settings.schema_registry_username:
            password = self._secret("password")
            config["basic.auth.user.info"] = f"{settings.schema_registry_username}:{password}"
        if settings.schema_registry_token or settings.schema_registry_token_file:
            config |= {
                "bearer.auth.credentials.source": "CUSTOM",
                "bearer.auth.custom.provider.config": {},
                # of Confluent's cloud, which has the cluster in its address too
                "bearer.auth.custom.provider.function": lambda _: {
                    "bearer.auth.token": self._secret("token"),
                    "bearer.auth.logical.cluster": "",
                },
            }
        return config

    def _secret(self, name: str) -> str:
        """The password or the token, the latter out of a file that may be replaced.

        Raises:
            RegistryRefused: the file can't be read.
        """
        try:
            return self._settings.secret(f"schema_registry_{name}") or ""
        except ConfigError as exc:
            raise RegistryRefused(str(exc)) from exc


def open_registry(settings: Settings) -> SchemaRegistry | None:
    """The registry of the settings, None without one.

    Raises:
        ConfigError: see `SchemaRegistry`.
    """
    return None if settings.schema_registry_url is None else SchemaRegistry(settings)


def _certificate_fault(exc: BaseException | None) -> str | None:
    while exc is not None:
        if isinstance(exc, ssl.SSLCertVerificationError):
            return exc.verify_message
        exc = exc.__cause__ or exc.__context__
    return None


# -- Protobuf ---------------------------------------------------------------------------------------------------------

#: Asked for a Protobuf schema so, most registries give a file's descriptor in base64; others the text as it is.
_SERIALIZED: Final = "serialized"
_MAIN: Final = "default"
#: Files that every Protobuf has, and that no registry is asked for: by the beginnings of their names, where they are.
_BUILT_IN: Final = {
    "google/protobuf/": "google.protobuf.",
    "confluent/": "confluent_kafka.schema_registry.confluent.",
}


def protobuf_files(schema: str, imports: Mapping[str, str]) -> list[bytes]:
    """Serialized ``FileDescriptorProto`` of a schema and of all that it imports, each after those that it needs.

    Args:
        schema: a descriptor in base64, or the text of a ``.proto`` file.
        imports: the same of what it imports, by the name of the file; each after those that it needs.

    Raises:
        NotOfSchema: it is neither, or does not go with what it imports.
    """
    descriptors = {name: _descriptor(text) for name, text in {**imports, _MAIN: schema}.items()}
    if all(data is None for data in descriptors.values()):
        return _compiled(schema, imports)
    if None in descriptors.values():
        msg = "it is text and imports descriptors, or the other way round"
        raise NotOfSchema(msg)
    from google.protobuf import descriptor_pb2

    files: dict[str, bytes] = {}
    for name, data in descriptors.items():
        file = descriptor_pb2.FileDescriptorProto.FromString(data or b"")
        file.name = name
        for needed in file.dependency:
            files.update(_built_in(needed, files))
        files[name] = file.SerializeToString()
    return list(files.values())


def _descriptor(text: str) -> bytes | None:
    """What a text in base64 holds, None for another text."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _built_in(name: str, known: Mapping[str, bytes]) -> dict[str, bytes]:
    """The descriptor of a file that comes with Protobuf, after those that it needs; empty if it is none, or known."""
    start = next((start for start in _BUILT_IN if name.startswith(start)), None)
    if start is None or name in known:
        return {}
    module = _BUILT_IN[start] + name.removeprefix(start).removesuffix(".proto").replace("/", ".") + "_pb2"
    try:
        file = importlib.import_module(module).DESCRIPTOR
    except ImportError:
        return {}
    return {name: data for name, data in _with_needs(file) if name not in known}


def _with_needs(file: Any) -> Iterator[tuple[str, bytes]]:
    for needed in file.dependencies:
        yield from _with_needs(needed)
    yield file.name, file.serialized_pb


def _compiled(schema: str, imports: Mapping[str, str]) -> list[bytes]:
    """What protoc makes of text, in a process of its own."""
    from google.protobuf import descriptor_pb2

    with tempfile.TemporaryDirectory(prefix="uemb-protobuf-") as folder:
        for name, text in {**imports, f"{_MAIN}.proto": schema}.items():
            if not _FILE_NAME.fullmatch(name):
                msg = "it imports a file whose name is none"
                raise NotOfSchema(msg)
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        out = Path(folder, "descriptors")
        words = [f"-I{folder}", "--include_imports", f"--descriptor_set_out={out}", f"{_MAIN}.proto"]
        try:
            command = [sys.executable, "-P", "-m", "grpc_tools.protoc", *words]
            subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_S)  # noqa: S603 - no shell
            files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
        except (subprocess.SubprocessError, OSError) as exc:
            msg = "protoc can't compile it"
            raise NotOfSchema(msg) from exc
    return [file.SerializeToString() for file in files]
