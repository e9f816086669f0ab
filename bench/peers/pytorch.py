#!/usr/bin/env python3
"""PyTorch's CPU attention on the shapes of bench_kernel.cpp, one thread: milliseconds of alternating runs, median and
fastest.

usage: pytorch.py        needs PyTorch: Debian sid's python3-torch, or pip install torch

standard      scaled_dot_product_attention over two heads (64, 64)
differential  one head (64, V 128) as the official multihead_flashdiff_2.py composes it: four calls of width 64 and a
              subtraction, which is what a kernel with equal widths allows
Forward, and forward with backward. GFLOP/s count 8d FLOP a visible pair forward, as bench_kernel.cpp does.
"""
import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention as attention

D = 64


def standard(q, k, v, causal):
    return attention(q, k, v, is_causal=causal)


def differential(q, k, v, causal):
    """q, k, v: (1, 2, n, 64). The two heads are the two maps, and the two halves of V."""
    values = [v[:, i:i + 1] for i in (0, 1)]
    maps = [torch.cat([attention(q[:, m:m + 1], k[:, m:m + 1], half, is_causal=causal) for half in values], dim=-1)
            for m in (0, 1)]
    return maps[0] - 0.7 * maps[1]


def operands(n, gradients):
    torch.manual_seed(1)
    return [(torch.rand(1, 2, n, D) * 6 - 3).requires_grad_(gradients) for _ in range(3)]


def forward(function, causal, x):
    with torch.no_grad():
        function(*x, causal)


def forward_and_backward(function, causal, x):
    function(*x, causal).sum().backward()
    for tensor in x:
        tensor.grad = None


def main():
    torch.set_num_threads(1)
    print(f"PyTorch {torch.__version__}, one thread")
    cases = [(forward, n) for n in (384, 1920, 7680)] + [(forward_and_backward, n) for n in (384, 1920)]
    for run, n in cases:
        for causal in (False, True):
            x = operands(n, run is forward_and_backward)
            times = {standard: [], differential: []}
            for repetition in range(4 if n > 4000 else 8 if n > 1000 else 40):
                for function, list_of_times in times.items():
                    start = time.perf_counter()
                    run(function, causal, x)
                    if repetition > 0:
                        list_of_times.append(time.perf_counter() - start)
            pairs = n * (n + 1) / 2 if causal else n * n
            text = ""
            for function, list_of_times in times.items():
                seconds, fastest = statistics.median(list_of_times), min(list_of_times)
                text += f"  {function.__name__} {seconds * 1e3:.2f} ms ({fastest * 1e3:.2f})"
                if run is forward:
                    text += f", {8 * D * pairs / seconds / 1e9:.1f} GFLOP/s"
            print(f"{run.__name__.replace('_', ' ')}, {'causal' if causal else 'full'}, n {n}:{text}", flush=True)


if __name__ == "__main__":
    main()
