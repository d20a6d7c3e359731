"""How fast this machine streams memory: what decoding at batch 1 can at most be held against.

One dot product of a large float32 array with itself: OpenBLAS (NumPy's) splits it over its threads, reads each byte
once and has next to nothing to compute (NumPy's own sum and max read a third slower on one core). The best of several
passes counts, as in STREAM (McCalpin): what the memory can do, not what it did. In a process of its own, because
OpenBLAS takes its number of threads from the environment when it is loaded.

    python benchmarks/bandwidth.py [--threads 2] [--gigabytes 1]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time


def read_bandwidth_gb_s(threads: int, *, gigabytes: float = 1.0, repeats: int = 5) -> float:
    """GB/s (1e9 bytes) of a streaming read over `gigabytes` by `threads` threads; the best of `repeats` passes."""
    command = [sys.executable, __file__, "--gigabytes", str(gigabytes), "--repeats", str(repeats), "--bare"]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def _best_pass_gb_s(gigabytes: float, repeats: int) -> float:
    import numpy as np

    array = np.ones(int(gigabytes * 1e9 / 4), np.float32)  # written, so that every page is there
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        started_s = time.perf_counter()
        np.dot(array, array)
        seconds.append(time.perf_counter() - started_s)
    return float(array.nbytes / min(seconds[1:]) / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bare", action="store_true", help="measure in this process, print the number alone")
    args = parser.parse_args()
    if args.bare:
        print(_best_pass_gb_s(args.gigabytes, args.repeats))
        return
    figure = read_bandwidth_gb_s(args.threads, gigabytes=args.gigabytes, repeats=args.repeats)
    print(f"{figure:.1f} GB/s, streaming read, {args.threads} threads")


if __name__ == "__main__":
    main()
