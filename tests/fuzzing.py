"""Inputs that are nearly right, many a second, and what must come of them: a value, or an error in one line.

Hypothesis draws a few thousand examples a second. What reads bytes in microseconds is shown a hundred thousand of them
by a loop of our own: seeds that are right, changed here and there. The same number draws the same inputs; a test that
fails names it and the input, in hex: put that among the test's regressions.
"""

import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import pytest

#: Part of payloads, which no error may repeat.
PAYLOAD: Final = "qX7z"
#: Longest error.
LINE_CHARS: Final = 1_000
_SEED: Final = 20
_BLOCK: Final = 4096
_DRAWS: Final = 16

#: A few inputs with the plain test command, all of them with -m slow.
FEW, ALL = 300, 100_000
counts = pytest.mark.parametrize("count", [FEW, pytest.param(ALL, marks=[pytest.mark.slow])])
#: The same for what takes a file, or more, for each.
file_counts = pytest.mark.parametrize("count", [FEW, pytest.param(10_000, marks=[pytest.mark.slow])])

#: What readers of JSON stumble over.
JSON_TOKENS: Final = (
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0", b"-0.0", b"1.0", b"0.1", b"1e-400", b'""', b"[]", b"{}"),
    *(b"[" * 2_000, b'{"a":' * 1_500, b"9" * 19, b"9" * 5_000, b"-9223372036854775808", b"18446744073709551616"),
    *(b'"\\ud800"', b'"\\u0000"', b"\\udfff\\ud800", b"\xed\xa0\x80", b"\xff", b"\0", b"\n", b"\xef\xbb\xbf", b"\\"),
    *(b'"user_id":7,', b'"ts":1700000000000,', b'"item_id":["x"],', b'"%b"' % (b"x" * 3_000), "e\u0301\u202e".encode()),
    *(b",", b":", b'"', b"}", b"]", b" " * 100),
)
#: What readers of numbers in bytes stumble over.
BINARY_TOKENS: Final = (
    *(b"\0" * 8, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\x80" * 12, b"\x80" * 9 + b"\x01", b"\xff" * 9 + b"\x01"),
    *(b"\xfe\xff\xff\xff\x0f", b"\x80\x00", b"\xff\xff", b"\x80" * 3_000, b"\0" * 300, b"\xc3\x01", b"\xed\xa0\x80"),
    *(b"\x00\x00\xc0\x7f", b"\x01\x00\x80\x7f", b"\x80" * 8 + b"\x7f", b"\xff" * 8 + b"\x7f"),
)


def mutations(seeds: Sequence[bytes], tokens: Sequence[bytes], count: int) -> Iterator[bytes]:
    """So many inputs: the seeds themselves, then changed ones, and now and then bytes that are nothing at all."""
    rng = np.random.default_rng(_SEED)
    yield from seeds
    left = count - len(seeds)
    while left > 0:
        noise = rng.bytes(_BLOCK * 2)
        for row in rng.integers(0, 1 << 30, (min(left, _BLOCK), _DRAWS)).tolist():
            yield _changed(seeds, tokens, row, noise)
        left -= _BLOCK


def _changed(seeds: Sequence[bytes], tokens: Sequence[bytes], row: list[int], noise: bytes) -> bytes:
    kind, which = row[0], row[1]
    if kind % 32 == 0:
        at = which % _BLOCK
        return noise[at : at + row[2] % 80]
    data = seeds[which % len(seeds)]
    for n in range(2, 2 + 4 * (1 + (kind >> 5) % 3), 4):
        how, where, size, what = row[n : n + 4]
        at = where % (len(data) + 1)
        end = at + 1 + size % (8 if size & 1024 else 64)
        match how % 8:
            case 0:  # one bit
                data = data[:at] + bytes(b ^ 1 << what % 8 for b in data[at : at + 1]) + data[at + 1 :]
            case 1:  # one byte
                data = data[:at] + bytes((what & 255,)) + data[at + 1 :]
            case 2:
                data = data[:at] + data[end:]
            case 3:
                data = data[:end] + data[at:end] + data[end:]
            case 4:
                data = data[:at]
            case 5:
                other = seeds[what % len(seeds)]
                data = data[:at] + other[size % (len(other) + 1) :]
            case 6 if tokens:
                data = data[:at] + tokens[what % len(tokens)] + data[at:]
            case _ if tokens:
                data = data[:at] + tokens[what % len(tokens)] + data[end:]
    return data


def fuzz(
    target: Callable[[bytes], object], seeds: Sequence[bytes], tokens: Sequence[bytes], count: int,
    regressions: Sequence[bytes] = (),
) -> None:  # fmt: skip
    """Show inputs to a target, which raises what it must not raise.

    Args:
        target: is given an input.
        seeds: right inputs.
        tokens: what is put into them.
        count: how many inputs are shown.
        regressions: inputs that once found something; they are shown first.
    """
    for data in (*regressions, *mutations(seeds, tokens, count)):
        try:
            target(data)
        except Exception as exc:
            shown = data.hex() if len(data) <= 1_000 else f"{data[:1_000].hex()}… ({len(data)} bytes)"
            msg = f"seed {_SEED}, input {shown}: {type(exc).__name__}: {exc}"
            raise AssertionError(msg) from exc


def check_line(text: str, *, payload: bool = False) -> None:
    """See that a text is one line that is fit to be shown; `payload` admits names of the reader's own input."""
    assert 0 < len(text) <= LINE_CHARS, f"{len(text)} characters"
    assert not any(unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} for c in text), f"no line: {text!r}"
    assert payload or PAYLOAD not in text, f"it repeats payload: {text!r}"


def with_memory(megabytes: int, imports: str, code: str, *arguments: object) -> str:
    """What a process prints that may take so much more memory than it has after its imports.

    Args:
        megabytes: of address space.
        imports: what it imports.
        code: what it does then, with its arguments in `sys.argv`; an error of ours is printed.
        arguments: for the code.
    """
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    program = (
        f"import resource, sys\nfrom stream.errors import UembError\n{imports}\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (now + ({megabytes} << 20), -1))\n"
        f"try:\n{lines}except UembError as exc:\n    print(exc)\n"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    return done.stdout.strip()
