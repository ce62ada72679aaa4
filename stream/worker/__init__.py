"""One process: partitions claimed, restored, given up; its health."""
