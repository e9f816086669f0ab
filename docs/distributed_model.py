#!/usr/bin/env python3
"""How time grows with ranks and tokens, on paper: distributed_model.py [--check PAGE]

Prints the tables of docs/distributed.md, from the bytes that the library sends (communicator.hpp, sequence_parallel.hpp
and data_parallel.hpp say how many, and tests compare them with what communicators count) and the multiply-adds of its
kernels. With --check it fails unless PAGE holds every line that it prints.
"""

import pathlib
import sys

# The model: the paper's 3B (section 3.1): layers, differential heads, their width, hidden width of SwiGLU, vocabulary.
LAYERS, HEADS, D, EMBED, HIDDEN, VOCAB = 28, 12, 128, 3072, 8192, 100_288
WEIGHTS_A_LAYER = 4 * EMBED * EMBED + 3 * EMBED * HIDDEN
PARAMETERS = LAYERS * WEIGHTS_A_LAYER + VOCAB * EMBED

# A rank: one machine of 32 cores, each of which does what bench/README.md has for the operator on Zen 3, d = 128.
FLOP_A_SECOND = 32 * 85e9
READ_A_SECOND = 200e9  # bytes, of a KV cache in memory
LATENCY = 20e-6  # of one message
NETWORKS = (10e9 / 8, 100e9 / 8)  # bytes a second, each way

RANKS = (1, 10, 100, 1000)
FLOAT = 4


def prefill(tokens, ranks, network):
    """(seconds of computing, seconds of exchanging) of one forward pass, causal, sequence parallel."""
    pairs = tokens * tokens / 2 / ranks  # in zigzag order every rank has as many
    flop = LAYERS * (pairs * HEADS * 8 * D + 2 * WEIGHTS_A_LAYER * tokens / ranks)
    # Keys (2·d) and values (2·d) of the rows of every other rank, a head at a time.
    received = LAYERS * HEADS * 4 * D * FLOAT * tokens * (ranks - 1) / ranks
    messages = LAYERS * HEADS * (ranks - 1)
    return flop / FLOP_A_SECOND, received / network + messages * LATENCY


def gathered_bytes(tokens):
    """Keys and values of one head of the whole sequence, which every rank holds."""
    return tokens * 4 * D * FLOAT


def decode(tokens, ranks, network):
    """(seconds of reading the cache and the weights, seconds of exchanging) of one new token."""
    cache = LAYERS * HEADS * 4 * D * FLOAT * tokens / ranks
    weights = PARAMETERS * FLOAT  # every rank has all of them
    received = LAYERS * HEADS * (2 * D + 4) * FLOAT * (ranks - 1)
    messages = 0 if ranks == 1 else LAYERS * 2 * max(1, (ranks - 1).bit_length())  # two steps a layer, each a tree
    return (cache + weights) / READ_A_SECOND, received / network + messages * LATENCY


def training_step(tokens_a_rank, ranks, network):
    """(seconds of computing, seconds of exchanging) of one step of data parallel training."""
    flop = 6 * PARAMETERS * tokens_a_rank
    sent = 2 * PARAMETERS * FLOAT * (ranks - 1) / ranks
    sums = 7 * LAYERS + 2  # every matrix of a layer, the embedding, and a bucket of all that is small
    return flop / FLOP_A_SECOND, sent / network + 2 * sums * (ranks - 1) * LATENCY


def duration(seconds):
    for limit, divisor, unit in ((1, 1e-3, "ms"), (100, 1, "s"), (6000, 60, "min"), (100 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / 86400:,.0f} days"


def count(number):
    return f"{number / 1e6:g} million" if number >= 1e6 else f"{number:,}"


def table(title, first, rows, cost):
    print(f"| {title} | {first} | computing | exchange, 10 Gbit/s | share of the time | exchange, 100 Gbit/s | share |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for label, ranks in rows:
        cells = []
        for network in NETWORKS:
            computing, exchange = cost(label, ranks, network)
            cells += [duration(exchange) if ranks > 1 else "–", f"{100 * exchange / (computing + exchange):.0f} %"]
        print(f"| {count(label)} | {ranks:,} | {duration(computing)} | " + " | ".join(cells) + " |")
    print()


def print_tables():
    grid = [(tokens, ranks) for tokens in (10**6, 10**7, 10**8) for ranks in RANKS]
    table("tokens", "ranks", grid, prefill)
    table("tokens in the cache", "ranks", grid, decode)
    table("tokens a rank and step", "ranks", [(t, r) for t in (2048, 16384) for r in RANKS[1:]], training_step)
    print("| tokens | keys and values of one head, all rows |")
    print("|---:|---:|")
    for tokens in (10**6, 10**7, 10**8):
        print(f"| {count(tokens)} | {gathered_bytes(tokens) / 1e9:,.1f} GB |")
    print()
    # pairs of a head · 8·d / FLOP a second = 16·d bytes of it · tokens / network
    even = [FLOAT * FLOP_A_SECOND / network for network in NETWORKS]
    print(f"Exchange takes as long as attention at {even[0]:,.0f} tokens a rank for 10 Gbit/s, {even[1]:,.0f} for 100.")


def main():
    if len(sys.argv) == 1:
        print_tables()
        return 0
    if len(sys.argv) != 3 or sys.argv[1] != "--check":
        print(__doc__)
        return 2
    import contextlib
    import io
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        print_tables()
    page = pathlib.Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()
    missing = [line for line in printed.getvalue().splitlines() if line and line not in page]
    for line in missing:
        print(f"{sys.argv[2]} lacks: {line}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
