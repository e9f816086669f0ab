#!/usr/bin/env python3
"""Makes Doxygen's input of the headers, pages and examples: prepare.py SOURCE_FOLDER OUTPUT_FOLDER

Headers stay free of markup. What the site needs and they do not say is added here, to a copy:
* every header becomes a group of its room (rooms.dox), and its first comment, the contract, the text of that group;
* the inline namespace of the version is left out of names;
* what Doxygen would take for markup in our comments is escaped.
Pages (*.md) get an identifier, their headings as well, and links that lead within the site; examples become its examples.
"""

import html
import pathlib
import re
import shutil
import sys

# The order of the pages on the site; those of docs/ that are not named here stand before the last ones.
FIRST_PAGES = ["README.md"] + [f"docs/{guide}.md" for guide in ("use-it", "in-your-model", "from-pytorch", "choose", "fast", "rules")]
LAST_PAGES = ["examples/README.md", "docs/architecture.md", "bench/README.md", "bench/JOURNAL.md", "CONTRIBUTING.md",
              "CHANGELOG.md"]
LABEL = re.compile(r"^([^\s.,:;()]+(?: [^\s.,:;()]+)?)\s{2,}(\S.*)$")


def html_name(identifier):
    """The name Doxygen gives to the file of a group."""
    return "group__" + identifier.replace("_", "__") + ".html"


def header_identifier(path):
    """kernels/diff_attention.hpp → kernels_diff_attention"""
    return path.removesuffix(".hpp").replace("/", "_")


