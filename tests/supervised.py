"""The processes of ``uemb worker --processes N``: which there are, and which partitions each has."""

import re
from pathlib import Path


def children(pid: int) -> list[int]:
    """Process ids of the workers that a process looks after, oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def owners(log: str) -> list[str]:
    """Number of the process that claimed each partition last, by partition; empty for one that is not looked after."""
    lines = re.findall(r"(?:\[(\d+)\] )?INFO .*partition (\d+): restored .* claimed epoch (\d+)", log)
    newest = {int(partition): process for process, partition, _ in sorted(lines, key=lambda line: int(line[2]))}
    return [process for _, process in sorted(newest.items())]
