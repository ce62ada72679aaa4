"""What `pip install` brings, and what an import then takes: of the reader alone, and of each extra.

    python tests/bench/bench_install.py [--extra worker …] [--source DIR] [--runs 15] [--json]

Each is a fresh environment with the newest versions that pip finds. MB are those of the files that pip wrote, its
byte code among them, without pip and setuptools themselves. An import is that of `from stream import EmbeddingReader`
in a fresh process: the median of many, with the memory that the process then takes, and by `-X importtime` who took
the time. `--source` measures another checkout, an older one for example.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
READER: Final = "from stream import EmbeddingReader"
_INSTALLED: Final = """
import json
from importlib.metadata import distributions
sizes = {d.name: sum(f.locate().stat().st_size for f in d.files or () if f.locate().is_file()) for d in distributions()}
print(json.dumps({name: size for name, size in sizes.items() if name.lower() not in ("pip", "setuptools")}))
"""
_IMPORTED: Final = """
import time
began = time.perf_counter()
{what}
took = time.perf_counter() - began
status = open("/proc/self/status").read()
print(took * 1e3, int(status.split("VmRSS:")[1].split()[0]) / 1024)
"""


def environment(folder: Path, source: Path, extra: str) -> Path:
    """A fresh environment with the project of a checkout, and an extra unless that is empty; its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    what = f"{source}[{extra}]" if extra else str(source)
    subprocess.run([str(folder / "bin" / "pip"), "install", "-q", what], check=True)
    return folder / "bin" / "python"


def installed(python: Path) -> dict[str, float]:
    """MB of each installed package, largest first."""
    said = subprocess.run([str(python), "-c", _INSTALLED], check=True, capture_output=True, text=True)
    sizes: dict[str, int] = json.loads(said.stdout)
    return {name: size / 1e6 for name, size in sorted(sizes.items(), key=lambda item: -item[1])}


def imported(python: Path, what: str, runs: int) -> tuple[float, float]:
    """Medians: milliseconds that an import takes, and MiB of memory that the process then has."""
    code = _IMPORTED.format(what=what)
    found = []
    for _ in range(runs + 1):  # the first reads the files from disk
        said = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True, cwd="/")
        found.append([float(word) for word in said.stdout.split()])
    took_ms, memory_mib = zip(*found[1:], strict=True)
    return statistics.median(took_ms), statistics.median(memory_mib)


def shares(python: Path, what: str) -> dict[str, float]:
    """Milliseconds of an import's own time by top-level package, largest first; the standard library is one."""
    command = [str(python), "-X", "importtime", "-c", what]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")
    own: Counter[str] = Counter()
    for line in said.stderr.splitlines()[1:]:
        us, _, name = line.removeprefix("import time:").split("|")
        top = name.strip().partition(".")[0]
        own["the standard library" if top in sys.stdlib_module_names else top] += int(us)
    return {name: us / 1e3 for name, us in own.most_common()}


def measure(source: Path, extra: str, runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder), source, extra)
        sizes = installed(python)
        nothing_ms, nothing_mib = imported(python, "pass", runs)
        took_ms, memory_mib = imported(python, READER, runs)
        return {
            "extra": extra,
            "packages": len(sizes),
            "mb": round(sum(sizes.values()), 1),
            "largest_mb": {name: round(mb, 1) for name, mb in list(sizes.items())[:6]},
            "import_ms": round(took_ms - nothing_ms, 1),
            "memory_mib": round(memory_mib, 1),
            "memory_of_python_mib": round(nothing_mib, 1),
            "import_ms_by_package": {name: round(ms, 1) for name, ms in list(shares(python, READER).items())[:6]},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=ROOT, help="checkout to install")
    parser.add_argument("--extra", action="append", help="only these; '' is the reader alone  [default: all but dev]")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    project = tomllib.loads((args.source / "pyproject.toml").read_text())["project"]
    extras = ["", *(name for name in project["optional-dependencies"] if name != "dev")]
    found = []
    for extra in extras if args.extra is None else args.extra:
        found.append(measure(args.source.resolve(), extra, args.runs))
        if not args.json:
            one = found[-1]
            print(
                f"{extra or 'the reader alone'}: {one['packages']} packages, {one['mb']} MB; "
                f"import {one['import_ms']} ms, {one['memory_mib']} MiB (Python alone {one['memory_of_python_mib']})\n"
                f"  MB: {one['largest_mb']}\n  ms: {one['import_ms_by_package']}",
                flush=True,
            )
    if args.json:
        print(json.dumps({"python": platform.python_version(), "machine": platform.machine(), "installs": found}))


if __name__ == "__main__":
    main()
