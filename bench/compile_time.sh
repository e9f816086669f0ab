#!/usr/bin/env bash
# What including the library costs: median CPU seconds to compile <Eigen/Dense> alone, and the whole of diffattn.hpp with
# one layer in use. usage: compile_time.sh [compiler], Eigen's include directory from pkg-config.
set -euo pipefail
compiler=${1:-g++}
include=$(cd "$(dirname "$0")/../include" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo '#include <Eigen/Dense>' >"$work/eigen.cpp"
cat >"$work/layer.cpp" <<'CPP'
#include <diffattn/diffattn.hpp>
diffattn::Matrix<float> forward(const diffattn::Matrix<float>& x) {
  const diffattn::MultiheadDiffAttention<float> layer({.embed_dim = 64, .num_heads = 2});
  return layer.forward(x);
}
CPP

TIMEFORMAT=%U
median() {  # of nine compilations
  for _ in {1..9}; do
    { time "$compiler" -std=c++20 "$1" -c -o /dev/null -I"$include" $(pkg-config --cflags eigen3) "$2"; } 2>&1
  done | sort -n | sed -n 5p
}
for level in -O0 -O2; do
  eigen=$(median $level "$work/eigen.cpp")
  layer=$(median $level "$work/layer.cpp")
  awk -v l="$level" -v e="$eigen" -v d="$layer" \
    'BEGIN { printf "%s: <Eigen/Dense> %.2f s, diffattn and a layer %.2f s, %.2f times\n", l, e, d, d / e }'
done
