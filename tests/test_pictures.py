"""`preprocess` gives bit for bit what the training transform gives, and needs no torch."""
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from grocery_nb import data_utils, pictures
from grocery_nb.data_utils import GroceryDataset, make_transform
from grocery_nb.pictures import Preprocessing, preprocess

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8))
RECIPES = {"imagenet": Preprocessing(), "same": Preprocessing(256, 256), "odd": Preprocessing(223, 256),
           "small": Preprocessing(64, 73, [0.5] * 3, [0.5] * 3),
           "large": Preprocessing(300, 343, [0.1, 0.2, 0.3], [0.9, 0.8, 0.7]), "one": Preprocessing(1, 2)}
SIZES = (464, 348), (348, 464), (500, 333), (333, 500), (257, 256), (256, 257), (256, 256), (224, 224), (255, 254), (31, 20), (20, 31), \
        (1, 1), (2, 1), (1, 9), (1199, 401), (401, 1199), (1200, 1200), (1000, 37)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_training_transform(recipe, size, one_thread):
    image = NOISE.crop((0, 0, *size))
    result = preprocess(image, RECIPES[recipe])
    assert np.array_equal(result, make_transform(RECIPES[recipe])(image).numpy())
    assert result.dtype == np.float32 and result.flags.c_contiguous and result.flags.owndata and result.flags.writeable


def test_every_byte_in_every_channel(one_thread):
    ramp = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3))
    for mean, std in (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((1 / 3, 0.1, 0), (0.7, 1, 1e-3))):
        recipe = Preprocessing(16, 16, mean, std)
        assert np.array_equal(preprocess(ramp, recipe), make_transform(recipe)(ramp).numpy())


def test_photos_of_a_data_set(tiny, one_thread):
    plain, ready = GroceryDataset(tiny / "val.txt"), GroceryDataset(tiny / "val.txt", make_transform())
    for index in range(0, len(plain), 7): assert np.array_equal(preprocess(plain[index][0]), ready[index][0].numpy())


def test_the_picture_is_not_changed():
    image = NOISE.crop((0, 0, 256, 256))
    before = image.tobytes()
    preprocess(image)[:] = 0
    assert image.tobytes() == before


def test_old_names_still_lead_to_the_same_things():
    for name in ("IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing", "crop", "normalize", "open_image", "photo_fault", "to_rgb", "upright"):
        assert getattr(data_utils, name) is getattr(pictures, name) and name in data_utils.__all__
    assert Preprocessing().version == "e6eea598" and data_utils.CACHE_FORMAT == 1, "caches and model cards refer to these"


def test_needs_no_torch():
    code = "import sys\nfrom PIL import Image\nfrom grocery_nb.pictures import preprocess\n" \
           "preprocess(Image.new('RGB', (9, 9)))\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
