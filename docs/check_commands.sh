#!/bin/sh
# docs/check_commands.sh, from the top of the repository: the fences of `sh` in our pages work.
# A fence is run as it stands, unless a comment before it says who runs it (<!-- test command -->) or what it takes
# (<!-- needs torch -->). In all of them presets, options and files of ours that they name must exist. Of fences of other
# kinds, each must be one that another test runs.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Every fence into a file of its own; its first line says where it stands and which mark it has.
awk -v work="$work" '
  FNR == 1 { mark = "" }
  /^<!-- .* -->$/ { mark = $0; gsub(/^<!-- | -->$/, "", mark); next }
  /^```/ && inside { inside = 0; close(file); mark = ""; next }
  /^```sh$/ { inside = 1; file = sprintf("%s/%03d", work, ++count); print "# " FILENAME ":" FNR ": " mark > file; next }
  inside { print > file; next }
  NF { mark = "" }' README.md CONTRIBUTING.md examples/README.md docs/*.md

faults=0
fault() {
  echo "$*"
  faults=$((faults + 1))
}

# README's programs and those of the guides are in docs_snippets, blocks of CMake in tests/consumer, Python in docs_python.
awk '/^```/ { if (inside) inside = 0; else { inside = 1; kind = substr($0, 4); print FILENAME, FNR, kind, ++count[FILENAME, kind] } }
     ' README.md CONTRIBUTING.md examples/README.md docs/*.md > "$work.fences"
while read -r page line kind number; do
  name=$(basename "$page" .md)
  case $kind in
    sh | python) continue ;;
    bibtex) [ "$page" = README.md ] && continue ;;
    cpp)
      grep -q "fence_of($page cpp $number " docs/CMakeLists.txt && continue
      [ "$(dirname "$page")" = docs ] && grep -q "^set(guides .*\<$name\>.*)" docs/CMakeLists.txt && continue ;;
    cmake) grep -q "^foreach(block .*\<$name:$number\>.*)" tests/consumer/CMakeLists.txt && continue ;;
  esac
  fault "$page:$line: no test runs this block of \"$kind\""
done < "$work.fences"
rm -f "$work.fences"

for block in "$work"/*; do
  where=$(sed -n '1s/^# \(.*:[0-9]*\): .*/\1/p' "$block")
  mark=$(sed -n '1s/^# .*:[0-9]*: //p' "$block")
  for preset in $(grep -o -e '--preset [a-z0-9-]*' "$block" | cut -d' ' -f2); do
    grep -q "\"name\": \"$preset\"" CMakePresets.json || fault "$where: there is no preset $preset"
  done
  for option in $(grep -o -e '-DDIFFATTN_[A-Z_]*' "$block" | cut -c3-); do
    grep -q "$option" CMakeLists.txt tests/CMakeLists.txt || fault "$where: there is no option $option"
  done
  for path in $(grep -o -E '(^|[ =:])(examples|tests|bench|docs|include|cmake)/[A-Za-z0-9_./-]*' "$block" | tr -d ' =:'); do
    [ -e "$path" ] || fault "$where: there is no $path"
  done
  for example in $(grep -o 'examples/example_[a-z0-9_]*' "$block"); do
    [ -e "examples/${example#examples/example_}.cpp" ] || fault "$where: there is no $example"
  done
  case $mark in
    *" command") continue ;;
    "needs torch") python3 -c 'import torch' 2> /dev/null || continue ;;
    "") ;;
    *) fault "$where: what is \"$mark\"?" ;;
  esac
  mkdir -p build
  sh -eu "$block" > "$work.log" 2>&1 || { cat "$work.log"; fault "$where: failed"; }
  rm -f "$work.log"
done

[ "$(wc -w < README.md)" -lt 1000 ] || fault "README.md has 1,000 words or more: the guides have room"

# CONTRIBUTING.md has a table of all presets.
workflows=$(sed -n '/"workflowPresets"/,$s/^      "name": "\(.*\)",$/\1/p' CMakePresets.json | sort)
told=$(sed -n '/^| preset /,/^$/p' CONTRIBUTING.md | cut -d'|' -f2 | grep -o '`[^`]*`' | tr -d '`' | sort)
[ "$workflows" = "$told" ] || fault "CONTRIBUTING.md tells of the presets" $told", and there are" $workflows

[ "$faults" = 0 ]
