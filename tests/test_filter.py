"The site's filter: plain Markdown becomes Quarto's forms, and what is no such form stays as it is."
import importlib.util

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("site_filter", ROOT / "nbs" / "_filter.py")
site_filter = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site_filter)

TIP, NOTE = '::: {.callout-tip collapse="true" title="', '::: {.callout-note title="'


@pytest.mark.parametrize("text, quarto", [
    ("```mermaid\nflowchart LR\n```", "```{mermaid}\nflowchart LR\n```"),
    ("<details><summary>One</summary>\n\nText\n\n</details>", f'{TIP}One"}}\nText\n:::'),
    ('<details><summary>The "best" one.</summary>\n\nText\n\n</details>', f'{TIP}The &quot;best&quot; one"}}\nText\n:::'),
    ("> **Remark.** Text", f'{NOTE}Remark"}}\nText\n:::'),
    ("> **After this you can explain** one\n> two\n>\n> three", f'{NOTE}After this you can explain"}}\none\ntwo\n\nthree\n:::'),
    ("> **Alone**", f'{NOTE}Alone"}}\n\n:::'),
], ids=["diagram", "folded", "quotes", "remark", "lines", "alone"])
def test_forms(text, quarto):
    assert site_filter.in_quarto(text) == quarto


@pytest.mark.parametrize("text", [
    "> A summary line without bold",
    "> A quote with **bold** later",
    "A line with `> **no quote**` in it",
    "| a | b |\n| --- | --- |\n| `a > b` | **c** |",
    "```python\n> **a prompt**\n<details><summary>x</summary>\n\ny\n\n</details>\n```",
    "````markdown\n```mermaid\nflowchart LR\n```\n````",
    "~~~\n```mermaid\n~~~",
    "    > **indented code**",
    "Inline <details> in a sentence",
], ids=["quote", "late bold", "inline", "table", "code", "longer fence", "tildes", "indented", "words"])
def test_what_stays(text):
    assert site_filter.in_quarto(text) == text


def test_two_folds_are_two():
    fold = "<details><summary>{}</summary>\n\nText\n\n</details>"
    assert site_filter.in_quarto(fold.format("A") + "\n\n" + fold.format("B")) == f'{TIP}A"}}\nText\n:::\n\n{TIP}B"}}\nText\n:::'


def test_a_fold_with_a_fence_that_speaks_of_folds():
    text = "<details><summary>A</summary>\n\n```html\n</details>\n\n</details>\n```\n\nThe end\n\n</details>"
    assert site_filter.in_quarto(text) == f'{TIP}A"}}\n```html\n</details>\n\n</details>\n```\n\nThe end\n:::'


def test_a_fold_in_a_fold():
    inner = "<details><summary>Hint</summary>\n\nA hint\n\n</details>"
    text = f"<details><summary>Solution</summary>\n\nFirst\n\n{inner}\n\nLast\n\n</details>\n\nAfter"
    assert site_filter.in_quarto(text) == f'{TIP}Solution"}}\nFirst\n\n{TIP}Hint"}}\nA hint\n:::\n\nLast\n:::\n\nAfter'


def test_a_remark_and_a_diagram_in_a_fold():
    text = "<details><summary>A</summary>\n\n> **Mind.** The gap\n\n```mermaid\nflowchart LR\n```\n\n</details>"
    assert site_filter.in_quarto(text) == f'{TIP}A"}}\n{NOTE}Mind"}}\nThe gap\n:::\n\n```{{mermaid}}\nflowchart LR\n```\n:::'
