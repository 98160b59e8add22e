"The data pipeline from photo to batch: shapes, types, contents, order, workers, cache, and what happens when files are bad."
import json
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader, Subset

from grocery_nb.catalog import DataError
from grocery_nb.core import GroceryError
from grocery_nb.data.pixels import cache_file
from grocery_nb.data_utils import (
    Augmentation, CachedDataset, EpochSampler, GroceryDataset, Preprocessing, create_dataloader, get_loaders, load_dataset,
    make_transform, open_image, pad_collate, perm, pixel_cache, transform,
)

COLOURS = {"Granny-Smith": (40, 200, 40), "Pink-Lady": (220, 30, 90), "Lemon": (240, 230, 20)}
SMALL = Preprocessing(size=32, resize=40)
pytestmark = pytest.mark.usefixtures("caches")


def write_index(folder: Path, split: str, rows: list) -> Path:
    csv = folder / f"{split}.txt"
    csv.write_text("".join(f"{path}, {fine}, {coarse}\n" for path, fine, coarse in rows), encoding="utf-8")
    return csv


@pytest.fixture
def shop(tmp_path) -> Path:
    "Nine training and three validation photos in three flat colours, no two of the same size: the right answers are known"
    folder = tmp_path / "shop"
    (folder / "train").mkdir(parents=True)
    (folder / "classes.csv").write_text("Class Name,Class ID,Coarse Class Name,Coarse Class ID\n"
                                        "Granny-Smith,0,Apple,0\nPink-Lady,1,Apple,0\nLemon,2,Lemon,1\n", encoding="utf-8")
    rows = []
    for fine, (name, colour) in enumerate(COLOURS.items()):
        for n in range(4):
            path = f"train/{name}_{n}.png"
            image = Image.effect_noise((60 + 7*n + fine, 50 + 5*fine + n), 40).convert("RGB")
            Image.blend(image, Image.new("RGB", image.size, colour), 0.8).save(folder / path)
            rows.append((path, fine, fine // 2))
    write_index(folder, "train", [row for n, row in enumerate(rows) if n % 4])
    write_index(folder, "val", rows[::4])
    return folder


def everything(loader, epochs: int = 1) -> list:
    return [batch for _ in range(epochs) for batch in loader]


def same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) and a.stride() == c.stride() for (a, b), (c, d) in zip(first, second))


@pytest.mark.parametrize("make", [lambda csv: GroceryDataset(csv, transform), CachedDataset])
def test_shapes_and_types(shop, make):
    images, labels = next(iter(create_dataloader(make(shop / "train.txt"), batch_size=4)))
    assert images.shape == (4, 3, 224, 224) and images.dtype == torch.float32
    assert labels.shape == (4,) and labels.dtype == torch.int64
    image, label = make(shop / "train.txt")[0]
    assert image.shape == (3, 224, 224) and isinstance(label, int)


