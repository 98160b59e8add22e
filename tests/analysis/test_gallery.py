"The gallery by class: as a picture, and, where Gradio is installed (the extra `gallery`), as a page that is asked over HTTP."
import numpy as np
import pytest
from PIL import Image

from conftest import random_case
from grocery_nb.analysis.gallery import class_gallery, gallery_app, photos_of
from grocery_nb.analysis.metrics import EvaluationError


def photo(row): return Image.new("L" if row % 2 else "RGBA", (40 + row % 7, 30), row % 256)


@pytest.mark.parametrize("seed", range(3))
def test_every_class_of_a_split_can_be_shown(seed):
    logits, labels = random_case(seed)
    names = [f"class {i}" for i in range(logits.shape[1])]
    for i, name in enumerate(names):
        if (labels == i).any(): assert class_gallery(logits, labels, names, photo, name).mode == "RGB"
        else:
            with pytest.raises(EvaluationError): class_gallery(logits, labels, names, photo, name)


def test_only_the_photos_that_are_shown_are_opened():
    labels, opened = np.repeat([0, 1], [50, 50]), []
    class_gallery(np.eye(2)[labels], labels, ["a", "b"], lambda row: opened.append(row) or photo(row), "b", count=5)
    assert opened == photos_of(labels, 1) and len(set(opened)) == 5 and min(opened) >= 50


def test_the_page():
    pytest.importorskip("gradio", reason="the extra gallery is not installed")
    from gradio_client import Client
    labels = np.repeat([0, 1, 2], [9, 4, 0])
    app = gallery_app(np.eye(3)[labels], labels, ["Apple", "Lemon", "Quince"], photo)
    _, url, _ = app.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        shown = Client(url, verbose=False).predict("Lemon", 1, api_name="/show")
        assert Image.open(shown).size == (440, 158)
    finally: app.close()
