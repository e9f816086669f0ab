#!/usr/bin/env python3
"""Turns the JSON of a benchmark run into the tables of bench/README.md.

usage: report.py [--best] results.json      of a whole run or of a filtered one that measured peak/fma too

The median repetition of each benchmark; with --best the fastest, which says more where neighbours take the other half
of a core for most of the time. Kernels and layers run on one thread and are compared by CPU time, which a busy machine
disturbs least; what may use two threads, by wall clock.
"""
import argparse
import json
import re


def repetitions_of(path, best=False):
    """One repetition for every benchmark, by name."""
    with open(path) as file:
        results = json.load(file)["benchmarks"]
    repetitions = {}
    for run in results:
        if run["run_type"] == "iteration":
            repetitions.setdefault(run["run_name"], []).append(run)
    chosen = {}
    for name, runs in repetitions.items():
        clock = "real_time" if name.endswith("/real_time") else "cpu_time"
        runs.sort(key=lambda run: run.get(clock, 0))  # one that ended in an error has no time
        chosen[name] = runs[0 if best else len(runs) // 2]
    return chosen


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


def plain_eigen_ratio(plain_eigen, differential):
    """How many times as long plain Eigen takes; a dash if it was not measured, or failed its check."""
    if plain_eigen is None or plain_eigen.get("error_occurred"):
        return "–"
    return f"{plain_eigen['cpu_time'] / differential['cpu_time']:.2f}"


def kernel_table(runs, room="kernel"):
    print("| | n | differential | two standard heads | differential / standard | plain Eigen / differential "
          "| V2 pair / two heads, shared K V |")
    print("|---|---|---|---|---|---|---|")
    for (scalar, d, causal, n), kinds in kernel_shapes(runs, room):
        peak = runs[f"peak/fma/{scalar}"]["FLOP/s"]
        percent = {kind: f"{run['FLOP/s'] / 1e9:.0f} GFLOP/s, {100 * run['FLOP/s'] / peak:.0f} %"
                   for kind, run in kinds.items()}
        time = {kind: run["cpu_time"] for kind, run in kinds.items()}
        eigen = plain_eigen_ratio(kinds.get("plain_eigen"), kinds["differential"])
        print(f"| {scalar}, d = {d}, {'causal' if causal else 'full'} | {n:,} | {percent['differential']} "
              f"| {percent['standard']} | {time['differential'] / time['standard']:.2f} | {eigen} "
              f"| {time['v2_pair'] / time['v2_baseline']:.2f} |")


def whole_matrices_table(runs):
    """What Eigen code that follows the formulas takes, on whole score matrices."""
    rows = []
    for (scalar, d, causal, n), kinds in kernel_shapes(runs):
        back = dict(kernel_shapes(runs, "backward")).get((scalar, d, causal, n), {})
        ratios = [plain_eigen_ratio(room.get("whole_matrices"), room.get("differential")) for room in (kinds, back)]
        if ratios != ["–", "–"]:
            rows.append(f"| {scalar}, d = {d}, full | {n:,} | {ratios[0]} | {ratios[1]} |")
    if rows:
        print("\n| Eigen, whole score matrices / differential | n | output | gradients |\n|---|---|---|---|")
        print("\n".join(rows))


def stage_table(runs):
    if "stage/scores/d64" not in runs:
        return
    peak = runs["peak/fma/float"]["FLOP/s"]
    stages = ("scores", "values", "softmax", "combination", "packing")
    print("\n| float, each stage by itself, percent of the time that the kernel takes at FMA peak | "
          + " | ".join(stages) + " | all: the ceiling |\n|---|" + "---|" * (len(stages) + 1))
    for d in (64, 128):
        shares = [100 * peak / runs[f"stage/{stage}/d{d}"]["FLOP/s"] for stage in stages]
        print(f"| d = {d} | " + " | ".join(f"{share:.1f}" for share in shares)
              + f" | {sum(shares):.0f}: {1e4 / sum(shares):.0f} % of peak |")


def block_table(runs, kind, title):
    """Blocks of rows against keys that are packed already, which are short enough to find a quiet moment."""
    rows = []
    peak = runs["peak/fma/float"]["FLOP/s"]
    for name, run in runs.items():
        match = re.fullmatch(kind + r"/differential/d(\d+)/n(\d+)", name)
        if match:
            d, n = map(int, match.groups())
            ours, other = run["FLOP/s"], runs[f"{kind}/standard/d{d}/n{n}"]["FLOP/s"]
            rows.append((d, n, f"| d = {d} | {n:,} | {100 * ours / peak:.1f} % | {100 * other / peak:.1f} % "
                               f"| {other / ours:.3f} |"))
    if rows:
        print(f"\n| {title}, float, full, keys packed | n | differential | standard | differential / standard |"
              "\n|---|---|---|---|---|")
    for row in sorted(rows):
        print(row[-1])


def noise_table(runs):
    """Heads that share their map of noise, against pairs with its queries repeated."""
    rows = []
    for name, run in runs.items():
        match = re.fullmatch(r"(noise\w*)/shared/(float/causal/d64/n(\d+))", name)
        if match:
            other = runs[f"{match[1]}/repeated/{match[2]}"]
            what = "gradients" if "backward" in match[1] else "output"
            rows.append(f"| {what} | {int(match[3]):,} | {run['cpu_time']:.2f} ms | {other['cpu_time']:.2f} ms "
                        f"| {run['cpu_time'] / other['cpu_time']:.2f} |")
    if rows:
        print("\n| four signal heads, d = 64, causal, float | n | one noise head for all | repeated for each "
              "| shared / repeated |\n|---|---|---|---|---|")
        print("\n".join(rows))


def layer_table(runs):
    print("\n| layer, embed_dim 1,024, causal | differential | standard | differential / standard "
          "| plain Eigen / differential |\n|---|---|---|---|---|")
    peak = runs["peak/fma/float"]["FLOP/s"]
    for name, run in runs.items():
        match = re.fullmatch(r"layer/differential/(.*)/n:(\d+)", name)
        if match:
            other = runs[f"layer/standard/{match[1]}/n:{match[2]}"]
            eigen = plain_eigen_ratio(runs.get(f"layer/plain_eigen/{match[1]}/n:{match[2]}"), run)
            print(f"| {int(match[2]):,} tokens | {run['cpu_time']:.1f} ms, {100 * run['FLOP/s'] / peak:.0f} % "
                  f"| {other['cpu_time']:.1f} ms, {100 * other['FLOP/s'] / peak:.0f} % "
                  f"| {run['cpu_time'] / other['cpu_time']:.2f} | {eigen} |")


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
    print("\n| training step, embed_dim 512, 8 layers, 512 tokens | differential | standard | differential / standard "
          "| plain Eigen / differential |\n|---|---|---|---|---|")
    peak = runs["peak/fma/float"]["FLOP/s"]
    run, other = runs["training/differential/float"], runs["training/standard/float"]
    shares = [f"{r['cpu_time']:.0f} ms, {100 * r['FLOP/s'] / peak:.0f} %" for r in (run, other)]
    print(f"| forward, loss, backward, clipping, AdamW | {shares[0]} | {shares[1]} "
          f"| {run['cpu_time'] / other['cpu_time']:.2f} "
          f"| {plain_eigen_ratio(runs.get('training/plain_eigen/float'), run)} |")


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


def thin_table(runs):
    """Products of few rows against the lesser of what multiplying and what reading the weights allow."""
    rows = []
    for name, run in runs.items():
        match = re.fullmatch(r"thin/(\w+)/(\d+)x(\d+)x(\d+)", name)
        if match and "peak/read_product" in runs:
            fma = run["FLOP/s"] / runs["peak/fma/float"]["FLOP/s"]
            read = run["bytes/s"] / runs["peak/read_product"]["bytes/s"]
            bound = "reading" if read > fma else "FMA"
            rows.append(((match[1], int(match[4]), int(match[2])),
                         f"| {match[1]}, {match[3]} x {match[4]} | {match[2]} | {run['cpu_time'] / 1e3:.0f} µs "
                         f"| {100 * fma:.0f} % | {100 * read:.0f} % | {100 * max(fma, read):.0f} %, {bound} |"))
    if rows:
        print("\n| product by weights from memory, in x out | rows | time | of FMA peak | of read bandwidth "
              "| of the lesser |\n|---|---|---|---|---|---|")
    for row in sorted(rows):
        print(row[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    parser.add_argument("--best", action="store_true", help="the fastest repetition instead of the median")
    arguments = parser.parse_args()
    runs = repetitions_of(arguments.results, arguments.best)
    if "peak/fma/float" not in runs:
        parser.error("the run did not measure peak/fma/float: add peak/ to its --benchmark_filter")
    for scalar in ("float", "double"):
        if f"peak/fma/{scalar}" not in runs:
            continue
        print(f"FMA peak of one core, {scalar}: {runs[f'peak/fma/{scalar}']['FLOP/s'] / 1e9:.0f} GFLOP/s")
    print()
    kernel_table(runs)
    stage_table(runs)
    block_table(runs, "block", "output of 48 rows")
    block_table(runs, "gradient_block", "gradients of 96 rows")
    print("\nGradients:\n")
    kernel_table(runs, "backward")
    whole_matrices_table(runs)
    noise_table(runs)
    layer_table(runs)
    thread_table(runs)
    exp_table(runs)
    decode_table(runs)
    training_table(runs)
    model_table(runs)
    thin_table(runs)
    for name, run in runs.items():
        if name.startswith("memory/"):
            print(f"\nOne causal head, d = 64, 131,072 tokens: {run['scratch_MB']:.0f} MB of scratch, "
                  f"{run['cpu_time'] / 1e3:.0f} s")


if __name__ == "__main__":
    main()
