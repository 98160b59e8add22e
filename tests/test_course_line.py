"The course line: every chapter within its budget, nothing used before it is explained, every study point of the notes answered."
import json
import re
from collections import Counter

import pytest
from conftest import NOTEBOOKS
from course_line import HOURS, NBS, UNWRITTEN, budget_faults, chapters, load, opening_faults, opening_minutes, point_faults, points, unexplained
from style_budget import kind, minutes, source

CHAPTERS = [pytest.param(path, id=path.stem) for path in chapters() if path.stem not in UNWRITTEN]
LONGER = [pytest.param(path, id=path.stem) for path in NOTEBOOKS if kind(path.name) != "chapter" and opening_minutes(load(path))]


@pytest.mark.parametrize("path", CHAPTERS)
def test_a_chapter_keeps_its_budget(path):
    assert budget_faults(load(path)) == []


@pytest.mark.parametrize("path", LONGER)
def test_a_deep_dive_says_its_minutes(path):
    assert opening_faults(load(path)) == []


def test_all_chapters_are_read_in_nine_hours():
    read = {path.stem: round(minutes(load(path))) for path in chapters()}
    assert sum(read.values()) <= HOURS * 60, read


@pytest.mark.parametrize("path", CHAPTERS)
def test_nothing_is_used_before_it_is_explained(path):
    assert unexplained(load(path)) == []


@pytest.mark.parametrize("name", sorted(UNWRITTEN))
def test_what_is_unwritten_is_so(name):
    notebook = load(next(path for path in chapters() if path.stem == name))
    assert budget_faults(notebook) and unexplained(notebook), "written meanwhile: take it from UNWRITTEN"


def test_every_study_point_is_answered_in_a_chapter():
    rows = points()
    assert point_faults(rows) == []
    assert [point for point, times in Counter((row["note"], row["point"]) for row in rows).items() if times > 1] == []


def test_the_glossary_leads_back():
    notebook = load(NBS / "95_glossary.ipynb")
    rows = re.findall(r"^\| `?(.+?)`? \| .+? \| .+? \| \[.+?\]\((.+?)\) \|$", "".join(notebook["cells"][1]["source"]), re.MULTILINE)
    terms = [term.lower() for term, _ in rows]
    assert len(terms) > 50 and terms == sorted(set(terms))
    for term, name in rows:
        assert kind(name) == "chapter", name
        text = " ".join(source(cell) for cell in load(NBS / name)["cells"] if cell["cell_type"] == "markdown").lower()
        assert term.lower() in text, f"{name} does not speak of {term}"


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "source": text}


def code(text: str) -> dict:
    return {"cell_type": "code", "source": text, "outputs": []}


OPENING = "> **After this chapter you can explain** a · 2 minutes · needs nothing"
ASKED = "## Questions\n\n" + "Why?\n\n<details><summary>Answer</summary>\n\nSo.\n\n</details>\n\n" * 3


@pytest.mark.parametrize("more, fault", [
    ([markdown("Text")] * 70, "cells, budget 70"),
    ([markdown("word " * 2_200)], "words, budget 2,200"),
    ([code("x = 1\n" * 450)], "minutes, budget 45"),
    ([code("x = 1\n" * 60)], "the opening says 2 minutes, and it is 8"),
])
def test_a_chapter_over_its_budget_is_seen(more, fault):
    good = [markdown("# Title\n> One line"), markdown(OPENING), code("x = 1\n" * 19), markdown(ASKED)]
    assert budget_faults({"cells": good}) == []
    assert any(fault in found for found in budget_faults({"cells": good + more}))


def test_a_chapter_without_opening_or_questions_is_seen():
    found = budget_faults({"cells": [markdown("# Title"), code("x = 1"), markdown(ASKED.replace("Answer", "Solution"))]})
    assert any("no opening" in fault for fault in found) and any("0 questions" in fault for fault in found)


@pytest.mark.parametrize("cells, names", [
    ([code("from grocery_nb.catalog import get_classes"), code("get_classes()")], ["get_classes"]),
    ([code("from grocery_nb.catalog import get_classes"), markdown("What does `get_classes()` give?"), code("get_classes()")], []),
    ([code("from grocery_nb.catalog import get_classes"), code("get_classes()"), markdown("That was `get_classes`")], ["get_classes"]),
    ([markdown("A word of get_classes"), code("from grocery_nb.catalog import get_classes as g\ng()")], ["g"]),
    ([code("def f():\n    from grocery_nb.core import atomic_write\n    return atomic_write")], ["atomic_write"]),
    ([code("from pathlib import Path"), code("Path()")], []),
])
def test_a_name_before_its_explanation_is_seen(cells, names):
    assert [fault.split(" ")[0] for fault in unexplained({"cells": cells})] == names


def test_a_point_without_an_answer_is_seen(tmp_path):
    (tmp_path / "03_model.ipynb").write_text(json.dumps({"cells": [markdown("## The `state_dict`\n```\n# no heading\n```")]}), encoding="utf-8")
    (tmp_path / "03a_cards.ipynb").write_text(json.dumps({"cells": [markdown("## Cards")]}), encoding="utf-8")
    def faults(notebook, heading): return point_faults([{"note": "1", "point": "x", "notebook": notebook, "heading": heading}], tmp_path)
    assert faults("03_model", "The state_dict") == [] == faults("11_delivery", "")
    assert "no heading 'no heading'" in faults("03_model", "no heading")[0] and "a deep dive" in faults("03a_cards", "Cards")[0]
    assert "no chapter" in faults("11_delivery", "Layers")[0] and "no chapter" in faults("77_nowhere", "")[0]
    assert "no heading ''" in faults("03_model", "")[0]
