#!/usr/bin/env python3
"""Tests of docs/lab/make: that it says when a page is older than its CSVs, without gnuplot, and what it refuses.

The gnuplot of these tests is a script that writes an empty picture: what is tested is when make draws, not how.
"""

import os
import pathlib
import stat
import subprocess
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import measurements  # noqa: E402
import questions  # noqa: E402

HEADER = "experiment,measurement,value,model,seed,parameters,run,configuration,commit,machine\n"


def row(value, model="transformer", seed=1, position=32, measurement="loss", experiment="long_context"):
    return (f"{experiment},{measurement},{value},{model},{seed},1000,learning_rate=0.003|position={position},"
            f"length=128,abc,a machine\n")


def rows_of_both(of_transformer=2.0, of_differential=1.0):
    rows = HEADER
    for model, value in (("transformer", of_transformer), ("differential", of_differential)):
        for seed in (1, 2, 3):
            rows += "".join(row(value + 0.01 * seed, model, seed, position) for position in (32, 64))
            rows += row(value, model, seed, 0, "validation_loss").replace("|position=0", "|")
    return rows


class MakeTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        root = pathlib.Path(temporary.name)
        self.page, self.folder, self.tools = root / "lab.md", root / "lab", root / "tools"
        self.folder.mkdir()
        self.tools.mkdir()
        self.csv = self.folder / "long_context.csv"
        self.page.write_text("".join(f"<!-- made: {name} -->\n<!-- end -->\n" for name in questions.BLOCKS))

    def make(self, *options, gnuplot=True):
        plot = self.tools / "gnuplot"
        if gnuplot:
            plot.write_text("#!/bin/sh\ncat > /dev/null\necho '<svg></svg>'\n")
            plot.chmod(plot.stat().st_mode | stat.S_IXUSR)
        elif plot.exists():
            plot.unlink()
        path = f"{self.tools}:/bin" if gnuplot else str(self.tools)
        return subprocess.run([sys.executable, str(HERE / "make"), "--page", str(self.page), *options],
                              env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)

    def test_a_page_that_was_made_is_up_to_date_and_one_without_measurements_says_so(self):
        self.assertEqual(self.make().returncode, 0)
        self.assertIn("this question is open", self.page.read_text())
        self.csv.write_text(rows_of_both())
        self.assertEqual(self.make().returncode, 0)
        text = self.page.read_text()
        self.assertIn("| 32 | 2.020 ± 0.010 | 1.020 ± 0.010 | -1.000 |", text)
        self.assertIn("(lab/long_context.svg)", text)
        check = self.make("--check", gnuplot=False)
        self.assertEqual((check.returncode, check.stdout), (0, ""))

    def test_a_changed_value_makes_table_and_picture_old(self):
        self.csv.write_text(rows_of_both())
        self.make()
        page, picture = self.page.read_text(), (self.folder / "long_context.svg").read_text()
        self.csv.write_text(rows_of_both(of_transformer=2.5))
        check = self.make("--check", gnuplot=False)
        self.assertEqual(check.returncode, 1)
        self.assertIn("older than the CSVs: lab.md: long_context_table", check.stdout)
        self.assertIn("older than the CSVs: long_context.svg", check.stdout)
        self.assertEqual((page, picture), (self.page.read_text(), (self.folder / "long_context.svg").read_text()))
        self.assertEqual(self.make().returncode, 0)
        self.assertEqual(self.make("--check", gnuplot=False).returncode, 0)

    def test_a_picture_without_measurements_is_told_and_taken_away(self):
        self.csv.write_text(rows_of_both())
        self.make()
        self.csv.unlink()
        check = self.make("--check", gnuplot=False)
        self.assertEqual(check.returncode, 1)
        self.assertIn("made from no CSV that is there: long_context.svg", check.stdout)
        self.make()
        self.assertFalse((self.folder / "long_context.svg").exists())

    def test_without_gnuplot_nothing_is_written_and_the_package_is_named(self):
        self.csv.write_text(rows_of_both())
        before = self.page.read_text()
        run = self.make(gnuplot=False)
        self.assertEqual(run.returncode, 1)
        self.assertIn("apt-get install gnuplot-nox", run.stderr)
        self.assertEqual(before, self.page.read_text())

    def refuses(self, rows, message):
        self.csv.write_text(rows)
        run = self.make("--check")
        self.assertEqual(run.returncode, 1)
        self.assertIn(message, run.stderr)

    def test_bad_rows_are_refused_by_file_and_line(self):
        self.refuses(HEADER + row("two"), "long_context.csv: line 2: value is 'two', no number")
        self.refuses(HEADER + row("nan"), "long_context.csv: line 2: value is 'nan', no number")
        self.refuses(HEADER + row(1.0) + row(1.5), "line 3: measures again what")
        self.refuses(HEADER + row(1.0, model=""), "line 2: has no model")
        self.refuses("a,b\n1,2\n", "line 1 must name the columns experiment")
        self.refuses(HEADER + row(1.0, experiment="weather"), "no question is called weather")

    def test_a_page_with_a_block_too_many_or_too_few_is_refused(self):
        text = self.page.read_text()
        self.page.write_text(text + "<!-- made: weather_table -->\n<!-- end -->\n")
        self.assertIn("the page asks for weather_table", self.make("--check").stderr)
        self.page.write_text(text.replace("<!-- made: cost_table -->\n<!-- end -->\n", ""))
        self.assertIn("the page has no place for cost_table", self.make("--check").stderr)


class SpreadTest(unittest.TestCase):
    def spread(self, *values):
        return measurements.Spread([{"value": value} for value in values])

    def test_seeds_are_apart_only_if_none_lies_among_the_others_and_there_are_three(self):
        self.assertTrue(measurements.apart(self.spread(1, 2, 3), self.spread(4, 5, 6)))
        self.assertFalse(measurements.apart(self.spread(1, 2, 4), self.spread(3, 5, 6)))
        self.assertFalse(measurements.apart(self.spread(1, 2, 3), self.spread(3, 5, 6)))
        self.assertFalse(measurements.apart(self.spread(1, 2), self.spread(4, 5, 6)))

    def test_other_numbers_of_seeds_than_three_are_named(self):
        self.assertEqual(self.spread(1, 2, 3).text(1), "2.0 ± 1.0")
        self.assertEqual(self.spread(1, 3).text(1), "2.0 ± 1.4 (2 seeds)")
        self.assertEqual(self.spread(1).text(1), "1.0 (1 seed)")


if __name__ == "__main__":
    unittest.main()
