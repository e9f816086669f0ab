#!/usr/bin/env python3
"""Draws the kernels of a benchmark run as bars, percent of the FMA peak: docs/benchmark.svg.

usage: chart.py results.json > docs/benchmark.svg
"""
import sys

from report import kernel_shapes, repetitions_of

BAR, GAP, LEFT, SCALE = 11, 12, 190, 4.2
SIDES = (("differential", "#2c6fbb"), ("standard", "#b8c4d0"))


def main():
    runs = repetitions_of(sys.argv[1])
    shapes = [(shape, kinds) for shape, kinds in kernel_shapes(runs) if shape[0] == "float"]
    height = 44 + len(shapes) * (2 * BAR + GAP)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + 100 * SCALE + 40:.0f}" height="{height}" '
           'font-family="sans-serif" font-size="11">',
           f'<rect width="100%" height="100%" fill="#ffffff"/>']
    for i, (side, colour) in enumerate(SIDES):
        label = "differential head (d, V 2d)" if side == "differential" else "two standard heads (d, d)"
        out.append(f'<rect x="{LEFT + i * 190}" y="10" width="{BAR}" height="{BAR}" fill="{colour}"/>'
                   f'<text x="{LEFT + i * 190 + 16}" y="20">{label}</text>')
    y = 34
    for (scalar, d, causal, n), kinds in shapes:
        peak = runs[f"peak/fma/{scalar}"]["FLOP/s"]
        out.append(f'<text x="{LEFT - 8}" y="{y + BAR + 4}" text-anchor="end">'
                   f'd = {d}, {"causal" if causal else "full"}, n = {n:,}</text>')
        for side, colour in SIDES:
            percent = 100 * kinds[side]["FLOP/s"] / peak
            out.append(f'<rect x="{LEFT}" y="{y}" width="{percent * SCALE:.1f}" height="{BAR}" fill="{colour}"/>'
                       f'<text x="{LEFT + percent * SCALE + 4:.1f}" y="{y + 9}" font-size="9">{percent:.0f} %</text>')
            y += BAR
        y += GAP
    out.append("</svg>")
    print("\n".join(out))


if __name__ == "__main__":
    main()
