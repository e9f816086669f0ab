#!/usr/bin/env python3
"""Draws the kernels of a benchmark run as bars, percent of the FMA peak: docs/benchmark.svg.

usage: chart.py results.json ["machine, compiler"] > docs/benchmark.svg
"""
import sys
from html import escape

from report import kernel_shapes, repetitions_of

BAR, GAP, LEFT, TOP, BOTTOM, SCALE = 11, 12, 190, 88, 52, 5.0
SIDES = (("differential", "#2c6fbb", "one differential head (d, V 2d)"),
         ("standard", "#b8c4d0", "two standard heads (d, d)"))


def text(x, y, words, anchor="start", size=11, more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{more}>{escape(words)}</text>'


def percents(runs, kinds, scalar):
    """Percent of the FMA peak measured in the same run, for each side that was measured."""
    peak = runs[f"peak/fma/{scalar}"]["FLOP/s"]
    return {side: 100 * kinds[side]["FLOP/s"] / peak for side, _, _ in SIDES}


def chart(bars, machine):
    """bars: (label, percent of each side) from top to bottom."""
    width, right = LEFT + 100 * SCALE + 40, LEFT + 100 * SCALE
    bottom = TOP + len(bars) * (2 * BAR + GAP)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{bottom + BOTTOM:.0f}" '
           'font-family="sans-serif">', '<rect width="100%" height="100%" fill="#ffffff"/>',
           text(width / 2, 22, "Attention kernels, float, one thread: percent of the FMA peak", "middle", 15),
           text(width / 2, 42, machine, "middle", 11)]
    for i, (_, colour, label) in enumerate(SIDES):
        x = LEFT + i * 230
        out += [f'<rect x="{x}" y="54" width="{BAR}" height="{BAR}" fill="{colour}"/>', text(x + 17, 63.5, label)]
    for percent in range(0, 101, 20):
        x = LEFT + percent * SCALE
        out += [f'<path d="M{x:.1f} {TOP - 6}V{bottom + 5}" stroke="#dddddd"/>',
                text(x, bottom + 18, f"{percent} %", "middle")]
    y = TOP
    for label, percent_of in bars:
        out.append(text(LEFT - 8, y + BAR + 4, label, "end"))
        for side, colour, _ in SIDES:
            percent = percent_of[side]
            out += [f'<rect x="{LEFT}" y="{y}" width="{percent * SCALE:.1f}" height="{BAR}" fill="{colour}"/>',
                    text(LEFT + percent * SCALE + 4, y + 9, f"{percent:.0f} %", size=9)]
            y += BAR
        y += GAP
    middle = (TOP + bottom) / 2
    out += [f'<path d="M{LEFT} {TOP - 6}V{bottom}H{right:.1f}" fill="none" stroke="#444444"/>',
            text((LEFT + right) / 2, bottom + 40, "percent of the peak of fused multiply-adds, measured in the same run",
                 "middle"),
            text(14, middle, "head width d, mask, tokens n", "middle", 11, f' transform="rotate(-90 14 {middle:.1f})"'),
            "</svg>"]
    return "\n".join(out)


def main():
    runs = repetitions_of(sys.argv[1])
    bars = [(f'd = {d}, {"causal" if causal else "full"}, n = {n:,}', percents(runs, kinds, scalar))
            for (scalar, d, causal, n), kinds in kernel_shapes(runs) if scalar == "float"]
    print(chart(bars, sys.argv[2] if len(sys.argv) > 2 else ""))


if __name__ == "__main__":
    main()
