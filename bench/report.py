#!/usr/bin/env python3
"""Turns the JSON of a benchmark run into the tables of README.md and bench/README.md.

usage: report.py results.json      of a whole run or of a filtered one that measured peak/fma too

Kernels and layers run on one thread and are compared by CPU time, which a busy machine disturbs least; what may use
two threads, by wall clock.
"""
import json
import re
import sys


def medians(path):
    with open(path) as file:
        runs = json.load(file)["benchmarks"]
    repeated = {run["run_name"] for run in runs if run.get("aggregate_name") == "median"}
    return {run["run_name"]: run for run in runs
            if run.get("aggregate_name") == "median" or run["run_name"] not in repeated}


def kernel_shapes(runs, room="kernel"):
    """((scalar, d, causal, n), runs by kind) for every shape that the kernels, or their gradients ("backward"), were
    measured at, in order."""
    rows = {}
    for name, run in runs.items():
        match = re.fullmatch(room + r"/(\w+)/(\w+)/(\w+)/d(\d+)/n(\d+)", name)
        if match:
            kind, scalar, mask, d, n = match.groups()
            rows.setdefault((scalar, int(d), mask != "full", int(n)), {})[kind] = run
    return sorted(rows.items(), key=lambda row: (row[0][0] != "float", row[0]))


def kernel_table(runs, room="kernel"):
    print("| | n | differential | two standard heads | differential / standard | plain Eigen / differential "
          "| V2 pair / two heads, shared K V |")
    print("|---|---|---|---|---|---|---|")
    for (scalar, d, causal, n), kinds in kernel_shapes(runs, room):
        peak = runs[f"peak/fma/{scalar}"]["FLOP/s"]
        percent = {kind: f"{run['FLOP/s'] / 1e9:.0f} GFLOP/s, {100 * run['FLOP/s'] / peak:.0f} %"
                   for kind, run in kinds.items()}
        time = {kind: run["cpu_time"] for kind, run in kinds.items()}
        eigen = f"{time['plain_eigen'] / time['differential']:.1f}" if "plain_eigen" in time else "–"
        print(f"| {scalar}, d = {d}, {'causal' if causal else 'full'} | {n:,} | {percent['differential']} "
              f"| {percent['standard']} | {time['differential'] / time['standard']:.2f} | {eigen} "
              f"| {time['v2_pair'] / time['v2_baseline']:.2f} |")


def layer_table(runs):
    print("\n| layer, embed_dim 1,024, causal | differential | standard | differential / standard |\n|---|---|---|---|")
    peak = runs["peak/fma/float"]["FLOP/s"]
    for name, run in runs.items():
        match = re.fullmatch(r"layer/differential/(.*)/n:(\d+)", name)
        if match:
            other = runs[f"layer/standard/{match[1]}/n:{match[2]}"]
            print(f"| {int(match[2]):,} tokens | {run['cpu_time']:.1f} ms, {100 * run['FLOP/s'] / peak:.0f} % "
                  f"| {other['cpu_time']:.1f} ms, {100 * other['FLOP/s'] / peak:.0f} % "
                  f"| {run['cpu_time'] / other['cpu_time']:.2f} |")


def thread_table(runs):
    print("\n| prefill, four differential heads (64, 128), 1,920 tokens | 1 thread | 2 threads | 1 thread / 2 threads |"
          "\n|---|---|---|---|")
    for mask in ("full", "causal"):
        if f"threads/{mask}/threads:1/real_time" not in runs:
            continue
        one, two = (runs[f"threads/{mask}/threads:{n}/real_time"]["real_time"] for n in (1, 2))
        print(f"| {mask} | {one:.1f} ms | {two:.1f} ms | {one / two:.2f} |")


def exp_table(runs):
    print("\n| exponential, in cache | ours | Eigen's | ours / Eigen's |\n|---|---|---|---|")
    for scalar in ("float", "double"):
        if f"exp/ours/{scalar}" not in runs:
            continue
        ours, eigen = (runs[f"exp/{side}/{scalar}"]["values/s"] / 1e9 for side in ("ours", "eigen"))
        print(f"| {scalar} | {ours:.1f} G/s | {eigen:.1f} G/s | {ours / eigen:.1f} |")