def escaped(text):
    """A line of prose as Doxygen shows it unchanged; what stands in `backticks` stays so."""
    parts = re.split(r"(`[^`]*`)", text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([\\@<>#*&~$%_|\[\]])", r"\\\1", parts[i]).replace(r"\_", "_").replace(r"\*", "&lowast;")
        parts[i] = parts[i].replace(r"\[", "[").replace(r"\]", "]").replace(r"\|", "|").replace(r"\~", "~")
        parts[i] = re.sub(r"\b(eq|i\.e|e\.g|cf|al)\. ", r"\1.\\ ", parts[i])  # no end of the brief description
    return "".join(parts)


def contract_of(lines):
    """The first comment of a header as Doxygen's text: prose, labelled paragraphs, and lines that stand as they are."""
    text, plain = [], []

    def end_plain():
        if plain:
            while plain and not plain[-1].strip():
                plain.pop()
            shown = html.escape("\n".join(plain), quote=False)
            text.append("<pre class=\"fragment\">" + shown.replace("@", "&#64;").replace("\\", "\\\\")
                        .replace("#", "\\#").replace("::", "\\::") + "</pre>")
            plain.clear()

    labelled = False
    for line in lines:
        label = LABEL.match(line)
        if not line.strip():
            if plain:
                plain.append("")
            else:
                text.append("")
                labelled = False
        elif label and len(label.group(1)) <= 20 and not line.startswith(" "):
            end_plain()
            text.append(f"\n<b>{escaped(label.group(1))}</b> {escaped(label.group(2))}")
            labelled = True
        elif line.startswith(" ") and not (labelled and not re.search(r"\S {3,}\S", line)):
            plain.append(line)
        else:
            end_plain()
            if labelled and not line.startswith(" "):
                text.append("")
                labelled = False
            text.append(escaped(line.strip()))
    end_plain()
    return "\n".join(text)


def prepare_header(source, room, path):
    lines = source.split("\n")
    begin = next((i for i, line in enumerate(lines) if line.startswith("//")), None)
    contract, end = [], begin
    while lines[end].startswith("//"):
        contract.append(lines[end][2:].removeprefix(" "))
        end += 1
    group = header_identifier(path)
    doc = [f"/** @defgroup {group} {path.split('/')[-1]}", f"@ingroup {room}", contract_of(contract),
           f"\n<span class=\"include\">\\#include \\<diffattn/{path}\\></span>", "*/",
           f"/** @file\n@ingroup {group}\n*/"]
    body = []
    for line in lines[end:]:
        if line.startswith("namespace diffattn::inline v0_1"):
            line = line.replace("diffattn::inline v0_1", "diffattn") + f" /** @addtogroup {group}\n@{{ */"
        elif line.startswith("}  // namespace diffattn::inline v0_1"):
            line = "/** @} */ }"
        comment = re.match(r"^(.*?)(///<?)( .*)?$", line)
        if comment and '"' not in comment.group(1):
            line = comment.group(1) + comment.group(2) + escaped(comment.group(3) or "")
        body.append(line)
    # Friends are declared for the compiler; Doxygen would link to what it does not show.
    text = re.sub(r"^( *template <[^\n]*>\n)? *friend [^;{]*;", "", "\n".join(body), flags=re.MULTILINE)
    return "\n".join(lines[:begin] + doc) + "\n" + text


def page_identifier(path):
    """docs/choose.md → choose; README.md → index; bench/README.md → bench"""
    name = path.removesuffix(".md")
    return {"README": "readme", "examples/README": "path", "bench/README": "bench"}.get(
        name, name.split("/")[-1].lower())


class Site:
    def __init__(self, root, out):
        self.root, self.out = root, out
        others = {str(p.relative_to(root)) for p in (root / "docs").rglob("*.md")} - {*FIRST_PAGES, *LAST_PAGES}
        self.pages = FIRST_PAGES + sorted(others) + LAST_PAGES
        self.examples = sorted(str(p.relative_to(root)) for p in (root / "examples").rglob("[0-9][0-9]_*.cpp"))

    def target(self, page, link):
        """Where a link of a page leads on the site; None for what the site does not have."""
        path, _, anchor = link.partition("#")
        if re.match(r"https?:|mailto:", link):
            return link
        if not path:
            return f"{self.html(page)}#{page_identifier(page)}-{anchor}"
        file = (self.root / page).parent.joinpath(path).resolve()
        try:
            path = str(file.relative_to(self.root.resolve()))
        except ValueError:
            return None
        if path in self.pages:
            return self.html(path) + (f"#{page_identifier(path)}-{anchor}" if anchor else "")
        if path in self.examples:
            return path.removeprefix("examples/").replace("/", "_2").replace(".", "_8") + "-example.html"
        if path == "examples":
            return self.html("examples/README.md")
        header = path.removeprefix("include/diffattn/")
        if header != path and "/detail" not in header and header.count("/") <= 1 and header != "diffattn.hpp":
            return html_name(header_identifier(header))
        return None

    def html(self, page):
        return "index.html" if page == "README.md" else page_identifier(page) + ".html"

    def prepare_page(self, page):
        identifier = page_identifier(page)
        text = re.sub(r"^<!--.*?-->\n?", "", (self.root / page).read_text(), flags=re.DOTALL | re.MULTILINE)

        def link(found):
            to = self.target(page, found.group(2))
            return f"[{found.group(1)}]({to})" if to else found.group(1)

        def picture(found):
            path = (self.root / page).parent / found.group(2)
            name = str(path.resolve().relative_to(self.root.resolve())).replace("/", "-")
            shutil.copy(path, self.out / "pictures" / name)
            alt = html.escape(found.group(1).replace("\n", " "))
            return f'<a href="{name}"><img src="{name}" alt="{alt}"/></a>'

        def heading(found):
            slug = re.sub(r"[^a-z0-9 -]", "", found.group(2).lower()).strip().replace(" ", "-")
            if found.group(1) == "#":
                return f"# {found.group(2)} {{#{'mainpage' if page == 'README.md' else identifier}}}"
            return f"{found.group(1)} {found.group(2)} {{#{identifier}-{slug}}}"

        done = []
        for i, part in enumerate(re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)):
            if i % 2 == 0:
                part = re.sub(r"!\[([^\]]*)\]\(([^)\s]+)\)", picture, part)
                part = re.sub(r"(?<!!)\[((?:`[^`]*`|[^\]`])*)\]\(([^)\s]+)\)", link, part)
                part = re.sub(r"\*\*(`[^`]*`)\*\*", r"<b>\1</b>", part)  # which Doxygen shows with its stars
                part = re.sub(r"^(#{1,4}) (.+)$", heading, part, flags=re.MULTILINE)
            else:
                part = part.replace("```sh", "```").replace("```cmake", "```").replace("```bibtex", "```").replace("```python", "```{.py}").replace("```cpp", "```{.cpp}")
            done.append(part)
        return "".join(done)

    def example_list(self):
        """Every example with the sentence it begins with."""
        pages = []
        for path in self.examples:
            comment = []
            for line in (self.root / path).read_text().split("\n"):
                if not line.startswith("//"):
                    break
                comment.append(line[2:].strip())
            text = escaped(" ".join(comment)).replace("*/", "")
            pages.append(f"/** @example {path.removeprefix('examples/')}\n{text}\n*/")
        return "\n\n".join(pages) + "\n"

    def write(self):
        shutil.rmtree(self.out, ignore_errors=True)
        (self.out / "pictures").mkdir(parents=True)
        include = self.root / "include/diffattn"
        for header in sorted(include.rglob("*.hpp")):
            path = str(header.relative_to(include))
            if "detail/" in path or "/" not in path:
                continue
            to = self.out / "include/diffattn" / path
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(prepare_header(header.read_text(), path.split("/")[0], path))
        for number, page in enumerate(self.pages):  # Doxygen sorts them by the names of their files
            to = self.out / "pages" / f"{number:02}-{self.html(page).removesuffix('.html')}.md"
            to.parent.mkdir(exist_ok=True)
            to.write_text(self.prepare_page(page))
        (self.out / "examples.dox").write_text(self.example_list())
        pictures = " ".join(f'"{file.resolve()}"' for file in sorted((self.out / "pictures").iterdir()))
        (self.out / "pictures.doxy").write_text(f"HTML_EXTRA_FILES = {pictures}\n")


if __name__ == "__main__":
    Site(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])).write()
