#!/usr/bin/env python3
"""The rooms of include/diffattn hold: rooms.py INCLUDE_FOLDER

* A header includes from its own room and from rooms above it, and from no other room's detail/.
* No circle of includes; every include of ours names a header that exists.
* No header is longer than 300 lines, no function longer than 60.
* No public function takes or returns a type of detail::, where it can be seen from its first lines.
Prints what breaks them, one a line as FILE:LINE: what, and exits with 1.
"""

import pathlib
import re
import sys

# What a room may include, besides itself. Later rooms know earlier ones, except those that do not know each other.
ROOMS = {
    "core": [],
    "product": ["core"],
    "kernels": ["core", "product"],
    "layers": ["core", "product", "kernels"],
    "analysis": ["core", "product", "kernels", "layers"],
    "models": ["core", "product", "kernels", "layers"],
    "training": ["core", "product", "kernels", "layers"],
    "io": ["core", "product", "kernels", "layers", "models", "training"],
    "hugging_face": ["core", "product", "kernels", "layers", "models", "training", "io"],
    "distributed": ["core", "product", "kernels", "layers", "models"],
}
LONGEST_HEADER = 300
LONGEST_FUNCTION = 60

INCLUDE = re.compile(r'^\s*#\s*include\s*"(diffattn/[^"]+)"')
# A block that is no function.
SCOPE = re.compile(r"^(template\s*<[^{]*>\s*)?(inline\s+)?(namespace|struct|class|union|enum)\b")
ACCESS = re.compile(r"^\s*(public|protected|private)\s*:$")


def without_comments_and_text(source):
    """The same lines, with comments, strings and characters blanked, so that every brace is code."""
    blank = lambda found: re.sub(r"[^\n]", " ", found.group(0))
    pattern = r'//[^\n]*|/\*.*?\*/|R"\((?:.|\n)*?\)"|"(?:\\.|[^"\\\n])*"|(?<![0-9A-Fa-f])\'(?:\\.|[^\'\\\n])+\''
    return re.sub(pattern, blank, source, flags=re.DOTALL)


def functions(source):
    """(first line, last line, what stands before the brace, can users call it) of every outermost function."""
    found, head, line, parentheses = [], "", 1, 0
    scopes = []  # of every open brace: may users see what stands in it now
    inside = None  # the function we are in: its depth, first line, head, and whether users can call it
    for character in without_comments_and_text(source):
        line += character == "\n"
        if inside is None:
            parentheses += {"(": 1, ")": -1}.get(character, 0)
        if character == "\n" and head.lstrip().startswith("#"):
            head = ""  # a directive ends with its line
        elif inside is None and parentheses > 0:
            head += character  # braces, too, of an argument's default
        elif character == "{":
            text = head.strip()
            if inside is None and parentheses == 0 and ")" in text and not SCOPE.match(text):
                inside = (len(scopes), line - head.lstrip().count("\n"), text, all(scopes))
            scopes.append(not re.match(r"namespace (\S.*::)?detail\b|(template\s*<[^{]*>\s*)?class\b", text))
            head = ""
        elif character == "}":
            if scopes:
                scopes.pop()
            if inside is not None and len(scopes) == inside[0]:
                found.append((inside[1], line, inside[2], inside[3]))
                inside = None
            head = ""
        elif character == ";" and (inside is not None or parentheses == 0):
            head = ""
        else:
            head += character
            if inside is None and scopes and ACCESS.match(head):
                scopes[-1] = "public" in head
                head = ""
    return found


def public_signature_of_detail(head):
    """`detail::` in the result or the arguments of a function head. Constraints and initialisers may name it."""
    head = re.sub(r"\b(requires|noexcept)\b.*", "", head, flags=re.DOTALL)  # what follows is no type of an argument
    opening = head.find("(")
    depth, end = 0, len(head)
    for at in range(opening, len(head)):
        depth += {"(": 1, ")": -1}.get(head[at], 0)
        if depth == 0:
            end = at
            break
    signature = head[:end]
    signature = re.sub(r"^\s*template\s*<.*?>\s*(?=[\w\[])", "", signature, count=1, flags=re.DOTALL)
    return "detail::" in signature


def check(include):
    problems = []
    graph = {}
    headers = sorted(include.glob("diffattn/**/*.hpp"))
    if not headers:
        problems.append(f"{include}: holds no diffattn/*.hpp")
    for header in headers:
        name = header.relative_to(include).as_posix()
        parts = name.split("/")[1:]
        room = parts[0] if len(parts) > 1 else None  # diffattn.hpp, the table of contents, is in none
        source = header.read_text(encoding="utf-8")
        lines = source.splitlines()
        if room is not None and room not in ROOMS:
            problems.append(f"{name}:1: {room} is no room: add it to {pathlib.Path(__file__).name}")
            continue
        if len(lines) > LONGEST_HEADER:
            problems.append(f"{name}:1: has {len(lines)} lines, more than {LONGEST_HEADER}")
        graph[name] = []
        for number, line in enumerate(lines, 1):
            included = INCLUDE.match(line)
            if not included:
                continue
            target = included.group(1)
            target_room = target.split("/")[1]
            graph[name].append((number, target))
            if not (include / target).is_file():
                problems.append(f"{name}:{number}: includes {target}, which does not exist")
            elif room is not None and target_room != room and target_room not in ROOMS[room]:
                problems.append(f"{name}:{number}: {room} includes {target}, which is not above it")
            elif target_room != room and "/detail/" in target:
                problems.append(f"{name}:{number}: includes {target}, a detail of another room")
        for first, last, head, is_public in functions(source):
            if last - first + 1 > LONGEST_FUNCTION:
                problems.append(f"{name}:{first}: a function of {last - first + 1} lines, more than {LONGEST_FUNCTION}")
            if is_public and "detail" not in parts and public_signature_of_detail(head):
                problems.append(f"{name}:{first}: detail:: in the signature of a public function")
    return problems + circles(graph)


def circles(graph):
    """One problem for each include that closes a circle."""
    problems, done, path = [], set(), []

    def visit(name):
        path.append(name)
        for number, target in graph.get(name, []):
            if target in path:
                circle = " -> ".join(path[path.index(target):] + [target])
                problems.append(f"{name}:{number}: a circle of includes: {circle}")
            elif target not in done:
                visit(target)
        done.add(path.pop())

    for name in graph:
        if name not in done:
            visit(name)
    return problems


def main():
    problems = check(pathlib.Path(sys.argv[1]))
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
