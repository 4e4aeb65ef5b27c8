"""How much sooner `tftransfer --help` answers than a command that imports TensorFlow first.

    python benchmarks/bench_start_up.py

Runs both alternately and writes the median ratio, its range, machine, versions and date to results/start_up.json.
"""

from __future__ import annotations

import subprocess
import sys
import time

from record import record

PAIRS = 7


def seconds(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    ours = "import tftransfer.cli as cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass"
    theirs = f"import tensorflow\n{ours}"
    record("start_up", [(seconds(theirs), seconds(ours)) for _ in range(PAIRS)])


if __name__ == "__main__":
    main()