@pytest.mark.parametrize("label", ["fine", "coarse"])
def test_contents_belong_to_their_labels(shop, label):
    "Shapes are also right when channels are exchanged or labels shifted; colours are not"
    plain = Preprocessing(32, 40, mean=[0, 0, 0], std=[1, 1, 1])
    loader = create_dataloader(CachedDataset(shop / "train.txt", plain, label), batch_size=2, shuffle=True, seed=5)
    seen = 0
    for images, labels in loader:
        for image, answer in zip(images, labels.tolist()):
            distance = [(image.mean((1, 2)) * 255 - torch.tensor(colour)).abs().sum() for colour in COLOURS.values()]
            fine = int(np.argmin(distance))
            assert answer == (fine if label == "fine" else fine // 2)
            seen += 1
    assert seen == 9


def test_last_batch_of_one_is_kept(shop):
    assert [len(labels) for _, labels in create_dataloader(CachedDataset(shop / "train.txt", SMALL), batch_size=4)] == [4, 4, 1]


def test_empty_index(shop):
    (shop / "train.txt").write_text("\n\n")
    for make in (GroceryDataset, CachedDataset, pixel_cache):
        with pytest.raises(DataError, match="lists no images"): make(shop / "train.txt")


def test_dataset_without_transform_hands_out_pictures(shop):
    image, label = GroceryDataset(shop / "val.txt", transform=None)[2]
    assert image.mode == "RGB" and label == 1
    with pytest.raises(DataError, match="give it a transform"): next(iter(create_dataloader(GroceryDataset(shop / "val.txt"), 2)))


@pytest.mark.parametrize("label", ["fin", "", None, 1])
def test_unknown_label(shop, label):
    with pytest.raises(DataError, match="choose fine or coarse"): GroceryDataset(shop / "train.txt", label=label)


@pytest.mark.parametrize("batch_size, workers", [(0, 0), (-3, 0), (1, -1)])
def test_impossible_loader(shop, batch_size, workers):
    with pytest.raises(DataError, match=r"is (0|-3|-1); "): create_dataloader([], batch_size, num_workers=workers)


def test_load_dataset_takes_folder_or_index(shop):
    assert len(load_dataset(shop)) == 9 and len(load_dataset(shop, "val")) == len(load_dataset(shop / "val.txt")) == 3
    with pytest.raises(DataError, match="'test' is not in shop"): load_dataset(shop, "test")


def test_the_labs_calls(shop, monkeypatch):
    "By keyword and by position, with and without a transform; a dataset is a sequence, and the loaders need no argument"
    from grocery_nb import data_utils
    for dataset in (GroceryDataset(csv_file=shop / "val.txt", transform=None), GroceryDataset(csv_file=str(shop / "val.txt")),
                    GroceryDataset(shop / "val.txt", None)):
        assert len(dataset) == 3 and [(image.mode, label) for image, label in dataset] == [("RGB", 0), ("RGB", 0), ("RGB", 1)]
    for dataset in (GroceryDataset(csv_file=shop / "val.txt", transform=transform), load_dataset(shop / "val.txt")):
        for image, label in dataset: assert image.shape == (3, 224, 224) and type(label) is int
    images, labels = next(iter(create_dataloader(dataset, 2, False)))
    assert images.shape == (2, 3, 224, 224) and labels.tolist() == [0, 0]
    monkeypatch.setattr(data_utils, "DATA_DIR", shop)
    train, val = get_loaders()
    assert [len(labels) for _, labels in train] == [9] and next(iter(val))[0].shape == (3, 3, 224, 224)


def test_a_folder_a_clone_and_a_home(shop, tmp_path, monkeypatch):
    shop.rename(tmp_path / "dataset")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for place in (tmp_path, tmp_path / "dataset", f"~/{tmp_path.name}"):
        assert len(load_dataset(place)) == 9 and len(get_loaders(4, place, preprocessing=SMALL)[1]) == 1
    assert len(load_dataset(f"~/{tmp_path.name}/dataset/val.txt")) == 3


def test_photos_of_one_s_own(shop):
    "What a folder may lack, in one sentence; a validation split of one photo is enough for a loader"
    (shop / "val.txt").write_text("train/Lemon_0.png, 2, 1\n")
    assert [len(labels) for _, labels in get_loaders(4, shop, preprocessing=SMALL)[1]] == [1]
    (shop / "val.txt").write_text("")
    with pytest.raises(DataError, match="shop/val.txt lists no images; write one row an image"): get_loaders(4, shop)
    (shop / "val.txt").unlink()
    with pytest.raises(DataError, match="'val' is not in shop; there is train: .*write a val.txt"): get_loaders(4, shop)
    (shop / "train.txt").unlink()
    (shop / "classes.csv").unlink()
    with pytest.raises(DataError, match="has no train.txt, val.txt or test.txt"): get_loaders(4, shop)


@pytest.mark.parametrize("field, value", [
    ("min_area", 0), ("min_area", -0.1), ("min_area", 1.5), ("max_ratio", 0.5), ("max_ratio", float("inf")), ("flip", 2), ("light", -1),
    ("tint", float("nan")), ("light", "0.1"), ("flip", None)])
def test_an_augmentation_that_cannot_be(field, value):
    with pytest.raises(DataError, match=f"{field} is .*; give a number"): Augmentation(**{field: value})


def test_an_explicit_zero_is_not_unset(shop):
    calm = Augmentation(min_area=1, max_ratio=1, flip=0, light=0, tint=0)
    recipe = CachedDataset(shop / "train.txt", SMALL, augment=calm).recipe
    assert (recipe.flip, recipe.light, recipe.tint) == (0, 0, 0)
    assert create_dataloader(CachedDataset(shop / "train.txt", SMALL), 4, seed=0).sampler.seed == 0


@pytest.mark.parametrize("options", [dict(batch_size=2.5), dict(batch_size="4"), dict(num_workers=1.0), dict(seed=1.5)])
def test_a_loader_counts_in_whole_numbers(options):
    with pytest.raises(DataError, match="give a whole number"): create_dataloader([], **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_another_left_off(shop, workers):
    "Second epoch, third batch: order and augmentation do not depend on what a loader, or its generator, has been through"
    def make(): return create_dataloader(CachedDataset(shop / "train.txt", SMALL, augment=True), 2, shuffle=True, seed=3, num_workers=workers)
    through, fresh = make(), make()
    all_of_it = everything(through, epochs=3)
    fresh.sampler.set_epoch(1)
    fresh.sampler.skip = 2 * 2
    assert same(all_of_it[5 + 2:], everything(fresh, epochs=2))


def break_photo(path: Path, how: str):
    data = path.read_bytes()
    if how == "missing": path.unlink()
    else: path.write_bytes({"empty": b"", "truncated": data[:len(data) // 2], "no image": b"<html>not found</html>"}[how])


@pytest.mark.parametrize("how, words", [
    ("missing", "is missing"), ("empty", "is empty"), ("truncated", "is damaged"), ("no image", "is 22 bytes that are no image")])
def test_bad_photo_is_one_sentence_and_leaves_nothing(shop, caches, how, words):
    break_photo(shop / "train/Pink-Lady_2.png", how)
    pattern = rf"^shop/train\.txt, row 5: the photo .*Pink-Lady_2\.png {words}.*; .*validate"
    dataset = GroceryDataset(shop / "train.txt", transform)
    assert dataset[3][0].shape == (3, 224, 224)
    with pytest.raises(DataError, match=pattern) as refusal: dataset[4]
    assert "\n" not in str(refusal.value)
    with pytest.raises(DataError, match=pattern): CachedDataset(shop / "train.txt")
    assert [path.name for path in (caches / "pixels").glob("*") if path.suffix != ".lock"] == [] if (caches / "pixels").exists() else True


def test_first_bad_row_is_the_one_named(shop):
    for name in ("Lemon_3", "Granny-Smith_2", "Pink-Lady_1"): break_photo(shop / f"train/{name}.png", "truncated")
    for _ in range(3):
        with pytest.raises(DataError, match="row 2: "): pixel_cache(shop / "train.txt")


def test_bad_photo_in_a_worker(shop):
    break_photo(shop / "train/Pink-Lady_2.png", "truncated")
    with pytest.raises(DataError, match=r"row 5: the photo .* is damaged"):
        everything(create_dataloader(GroceryDataset(shop / "train.txt", transform), 4, num_workers=1))


def test_variable_sizes():
    samples = [(torch.full((3, h, w), float(n + 1)), n) for n, (h, w) in enumerate([(5, 9), (7, 4), (6, 6)])]
    images, labels = pad_collate(samples)
    assert images.shape == (3, 3, 7, 9) and labels.tolist() == [0, 1, 2] and labels.dtype == torch.int64
    for n, (image, _) in enumerate(samples):
        assert torch.equal(images[n, :, :image.shape[1], :image.shape[2]], image)
        assert images[n].sum() == image.sum(), "what is not image is zero"


def test_variable_sizes_through_a_loader(shop):
    from torchvision.transforms import v2
    as_is = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    dataset = GroceryDataset(shop / "train.txt", as_is)
    images, _ = next(iter(create_dataloader(dataset, 9)))
    assert images.shape == (9, 3, max(dataset[i][0].shape[1] for i in range(9)), max(dataset[i][0].shape[2] for i in range(9)))


def test_workers_do_not_matter(shop):
    "Order, augmentation, labels and memory layout over two epochs, with 0, 1 and 2 workers"
    def run(workers):
        dataset = CachedDataset(shop / "train.txt", SMALL, augment=True, seed=3)
        return everything(create_dataloader(dataset, 2, shuffle=True, seed=3, num_workers=workers), epochs=2)
    alone = run(0)
    assert same(alone, run(1)) and same(alone, run(2))
    assert not same(alone[:5], alone[5:]), "the second epoch is another one"


def test_workers_that_are_not_forked(shop):
    "Python 3.14 no longer forks: the dataset must go through pickle"
    dataset = CachedDataset(shop / "train.txt", SMALL, augment=True, seed=3)
    loaders = [create_dataloader(dataset, 4, shuffle=True, num_workers=n) for n in (0, 1)]
    loaders[1].multiprocessing_context = "spawn"
    assert same(everything(loaders[0]), everything(loaders[1]))


def test_threads_do_not_matter(shop):
    dataset, threads = CachedDataset(shop / "train.txt", SMALL, augment=True), torch.get_num_threads()
    try:
        results = []
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(everything(create_dataloader(dataset, 4, shuffle=True)))
    finally: torch.set_num_threads(threads)
    assert same(*results)


def test_another_seed_is_another_order_and_augmentation(shop):
    first, second = (everything(get_loaders(3, shop, preprocessing=SMALL, seed=seed)[0]) for seed in (0, 1))
    assert not same(first, second)
    assert same(first, everything(get_loaders(3, shop, preprocessing=SMALL, seed=0)[0]))


def test_augmentation_is_a_function_of_seed_epoch_and_index(shop):
    (shop / "train.txt").write_text("train/Lemon_1.png, 2, 1\n" * 4)
    def make(seed): return CachedDataset(shop / "train.txt", SMALL, augment=True, seed=seed)
    pictures = {make(seed)[epoch, index][0].numpy().tobytes() for seed in (0, 1) for epoch in (0, 1) for index in range(4)}
    assert len(pictures) == 16, "one photo, sixteen ways to show it"
    assert torch.equal(make(1)[1, 3][0], make(1)[1, 3][0]) and torch.equal(make(1)[3][0], make(1)[0, 3][0])


def test_validation_is_neither_shuffled_nor_augmented(shop):
    _, loader = get_loaders(2, shop, preprocessing=SMALL)
    assert same(everything(loader), everything(loader))
    assert torch.cat([labels for _, labels in loader]).tolist() == [0, 0, 1]


def test_set_epoch_repeats_an_epoch(shop):
    loader, _ = get_loaders(4, shop, preprocessing=SMALL)
    epochs = [everything(loader) for _ in range(3)]
    loader.sampler.set_epoch(1)
    assert same(everything(loader), epochs[1]) and same(everything(loader), epochs[2])


def test_loading_leaves_global_generators_alone(shop):
    loader, _ = get_loaders(4, shop, preprocessing=SMALL)
    torch.manual_seed(7), np.random.seed(7)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(7), np.random.seed(7)
    everything(loader)
    assert torch.equal(torch.rand(3), expected[0]) and (np.random.rand(3) == expected[1]).all()


def test_order_is_the_same_on_every_machine():
    assert perm(10, seed=0, epoch=0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert perm(10, seed=42, epoch=7).tolist() == [6, 8, 7, 4, 5, 2, 9, 0, 1, 3]
    assert list(EpochSampler(3, shuffle=False)) == [(0, 0), (0, 1), (0, 2)]
    assert sorted(perm(100_000, seed=1, epoch=1)) == list(range(100_000))
    assert perm(0, 0, 0).tolist() == [] and perm(1, -1, 0).tolist() == [0]


def test_orders_show_no_pattern():
    "Each place of an order holds each index about equally often"
    counts = np.zeros((10, 10))
    for epoch in range(2000): counts[np.arange(10), perm(10, seed=0, epoch=epoch)] += 1
    assert (((counts - 200)**2 / 200).sum()) < 150  # chi-square, 81 degrees of freedom: 150 has p < 1e-5


def test_any_dataset_and_subsets(shop):
    pairs = [(torch.full((3, 2, 2), float(n)), n) for n in range(5)]
    assert everything(create_dataloader(pairs, 5))[0][1].tolist() == [0, 1, 2, 3, 4]
    cached = CachedDataset(shop / "train.txt", SMALL)
    images, labels = everything(create_dataloader(Subset(cached, [8, 0]), 2))[0]
    assert torch.equal(images[0], cached[8][0]) and labels.tolist() == [1, 0]
    assert same(everything(DataLoader(cached, 4)), [(a.contiguous(), b) for a, b in everything(create_dataloader(cached, 4))])


MODES = {"grey.png": "L", "palette.png": "P", "alpha.png": "RGBA", "grey-alpha.png": "LA", "print.jpg": "CMYK", "bits.png": "1", "deep.png": "I;16"}


@pytest.mark.parametrize("p", [Preprocessing(), Preprocessing(size=31, resize=40), Preprocessing(size=40, resize=40, mean=[0.5]*3, std=[0.5]*3)],
                         ids=["default", "odd", "no crop"])
def test_cache_equals_the_pillow_path(shop, p):
    "Odd sizes, upright and lying, any mode, turned by EXIF: what comes from the cache is what the transform makes of the file"
    base, turned = Image.effect_noise((91, 70), 60), Image.Exif()
    turned[0x0112] = 8
    for name, mode in MODES.items():
        deep = Image.fromarray(np.asarray(base).astype(np.uint16) * 250)
        (deep if mode == "I;16" else base.convert("RGB").convert(mode)).save(shop / name)
    for n, size in enumerate([(343, 256), (341, 257), (256, 256), (20, 300), (301, 33), (1, 1), (348, 348)]):
        Image.effect_noise(size, 60).convert("RGB").save(shop / f"{n}.jpg", exif=turned)
    paths = [*MODES, *(f"{n}.jpg" for n in range(7))]
    csv = write_index(shop, "odd", [(path, 0, 0) for path in paths])
    cached, plain = CachedDataset(csv, p), GroceryDataset(csv, make_transform(p))
    for n in range(len(paths)): assert torch.allclose(cached[n][0], plain[n][0], atol=1e-6, rtol=0), paths[n]
    assert plain[len(MODES)][0].std() > 0.02


def test_photo_is_turned_upright(shop):
    "Lying on its left side, as a telephone stores it: what is red on the left must be at the top"
    image, note = Image.new("RGB", (80, 40), "blue"), Image.Exif()
    image.paste("red", (0, 0, 40, 40))
    note[0x0112] = 6
    image.save(shop / "lying.jpg", exif=note, quality=95)
    picture = open_image(shop / "lying.jpg")
    assert picture.size == (40, 80) and picture.getpixel((20, 10))[0] > 200 and picture.getpixel((20, 70))[2] > 200


def test_real_photos(photos):
    "A handful of the real ones, by both ways"
    csv = photos / "val.txt"
    items = GroceryDataset(csv, transform)
    for n in (0, 100, -1):
        image = open_image(photos / items.items[n].path)
        assert torch.equal(items[n][0], transform(image)) and image.size == (348, 348)


def build(csv, barrier, answers):
    barrier.wait(240)
    pixels = pixel_cache(csv, SMALL)
    path = Path(pixels.filename)
    answers.put((path.name, path.stat().st_ino, int(pixels.sum(dtype=np.int64))))


def test_two_processes_build_once(shop, caches):
    "A second build would replace the file, and the first process would have seen another inode"
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=build, args=(shop / "train.txt", barrier, answers)) for _ in range(2)]
    for process in processes: process.start()
    first, second = (answers.get(timeout=300) for _ in processes)
    for process in processes: process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert first == second
    assert len(list((caches / "pixels").glob("*.u8"))) == 1 and not list((caches / "pixels").glob("*.tmp"))


def test_threads_of_one_process_build_once(shop):
    inodes = []
    threads = [threading.Thread(target=lambda: inodes.append(Path(pixel_cache(shop / "train.txt", SMALL).filename).stat().st_ino))
               for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(inodes) == 4 and len(set(inodes)) == 1


def inode(csv) -> int:
    return Path(pixel_cache(csv, SMALL).filename).stat().st_ino


def test_cache_follows_contents(shop):
    csv = shop / "train.txt"
    before, first = cache_file(csv, SMALL), pixel_cache(csv, SMALL)[0].copy()
    assert inode(csv) == inode(csv), "nothing changed: nothing is built"
    Image.new("RGB", (50, 50), "blue").save(shop / "train/Granny-Smith_1.png")
    assert cache_file(csv, SMALL) != before
    assert (pixel_cache(csv, SMALL)[0] != first).any() and (pixel_cache(csv, SMALL)[0] == [0, 0, 255]).all()
    lines = csv.read_text().splitlines(keepends=True)
    csv.write_text("".join(lines[::-1]))
    assert (pixel_cache(csv, SMALL)[-1] == [0, 0, 255]).all()


def damage(path: Path, how: str):
    data, card = bytearray(path.read_bytes()), path.with_suffix(".json")
    data[len(data) // 2] ^= 1
    if how == "bit": path.write_bytes(data)
    if how == "short": path.write_bytes(data[:-1])
    if how == "gone": path.unlink()
    if how == "no card": card.unlink()
    if how == "half a card": card.write_text(card.read_text()[:10])
    if how == "other card": card.write_text(json.dumps([1, 2]))


@pytest.mark.parametrize("how", ["bit", "short", "gone", "no card", "half a card", "other card"])
def test_damaged_cache_is_rebuilt(shop, how):
    csv = shop / "train.txt"
    pixels = pixel_cache(csv, SMALL)
    expected, path = pixels.copy(), Path(pixels.filename)
    del pixels
    damage(path, how)
    (path.parent / f".{path.name}.0badc0de.tmp").write_bytes(b"left by a build that was killed")
    assert (pixel_cache(csv, SMALL) == expected).all()
    assert not list(path.parent.glob(".*.tmp"))


def test_copied_cache_is_kept(shop):
    "Another time stamp and the same contents: a cache that was copied with its folder is not built again"
    path = Path(pixel_cache(shop / "train.txt", SMALL).filename)
    before = path.stat().st_ino
    path.touch()
    assert inode(shop / "train.txt") == before


@pytest.mark.parametrize("how", ["short", "gone"])
def test_cache_that_vanishes_in_use(shop, how):
    dataset = CachedDataset(shop / "train.txt", SMALL)
    damage(dataset.path, how)
    with pytest.raises(DataError, match="was removed or cut off while it was in use"): dataset[0]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes to stand for a full disk")
def test_full_disk(shop, caches):
    code = f"""
import resource
from grocery_nb.data_utils import pixel_cache, Preprocessing
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
pixel_cache({str(shop / "train.txt")!r}, Preprocessing(size=32, resize=40))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert "GroceryError: The pixel cache" in last and "File too large" in last and "GROCERY_CACHE_DIR" in last
    assert not [path for path in (caches / "pixels").iterdir() if path.suffix != ".lock"]


def test_cache_folder_that_is_a_file(shop, caches):
    caches.write_text("in the way")
    with pytest.raises(GroceryError, match="set GROCERY_CACHE_DIR"): pixel_cache(shop / "train.txt")
