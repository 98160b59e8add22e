"""A Quarto notebook filter: plain Markdown and HTML into Quarto's forms, then nbdev's own processors.

The notebooks read well as they stand, in JupyterLab, VS Code and on GitHub (style.md); what Quarto calls a callout or a diagram is made here.
`nbdev_filter` refuses to be a Quarto filter since nbdev 2.3, so its processors are called.
"""
import json
import os
import re
import sys
from contextlib import redirect_stdout

HOME = "Grocery MLOps Workbook"  # the title of the notebook that the site opens with

FOLDED = re.compile(r"^<details><summary>([^\n]*)</summary>\n\n((?:(?!<details>).)*?)\n\n</details>$", re.DOTALL | re.MULTILINE)  # the innermost first
REMARK = re.compile(r"^> \*\*(.+?)\*\* ?(.*(?:\n>.*)*)", re.MULTILINE)
FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1$", re.DOTALL | re.MULTILINE)


def callout(kind: str, title: str, text: str, options: str = "") -> str:
    "A Quarto callout; a title is an attribute, so its quotes are made harmless"
    return f'::: {{.callout-{kind} {options}title="{title.rstrip(".").replace(chr(34), "&quot;")}"}}\n{text}\n:::'


def unquoted(match: re.Match) -> str:
    "The text of a blockquote that begins in bold, as a note"
    return callout("note", match[1], re.sub(r"^> ?", "", match[2], flags=re.MULTILINE))


def in_quarto(text: str) -> str:
    "Diagrams, what is folded, and remarks in the forms that Quarto knows; what stands in a code fence stays as it is"
    kept = []
    def keep(match):
        kept.append(re.sub(r"\A(`{3,})mermaid$", r"\1{mermaid}", match[0], flags=re.MULTILINE))
        return f"\0{len(kept) - 1}\0"
    text = FENCED.sub(keep, text)
    text = REMARK.sub(unquoted, text)
    while FOLDED.search(text): text = FOLDED.sub(lambda m: callout("tip", m[1], m[2], 'collapse="true" '), text)
    return re.sub(r"\0(\d+)\0", lambda m: kept[int(m[1])], text)


def main():
    from execnb.nbio import dict2nb, nb2str
    from nbdev.processors import FilterDefaults
    os.environ["IN_TEST"] = "1"  # nbdev_export, called in a cell, then does nothing
    nb = dict2nb(json.loads(sys.stdin.read()))
    nb.path_ = "notebook.ipynb"  # Quarto does not say which file it is; the name only feeds `output-file`, dropped below
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = in_quarto(cell.source)
    with redirect_stdout(sys.stderr): FilterDefaults()(nb)
    front = nb.cells[0]
    if front.cell_type == "raw":
        lines = [line for line in front.source.splitlines() if not line.startswith("output-file:")]
        if f"title: {HOME}" in lines: lines.insert(1, "aliases: [/index.html]")
        front.source = "\n".join(lines)
    sys.stdout.write(nb2str(nb))


if __name__ == "__main__": main()
