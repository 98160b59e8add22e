"Mini Grocery: the same pixels everywhere, and a bar that follows what is drawn."
import hashlib

import pytest

from grocery_nb.synthetic import DRIFTS, MINI_CLASSES, SyntheticError, draw_image, draw_in_parallel, make_dataset


def test_pixels_are_those_of_every_version():
    "A digest of every class and every drift, made before the drawing was divided into rooms"
    digest = hashlib.sha256()
    for fine in range(len(MINI_CLASSES)):
        for seed, drift in ((0, None), (7, None), *zip((3, 11, 5), DRIFTS)): digest.update(draw_image(fine, seed, 96, drift).tobytes())
    assert digest.hexdigest() == "640e60e6fda1259186846c44c8beaa831d39106f86b9c6d9ed3502ee11d5cd5f"


def test_the_bar_follows_what_is_drawn(tmp_path):
    "Two workers: what is announced is never far behind what is on the disk (it was half of the set, when one was read after the other)"
    tasks = [(f"{number}.jpg", number % len(MINI_CLASSES), number) for number in range(240)]
    behind = []
    for announced, _ in enumerate(draw_in_parallel(tmp_path, tasks, 32, None, jobs=2), 1):
        behind.append(len(list(tmp_path.glob("*.jpg"))) - announced)
    assert announced == len(tasks) and max(behind) < 0.25 * len(tasks)


@pytest.mark.parametrize("jobs", [0, -1, 1.5, "two"])
def test_no_processes_are_refused(tmp_path, jobs):
    with pytest.raises(SyntheticError, match="The option jobs is"): make_dataset(tmp_path / "mini", train=1, val=0, test=0, size=32, jobs=jobs)
    assert not (tmp_path / "mini").exists()
