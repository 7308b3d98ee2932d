"""All that a user would pick instead of refit on the GPUs of one host, one after the other, in one file.

Try it without a GPU: python3 benches/peers/gpu.py --cpu --tiny
"""

import sys
import time

import nccl_gather_broadcast
import nccl_p2p
import torch_peer_copy
from common import parse, report

METHODS = {script.METHOD: script for script in (torch_peer_copy, nccl_gather_broadcast, nccl_p2p)}


def main():
    args = parse(__doc__, METHODS)
    end = time.monotonic() + args.limit
    whole = {"results": [], "skipped": [], "ceilings": []}
    failed = False
    for number, name in enumerate(args.methods):
        # What is left of the time, shared evenly by the methods that are left.
        now = time.monotonic()
        found = METHODS[name].run(args, now + (end - now) / (len(args.methods) - number))
        failed |= found["failed"]
        for key, rows in whole.items():
            rows.extend(found.get(key, []))
    report(args, whole)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
