#!/usr/bin/env python3
"""Writes the library as one header: amalgamate.py INCLUDE_FOLDER OUTPUT

Everything that needs only Eigen: all rooms but io and hugging_face, and no header that includes <mpi.h>. Headers stand
in the order in which a compiler would meet them, each once. Includes of the standard library and Eigen are gathered at
the top; those under an #if stay where they are. The same headers give the same bytes.
"""

import pathlib
import re
import sys

ROOMS_WITH_FILES = ("io", "hugging_face")  # they need nlohmann-json
OWN_INCLUDE = re.compile(r'#include "(diffattn/[^"]+)"')
OTHER_INCLUDE = re.compile(r"#include (<[^>]+>)")
OPENING, CLOSING = re.compile(r"#\s*if"), re.compile(r"#\s*endif")
# The headers of what a compiler has only on request, and how it says that it has it.
ON_REQUEST = {"<omp.h>": "_OPENMP"}
NEVER = {"<mpi.h>"}

# Not #pragma once: people paste the file above their main(), and keep copies of it.
GUARD = "DIFFATTN_ONE_FILE"
INTRODUCTION = """\
// diffattn {version} in one header, made by cmake/amalgamate.py from include/diffattn: edit those, not this.
//
// It has everything that needs only Eigen, 3.4 or newer: attention, layers, models and their training, not the reading
// and writing of files in diffattn/io and diffattn/hugging_face. Compile with -std=c++20 -O3 -march=native -pthread.

#ifndef {guard}
#define {guard}
"""


class Headers:
    """The headers below `root`, read once."""

    def __init__(self, root):
        self.root = root
        self.lines = {}

    def of(self, name):
        """The lines of a header, without `#pragma once`."""
        if name not in self.lines:
            path = self.root / name
            if not path.is_file():
                sys.exit(f"amalgamate.py: {path} does not exist")
            lines = path.read_text(encoding="utf-8").splitlines()
            if lines[:1] != ["#pragma once"]:
                sys.exit(f"amalgamate.py: {name} must begin with #pragma once")
            self.lines[name] = lines[1:]
        return self.lines[name]

    def own_includes(self, name):
        return [found.group(1) for found in map(OWN_INCLUDE.match, self.of(name)) if found]

    def reaches(self, name, others, seen):
        """Whether a header, or one that it includes, includes one of `others`."""
        if name in seen:
            return False
        seen.add(name)
        found = (OTHER_INCLUDE.match(line) for line in self.of(name))
        if any(match and match.group(1) in others for match in found):
            return True
        return any(self.reaches(included, others, seen) for included in self.own_includes(name))

    def in_order(self):
        """What goes into the file, each header behind what it includes."""
        order, seen = [], set()

        def visit(name):
            if name in seen:
                return
            seen.add(name)
            for included in self.own_includes(name):
                visit(included)
            order.append(name)

        for path in sorted(self.root.glob("diffattn/**/*.hpp"), key=lambda path: path.relative_to(self.root).as_posix()):
            name = path.relative_to(self.root).as_posix()
            if name.split("/")[1] not in ROOMS_WITH_FILES and not self.reaches(name, NEVER, set()):
                visit(name)
        return order


def without_includes(name, lines):
    """What is left of a header, and the other headers that it includes outside of every #if."""
    body, others, guard, depth = [], set(), None, 0
    for line in lines:
        other = OTHER_INCLUDE.match(line)
        depth += bool(OPENING.match(line)) - bool(CLOSING.match(line))
        if OWN_INCLUDE.match(line):
            if depth > 0:
                sys.exit(f"amalgamate.py: {name} includes a header of ours under an #if, which one file cannot do")
        elif other and depth == 0:
            if other.group(1) in ON_REQUEST:
                guard = ON_REQUEST[other.group(1)]
                body.append(line)
            else:
                others.add(other.group(1))
        else:
            body.append(line)
    if guard:
        body = [f"#ifdef {guard}", *body, f"#endif  // {guard}"]
    return body, others


def amalgamated(root):
    headers = Headers(root)
    bodies, others = [], set()
    for name in headers.in_order():
        body, includes = without_includes(name, headers.of(name))
        bodies.append("\n".join([f"// ---- {name} ----", *body]))
        others |= includes
    eigen = sorted(other for other in others if other.startswith("<Eigen/"))
    standard = sorted(others - set(eigen))
    version = ".".join(re.findall(r"#define DIFFATTN_VERSION_\w+ (\d+)", "\n".join(headers.of("diffattn/core/version.hpp"))))
    includes = ["\n".join(f"#include {other}" for other in group) for group in (eigen, standard)]
    parts = [INTRODUCTION.format(version=version, guard=GUARD), *includes, *bodies, f"#endif  // {GUARD}"]
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(parts)) + "\n"


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    output = pathlib.Path(sys.argv[2])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(amalgamated(pathlib.Path(sys.argv[1])), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
