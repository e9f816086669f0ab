#!/usr/bin/env python3
"""The site is whole: check.py SITE_FOLDER NAMES_FILE

* Every public name of NAMES_FILE has a page, and so has every header, every guide and every example.
* Every public function of the library says something of itself.
* Every link within the site leads to a page and to a place in it.
* No markup of a page is left in its text.
Prints what is missing, one a line, and exits with 1.
"""

import html.parser
import pathlib
import re
import sys
import xml.etree.ElementTree

# What masks, biases, executors and things with parameters have; their headers say it once for all.
OF_A_CONCEPT = {"visible_keys", "bias", "fill_bias", "check", "same_for_all_heads", "concurrency", "run", "visit"}


def public_names(xml_folder):
    """({name: page}, functions without a word) of all that Doxygen knows, names without `diffattn::`."""
    names, silent, told = {}, {}, set()
    for file in sorted(xml_folder.glob("*.xml")):
        for compound in xml.etree.ElementTree.parse(file).getroot().iter("compounddef"):
            compound_name = compound.findtext("compoundname").removeprefix("diffattn::")
            if compound.get("kind") in ("class", "struct", "concept"):
                names[compound_name] = compound.get("id")
            for member in compound.iter("memberdef"):
                if member.get("prot") != "public":
                    continue
                scope = compound_name + "::" if compound.get("kind") in ("class", "struct") else ""
                qualified = member.findtext("qualifiedname") or ""
                name = qualified.removeprefix("diffattn::") if "diffattn::" in qualified else scope + member.findtext("name")
                names.setdefault(name, member.get("id").rpartition("_1")[0])
                said = "".join("".join(member.find(part).itertext()) for part in ("briefdescription", "detaileddescription"))
                if member.get("kind") == "function" and is_told(member, compound):
                    if said.strip():
                        told.add(name)
                    else:
                        silent[name] = f"{member.find('location').get('file')}: {name}() has no ///"
    return names, [fault for name, fault in silent.items() if name not in told]  # one word for all overloads


def is_told(member, compound):
    """Whether a function has to say something: not constructors and operators, and not what a concept asks of a type."""
    name = member.findtext("name")
    classes = (compound.findtext("compoundname").split("::")[-1], member.findtext("argsstring").rpartition("-> ")[2].split("<")[0])
    return name not in classes and not name.startswith(("operator", "~")) and name not in OF_A_CONCEPT


class Page(html.parser.HTMLParser):
    """The links and anchors of a page, and words of its prose that are markup."""

    def __init__(self, file):
        super().__init__()
        self.links, self.anchors, self.markup = [], set(), []
        self.code = 0  # elements that are open and hold code
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.code += tag in self.OF_CODE and (self.code > 0 or tag != "div" or attributes.get("class") == "fragment")
        self.anchors |= {attributes.get("id"), attributes.get("name")}
        for key in ("href", "src"):
            if attributes.get(key):
                self.links.append(attributes[key])

    OF_CODE = ("pre", "code", "div", "script", "style")

    def handle_endtag(self, tag):
        self.code -= self.code > 0 and tag in self.OF_CODE

    def handle_data(self, data):
        if self.code == 0 and re.search(r"\*\*|`|[^\[]\]\(", data):
            self.markup.append(data.strip())


def broken_pages(html_folder):
    pages = {file.name: Page(file) for file in html_folder.glob("*.html")}
    broken = set()
    for name, page in pages.items():
        broken |= {f"{name}: markup is left in {text!r}" for text in page.markup}
        for link in page.links:
            if link.startswith(("http:", "https:", "mailto:", "javascript:", "#")):
                continue
            target, _, anchor = link.partition("#")
            if not (html_folder / target).exists():
                broken.add(f"{name}: there is no {target}")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                broken.add(f"{name}: {target} has no #{anchor}")
    return sorted(broken)


def main():
    site, names_file = map(pathlib.Path, sys.argv[1:])
    names, faults = public_names(site / "xml")
    for line in names_file.read_text().splitlines():
        if line and not line.startswith("#") and line not in names:
            faults.append(f"{line} has no page")
    for prepared, suffix in (("include", ".hpp"), ("pages", ".md")):
        for file in sorted((site / "input" / prepared).rglob("*" + suffix)):
            path = file.relative_to(site / "input" / prepared)
            name = path.with_suffix("").as_posix().removeprefix("diffattn/").replace("/", "_")
            page = name[3:] if suffix == ".md" else "group__" + name.replace("_", "__")
            if not (site / "html" / (page + ".html")).exists():
                faults.append(f"{path} has no page {page}.html")
    if not (site / "html/search/search.js").exists():
        faults.append("there is no search box")
    faults += broken_pages(site / "html")
    print("\n".join(faults) if faults else f"{len(names)} names")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
