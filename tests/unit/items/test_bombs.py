"""Small files that stand for large ones: each is one clear line, in little memory (that of the process is limited)."""

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import check_line, with_memory

from stream.items.space import ItemSpace

#: Beside what the modules take: the longest line, and what is made of it.
MEMORY_MB = 700
LARGE = 6 << 30
ROWS = np.eye(3, dtype=np.float32)


def repeated(file: Path, part: bytes, times: int, before: bytes = b"") -> Path:
    """A gzip file of one part again and again, made without ever holding all of it."""
    with gzip.open(file, "wb", compresslevel=9) as out:
        out.write(before)
        for _ in range(times):
            out.write(part)
    return file


def giant_header(file: Path) -> Path:
    """A member of an archive whose header says that it has 700 MB."""
    header = b"\x93NUMPY\x02\x00" + struct.pack("<I", 700 << 20)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("ids.npy", "vectors.npy"):
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(header)
                for _ in range(700):
                    member.write(bytes(1 << 20))
    return file


def many_members(file: Path) -> Path:
    """Names of members that are no arrays, and lead elsewhere."""
    with zipfile.ZipFile(file, "w") as archive:
        for n in range(30_000):
            archive.writestr(f"../../{'x' * 200}{n}.npy", b"")
    return file


def lying_sizes(file: Path) -> Path:
    """An archive that says of its members that they are as long as their headers want; they hold nothing."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("ids.npy", "vectors.npy"):
            head = io.BytesIO()
            np.lib.format.write_array_header_2_0(head, {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 4)})
            archive.writestr(name, head.getvalue())
    data = file.read_bytes()
    for name in (b"ids.npy", b"vectors.npy"):
        size = struct.pack("<I", 128 + (16 << 20))
        at = data.rindex(name)  # in the directory, whose sizes lie before the name
        data = data[: at - 22] + size + data[at - 18 :]
    file.write_bytes(data)
    return file


def parquet(file: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), file, compression="zstd", use_dictionary=False)
    return file


def some_of(names: Iterable[str], *plain: str) -> list[Any]:
    """Names, all but some of them marked as slow."""
    return [name if name in plain else pytest.param(name, marks=pytest.mark.slow) for name in names]


#: Lines of which each closes a quote and opens another one: one record, however many there are.
QUOTES = (b'","' + b"x" * 1_000 + b"\n") * 100
VECTORS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "v.jsonl.gz": (lambda file: repeated(file, b" " * (1 << 20), 1_500), "longer than 16 MiB"),
    "v.csv.gz": (
        lambda file: repeated(file, QUOTES, 400, b'item_id,vector\n"a'),
        "holds a record of more than 16 MiB",
    ),
    "v.txt.gz": (lambda file: repeated(file, b"1 " * (1 << 19), 300), "longer than 16 MiB"),
    "v.bin.gz": (lambda file: repeated(file, b"x" * (1 << 20), 300, b"999999999999 999999\n"), "ends in row 0"),
    "values.jsonl": (
        lambda file: _written(file, b'{"item_id": 1, "vector": [' + b"[]," * 5_000_000 + b"1]}\n"),
        "lacks item_id and vector",
    ),
    "v.npz": (giant_header, "is not a .npz of plain arrays"),
    "many.npz": (many_members, "lacks ids and vectors"),
    "lying.npz": (lying_sizes, "is not a .npz of plain arrays"),
    "v.parquet": (
        lambda file: parquet(file, item_id=["a", "b"], vector=[[0.0] * 40_000_000] * 2),
        "bytes that expand to",
    ),
}


def _written(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("name", some_of(VECTORS, "v.csv.gz", "lying.npz"))
def test_item_vectors(name: str, tmp_path: Path) -> None:
    make, says = VECTORS[name]
    code = "import_items(Path(sys.argv[1]), Path(sys.argv[2]), 'v1')"
    imports = "from pathlib import Path\nimport pyarrow.parquet\nfrom stream.items.importer import import_items"
    said = with_memory(MEMORY_MB, imports, code, make(tmp_path / name), tmp_path / "v1")
    assert says in said
    check_line(said.replace(str(tmp_path), ""), payload=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def _one_text(file: Path) -> Path:
    """Half a megabyte for 64 GB of ids."""
    users = pa.DictionaryArray.from_arrays(pa.array([0] * 8_192, pa.int32()), pa.array([ID]))
    columns = {"item_id": [1] * 8_192, "type": ["view"] * 8_192, "ts": [T0] * 8_192}
    pq.write_table(pa.table({"user_id": users, **columns}), file, compression="zstd", store_schema=False)
    return file


T0 = 1_700_000_000_000
ID = "x" * (8 << 20)
HEAD = b"user_id,item_id,type,ts\n"
EVENTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "line.csv.gz": (lambda file: repeated(file, b" " * (1 << 20), 1_500, HEAD + b"1"), "longer than 16 MiB"),
    "quotes.csv.gz": (lambda file: repeated(file, QUOTES, 400, HEAD + b'"a'), "holds a record of more than 16 MiB"),
    "line.jsonl.gz": (lambda file: repeated(file, b"[" * (1 << 20), 300, b'{"user_id": '), "longer than 16 MiB"),
    "ids.parquet": (_one_text, "user_id: an id must have 1 to 256 UTF-8 bytes"),
    "page.parquet": (
        lambda file: parquet(file, user_id=[ID * 20], item_id=[1], type=["view"], ts=[T0]),
        "bytes that expand to",
    ),
}


@pytest.mark.parametrize("name", some_of(EVENTS, "ids.parquet"))
def test_events(name: str, tmp_path: Path) -> None:
    make, says = EVENTS[name]
    code = "for row in read_file(sys.argv[1]):\n    pass"
    imports = "import pyarrow.parquet\nfrom stream.feed.event_files import read_file"
    said = with_memory(MEMORY_MB, imports, code, make(tmp_path / name))
    assert says in said
    check_line(said.replace(str(tmp_path), ""), payload=True)


def space(folder: Path) -> Path:
    folder.mkdir()
    ItemSpace.save(folder / "v1", "v1", ["a", "b", "c"], ROWS)
    return folder / "v1"


def described(folder: Path, **changes: object) -> None:
    """Have the manifest describe the files as they are, and something else."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest["sha256"] = {n: sha256((folder / n).read_bytes()).hexdigest() for n in manifest["sha256"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def sparse(folder: Path, name: str) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(LARGE)


