"The unit tests of the second lab, in our own words; a student runs them with `pytest`."
import torch
from data_utils import CLASSES_CSV, TRAIN_CSV, VAL_CSV, GroceryDataset, get_classes, get_loaders, transform
from PIL import Image


def test_files_are_there():
    assert all(file.exists() for file in (CLASSES_CSV, TRAIN_CSV, VAL_CSV))


def test_an_item_is_a_picture_and_a_label():
    dataset = GroceryDataset(csv_file=TRAIN_CSV)
    image, label = dataset[0]
    assert isinstance(image, Image.Image) and isinstance(label, int)
    assert label in get_classes() and len(dataset) == sum(1 for _ in dataset)


def test_a_transformed_item_is_a_tensor():
    image, label = GroceryDataset(csv_file=VAL_CSV, transform=transform)[0]
    assert image.dtype == torch.float32 and image.shape == (3, 224, 224)


def test_loaders_give_batches():
    for loader in get_loaders(batch_size=4):
        images, labels = next(iter(loader))
        assert images.shape == (4, 3, 224, 224) and labels.shape == (4,) and labels.dtype == torch.int64
