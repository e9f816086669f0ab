#!/usr/bin/env python3
"""Counts instructions with callgrind: instructions.py PROGRAM COMPILER, a build of instructions.cpp for AVX2.

A differential head may cost at most 2 % more than two standard heads, and each within 2 % of what is recorded here for
GCC 12 on Debian 12: time on a busy machine says nothing, this says the same everywhere. Exits with 77, which CTest shows as
skipped, where valgrind or AVX2 are missing. A count that has changed for a reason is recorded anew, with the reason.
"""

import re
import shutil
import subprocess
import sys

LARGEST_RATIO = 1.02
TOLERANCE = 0.02
RECORDED = {"difference": 91_979_434, "standard": 90_961_196}


def count(program, what):
    """Instructions of counted_WHAT, once."""
    run = subprocess.run(["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null",
                          f"--toggle-collect=counted_{what}", program, what], capture_output=True, text=True)
    collected = re.search(r"Collected : (\d+)", run.stderr)
    if run.returncode != 0 or not collected:
        sys.exit(f"callgrind did not count {what}:\n{run.stderr}")
    return int(collected.group(1))


def main():
    program, compiler = sys.argv[1:3]
    with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        has_avx2 = re.search(r"\bavx2\b", cpuinfo.read())
    if not shutil.which("valgrind") or not has_avx2:
        print("skipped: valgrind is not installed" if has_avx2 else "skipped: this machine has no AVX2")
        return 77
    failed = False
    counts = {what: count(program, what) for what in RECORDED}
    for what, recorded in RECORDED.items():
        change = counts[what] / recorded - 1
        print(f"{what}: {counts[what]:,} instructions, recorded {recorded:,} ({change:+.2%})")
        failed |= compiler == "GNU 12" and abs(change) > TOLERANCE
    ratio = counts["difference"] / counts["standard"]
    print(f"one differential head / two standard ones: {ratio:.4f}, at most {LARGEST_RATIO}")
    return 1 if failed or not 0.5 < ratio <= LARGEST_RATIO else 0


if __name__ == "__main__":
    sys.exit(main())