def decode_table(runs):
    sources = {"float": "KvCache<float>", "bfloat16": "KvCache<bfloat16>", "in_place": "float matrices, in place"}
    print("\n| decode, one query | threads | read, GB/s | 16 differential heads (64, 128) "
          "| 32 standard heads (64, 64) | differential / standard | per token, against KvCache<float> |"
          "\n|---|---|---|---|---|---|---|")
    rows = []
    for name, run in runs.items():
        match = re.fullmatch(r"decode/(\w+)/differential/(n:(\d+)/threads:(\d+)/real_time)", name)
        if match:
            source, shape, n, threads = match.groups()
            other = runs[f"decode/{source}/standard/{shape}"]
            read = runs[f"peak/read/{shape}"]["bytes/s"]
            base = runs[f"decode/float/differential/{shape}"]["real_time"]
            shares = [f"{r['bytes/s'] / 1e9:.1f} GB/s, {100 * r['bytes/s'] / read:.0f} %" for r in (run, other)]
            rows.append((list(sources).index(source), int(n), int(threads),
                         f"| {sources[source]}, {int(n):,} keys | {threads} | {read / 1e9:.1f} | {shares[0]} "
                         f"| {shares[1]} | {run['real_time'] / other['real_time']:.2f} "
                         f"| {run['real_time'] / base:.2f} |"))
    for row in sorted(rows):
        print(row[-1])


def training_table(runs):
    if "training/differential/float" not in runs:
        return
    print("\n| training step, embed_dim 512, 8 layers, 512 tokens | differential | standard | differential / standard |"
          "\n|---|---|---|---|")
    peak = runs["peak/fma/float"]["FLOP/s"]
    run, other = runs["training/differential/float"], runs["training/standard/float"]
    shares = [f"{r['cpu_time']:.0f} ms, {100 * r['FLOP/s'] / peak:.0f} %" for r in (run, other)]
    print(f"| forward, loss, backward, clipping, AdamW | {shares[0]} | {shares[1]} "
          f"| {run['cpu_time'] / other['cpu_time']:.2f} |")


def model_table(runs):
    read = [run["bytes/s"] for name, run in runs.items() if name.startswith("peak/read_model/")]
    if not read:
        return
    print("\n| model, 2 layers of DiffLlama-0.3B-handcut's shape | differential | Transformer | ratio of times |"
          "\n|---|---|---|---|")
    peak = runs["peak/fma/float"]["FLOP/s"]
    for name, run in runs.items():
        match = re.fullmatch(r"model/(\w+)/(\w+)/differential/.*", name)
        if match:
            other = runs[name.replace("/differential/", "/standard/")]
            counter, ceiling, unit = (("FLOP/s", peak, "of peak") if match[1] == "prefill"
                                      else ("bytes/s", read[0], "of the read bandwidth"))
            print(f"| {match[1]}, {match[2]} weights "
                  f"| {run['tokens/s']:.0f} tokens/s, {100 * run[counter] / ceiling:.0f} % {unit} "
                  f"| {other['tokens/s']:.0f} tokens/s, {100 * other[counter] / ceiling:.0f} % "
                  f"| {run['real_time'] / other['real_time']:.2f} |")


def main():
    runs = medians(sys.argv[1])
    for scalar in ("float", "double"):
        if f"peak/fma/{scalar}" not in runs:
            continue
        print(f"FMA peak of one core, {scalar}: {runs[f'peak/fma/{scalar}']['FLOP/s'] / 1e9:.0f} GFLOP/s")
    print()
    kernel_table(runs)
    print("\nGradients:\n")
    kernel_table(runs, "backward")
    layer_table(runs)
    thread_table(runs)
    exp_table(runs)
    decode_table(runs)
    training_table(runs)
    model_table(runs)
    for name, run in runs.items():
        if name.startswith("memory/"):
            print(f"\nOne causal head, d = 64, 131,072 tokens: {run['scratch_MB']:.0f} MB of scratch, "
                  f"{run['cpu_time'] / 1e3:.0f} s")


if __name__ == "__main__":
    main()
