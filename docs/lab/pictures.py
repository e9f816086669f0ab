"""Pictures as gnuplot scripts that hold their own data, and the SVG that gnuplot makes of them.

An SVG ends in a comment with a digest of the script it was drawn from. So whether a picture is older than its data can
be said without gnuplot.
"""

import hashlib
import shutil
import subprocess

COLOURS = ("#0060a8", "#c8501e", "#3c8c3c", "#8050a0", "#806000", "#707070")


class Series:
    """A line of points (x, mean, least, most)."""

    def __init__(self, name, points, colour=None, dashed=False):
        self.name, self.points, self.colour, self.dashed = name, list(points), colour, dashed


class Panel:
    """Axes with lines in them."""

    def __init__(self, title, x, y, series, log=(), y_range=None, levels=(), x_range=None, names=()):
        self.title, self.x, self.y, self.series = title, x, y, [line for line in series if line.points]
        self.log, self.y_range, self.levels, self.x_range = log, y_range, levels, x_range
        self.names = names  # of rows below each other: then the first number of a point is its row


def _quoted(text):
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _lines(panel, number):
    script = [f"set title {_quoted(panel.title)}", f"set xlabel {_quoted(panel.x)} offset 0,0.6",
              f"set ylabel {_quoted(panel.y)}", "unset logscale", "set autoscale", "set autoscale xfix",
              "set key outside bottom center horizontal"]
    script += [f"set logscale {axis}" for axis in panel.log]
    if panel.names:
        names = ", ".join(f"{_quoted(name)} {row}" for row, name in enumerate(panel.names))
        script += [f"set ytics ({names}) noenhanced", f"set yrange [{len(panel.names) - 0.5}:-0.5]", "set lmargin 50"]
    how = "2:1:3:4 with xerrorbars" if panel.names else "1:2:3:4 with yerrorlines"
    for axis, limits in (("x", panel.x_range), ("y", panel.y_range)):
        if limits:
            script.append(f"set {axis}range [{limits[0]}:{limits[1]}]")
    plots = []
    for index, series in enumerate(panel.series):
        block = f"$panel{number}_{index}"
        script.append(f"{block} << end")
        script += [" ".join(f"{number:.6g}" for number in point) for point in series.points]
        script.append("end")
        colour = series.colour or COLOURS[index % len(COLOURS)]
        dash = " dt 2" if series.dashed else ""
        plots.append(f"{block} using {how} lc rgb {_quoted(colour)} lw 1.6{dash} pt 7 ps 0.4 "
                     f"title {_quoted(series.name)}")
    for level, name in panel.levels:
        plots.append(f"{level:.6g} with lines lc rgb \"#909090\" dt 3 title {_quoted(name)}")
    script.append("plot " + ", \\\n     ".join(plots))
    return script


def script_of(panels, columns=2):
    """The gnuplot script of a picture: its panels, so many beside each other."""
    columns = min(columns, len(panels))
    rows = (len(panels) + columns - 1) // columns
    width = 760 if any(panel.names for panel in panels) else 480
    script = [f"set terminal svg size {width * columns},{380 * rows} font 'sans-serif,11' background rgb 'white'",
              "set border 3 lc rgb '#404040'", "set tics nomirror", "set grid lc rgb '#e0e0e0'",
              f"set multiplot layout {rows},{columns}"]
    for number, panel in enumerate(panels):
        script += _lines(panel, number)
    return "\n".join(script + ["unset multiplot", ""])


def mark_of(script):
    """The comment at the end of the SVG that was drawn from a script."""
    return f"<!-- drawn by docs/lab/make from {hashlib.sha256(script.encode()).hexdigest()} -->\n"


def is_drawn_from(path, script):
    return path.exists() and path.read_text(encoding="utf-8").endswith(mark_of(script))


def draw(path, script):
    """Writes the SVG. Raises RuntimeError if gnuplot is not there or complains."""
    if shutil.which("gnuplot") is None:
        raise RuntimeError("gnuplot is not installed; on Debian: apt-get install gnuplot-nox")
    run = subprocess.run(["gnuplot"], input=script, capture_output=True, text=True, check=False)
    if run.returncode != 0 or not run.stdout.rstrip().endswith("</svg>"):
        raise RuntimeError(f"{path.name}: gnuplot says {run.stderr.strip()}")
    path.write_text(run.stdout.rstrip() + "\n" + mark_of(script), encoding="utf-8")
