"""The measurements of the lab: reading docs/lab/*.csv, and what is said of several seeds together.

A row of a CSV is one measurement: experiment, measurement, value, model, seed, parameters, commit, machine, and cells
`key=value` that say with which configuration it was taken. Those keys become fields of the row like the others.
"""

import csv
import math
import re
import statistics

NAMED = ("experiment", "measurement", "value", "model", "seed", "parameters", "commit", "machine")
# What may differ between two rows of the same measurement without making them two measurements.
CIRCUMSTANCES = ("value", "commit", "machine", "seconds")


class BadMeasurement(Exception):
    """A CSV that cannot be read; its message names file and line."""


class Measurement(dict):
    """One row: its fields as text, except value, a number."""

    def number(self, field):
        try:
            return float(self[field])
        except (KeyError, ValueError):
            raise BadMeasurement(f"{self.place}: {field} is {self.get(field, 'missing')!r}, no number") from None

    def identity(self):
        return tuple(sorted((key, text) for key, text in self.items() if key not in CIRCUMSTANCES))


def _parse(cells, header, place):
    row = Measurement()
    row.place = place
    for name, cell in zip(header + [""] * len(cells), cells):
        if name in NAMED:
            row[name] = cell
            continue
        for part in filter(None, (part.strip() for part in re.split("[;|]", cell))):
            key, equals, text = part.partition("=")
            if not equals:
                raise BadMeasurement(f"{place}: {part!r} is no key=value")
            row[key] = text
    missing = [name for name in NAMED if not row.get(name)]
    if missing:
        raise BadMeasurement(f"{place}: has no {', '.join(missing)}")
    value = row.number("value")
    if not math.isfinite(value):
        raise BadMeasurement(f"{place}: value is {row['value']!r}, no number")
    row["value"] = value
    return row


def read_file(path):
    """The measurements of one CSV. Raises BadMeasurement for a row that is incomplete, no number, or there twice."""
    with open(path, newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        if not set(NAMED) <= set(header):
            raise BadMeasurement(f"{path}: line 1 must name the columns {', '.join(NAMED)}")
        rows, seen = [], {}
        for cells in filter(None, lines):
            row = _parse(cells, header, f"{path}: line {lines.line_num}")
            if row.identity() in seen:
                raise BadMeasurement(f"{row.place}: measures again what {seen[row.identity()]} has")
            seen[row.identity()] = row.place
            rows.append(row)
    return rows


def read_folder(folder):
    """The measurements of all CSVs of a folder, file by file in the order of their names."""
    return [row for path in sorted(folder.glob("*.csv")) for row in read_file(path)]


def select(rows, **wanted):
    """The rows whose fields have these values; a set or tuple names several."""
    def fits(row):
        for field, value in wanted.items():
            values = value if isinstance(value, (set, tuple, list)) else (value,)
            if row.get(field) not in values:
                return False
        return True
    return [row for row in rows if fits(row)]


def as_number(text):
    """A key to sort by: numbers by size, before words."""
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)


def values_of(rows, field):
    """The values that a field takes in some rows, each once, in order."""
    return sorted({row[field] for row in rows if field in row}, key=as_number)


class Spread:
    """What several seeds gave."""

    def __init__(self, rows):
        self.values = [row["value"] for row in rows]
        self.count = len(self.values)
        self.mean = statistics.fmean(self.values) if self.values else math.nan
        self.deviation = statistics.stdev(self.values) if self.count > 1 else math.nan
        self.least, self.most = (min(self.values), max(self.values)) if self.values else (math.nan, math.nan)

    def __bool__(self):
        return self.count > 0

    def text(self, digits=3):
        """mean ± standard deviation; the number of seeds where it is not three."""
        if not self:
            return "–"
        if self.count == 1:
            return f"{self.mean:.{digits}f} (1 seed)"
        seeds = "" if self.count == 3 else f" ({self.count} seeds)"
        return f"{self.mean:.{digits}f} ± {self.deviation:.{digits}f}{seeds}"


def apart(a, b):
    """Whether every seed of one lies below every seed of the other, and three or more were run of both."""
    return min(a.count, b.count) >= 3 and (a.most < b.least or b.most < a.least)


def best_rates(rows, *fields):
    """Of the rows of every combination of `fields`, those of the learning rate whose mean is least."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row.get(field) for field in fields), []).append(row)
    chosen = []
    for group in groups.values():
        rates = values_of(group, "learning_rate")
        finite = {rate: Spread(select(group, learning_rate=rate)).mean for rate in rates}
        best = min(rates, key=lambda rate: math.inf if math.isnan(finite[rate]) else finite[rate])
        chosen += select(group, learning_rate=best)
    return chosen


def finals(rows):
    """The rows of the last step of every training; all that say no step."""
    return [row for row in rows if row.get("step", row.get("steps")) == row.get("steps")]


def mean_of(rows, field):
    numbers = [row.number(field) for row in rows]
    return sum(numbers) / len(numbers)