def test_sparse_files_of_an_item_space(tmp_path: Path) -> None:
    """They take no room on a disk, and hours to read."""
    names = ("manifest.json", "ids.txt", "vectors.npy")
    for name in names:
        sparse(space(tmp_path / name), name)
    said = refused(tmp_path, names)
    assert said["manifest.json"].endswith("manifest.json can't be read (it is larger than 16,777,216 bytes)")
    assert "ids.txt has 6,442,450,944 bytes, of what its manifest describes at most 771" in said["ids.txt"]
    assert "vectors.npy has 6,442,450,944 bytes, of what its manifest" in said["vectors.npy"]


V1 = b"\x93NUMPY\x01\x00\x76\x00"
HEADERS = {
    "long": b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31),
    "open": V1 + b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, }",
    "large": V1 + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976, 99)}",
    "negative": V1 + b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3, -3)}",
    "pickle": V1 + b"{'descr': '|O', 'fortran_order': False, 'shape': (3, 3)}",
    "nested": b"\x93NUMPY\x03\x00\x74\x00\x00\x00" + b"(" * 110,
    "minus": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9_000) + b"-" * 8_999 + b"1",
}


def test_headers_that_no_array_has(tmp_path: Path) -> None:
    for name, header in HEADERS.items():
        folder = space(tmp_path / name)
        (folder / "vectors.npy").write_bytes(header.ljust(128) + bytes(36))
        described(folder)
    said = refused(tmp_path, HEADERS)
    assert {text.partition("v1: ")[2] for text in said.values()} == {"vectors.npy is not a plain .npy array"}


def test_a_count_that_no_memory_holds(tmp_path: Path) -> None:
    described(space(tmp_path / "count"), count=1 << 60)
    assert "ids.txt must have 1152921504606846976 lines, it has 6 bytes" in refused(tmp_path, ["count"])["count"]


def refused(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """What is said of each item space in a process that has little memory."""
    code = (
        "for name in sys.argv[2:]:\n"
        "    try:\n        ItemSpace.load(f'{sys.argv[1]}/{name}/v1')\n"
        "    except UembError as exc:\n        print(exc)"
    )
    said = with_memory(200, "from stream.items.space import ItemSpace", code, folder, *names).splitlines()
    for line in said:
        check_line(line)
    return dict(zip(names, said, strict=True))


def test_a_store_whose_record_is_a_giant(tmp_path: Path) -> None:
    (tmp_path / "meta.json").touch()
    sparse(tmp_path, "meta.json")
    imports = "from stream.kv.rocksdb.layout import read_meta"
    assert "it is larger than" in with_memory(200, imports, "read_meta(sys.argv[1])", tmp_path)
