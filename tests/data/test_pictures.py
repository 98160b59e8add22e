"""`preprocess` gives bit for bit what the training transform gives, and needs no torch; colours are read by their profile."""
import random
import struct
import subprocess
import sys
import zlib
from io import BytesIO

import icc
import numpy as np
import pytest
from PIL import Image

from grocery_nb import data_utils
from grocery_nb.data import pictures, pixels
from grocery_nb.data.pictures import Preprocessing, open_image, preprocess, to_rgb, to_srgb
from grocery_nb.data_utils import GroceryDataset, make_transform
from grocery_nb.serving.uploads import safe_decode

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8))
RECIPES = {"imagenet": Preprocessing(), "same": Preprocessing(256, 256), "odd": Preprocessing(223, 256),
           "small": Preprocessing(64, 73, [0.5] * 3, [0.5] * 3),
           "large": Preprocessing(300, 343, [0.1, 0.2, 0.3], [0.9, 0.8, 0.7]), "one": Preprocessing(1, 2),
           "bicubic": Preprocessing(224, 256, [0.5] * 3, [0.5] * 3, "bicubic"), "bicubic, as lite1": Preprocessing(240, 272, interpolation="bicubic")}
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


def test_the_pixel_cache_knows_the_interpolation(tiny, caches, one_thread):
    recipes = [Preprocessing(48, 50, interpolation=name) for name in ("bilinear", "bicubic")]
    assert len({pixels.cache_file(tiny / "val.txt", recipe) for recipe in recipes}) == 2
    plain = GroceryDataset(tiny / "val.txt")
    for recipe in recipes:
        cached = data_utils.CachedDataset(tiny / "val.txt", recipe)
        for index in range(0, len(plain), 7): assert np.array_equal(preprocess(plain[index][0], recipe), cached[index][0].numpy())
    assert not np.array_equal(preprocess(plain[0][0], recipes[0]), preprocess(plain[0][0], recipes[1]))


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
    assert Preprocessing().version == "d0e0944f" and pixels.CACHE_FORMAT == 2, "caches and model cards refer to these"


def test_needs_no_torch():
    code = "import sys\nfrom PIL import Image\nfrom grocery_nb.data.pictures import preprocess\n" \
           "preprocess(Image.new('RGB', (9, 9)))\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


COLOURS = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((480, 320), Image.Resampling.NEAREST)


def p3_to_srgb(pixels: np.ndarray) -> np.ndarray:
    "The conversion by the two definitions (IEC 61966-2-1, SMPTE EG 432-1), in float64, without any colour library"
    light = np.where(pixels / 255 <= 0.04045, pixels / 255 / 12.92, ((pixels / 255 + 0.055) / 1.055) ** 2.4)
    light = (light @ np.array(icc.P3_LAMPS) @ np.linalg.inv(np.array(icc.SRGB_LAMPS))).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def read_both(image: Image.Image, path, kind: str, **options) -> np.ndarray:
    "A picture as training reads it from a file, which must be what serving makes of the same bytes"
    image.save(path, kind, **options)
    found = open_image(path)
    assert found.mode == "RGB" and "icc_profile" not in found.info
    assert np.array_equal(found, safe_decode(path.read_bytes()))
    return np.int16(found)


@pytest.mark.parametrize("kind, options", [("JPEG", dict(quality=98, subsampling=0)), ("PNG", {}), ("WEBP", dict(lossless=True))])
def test_display_p3_becomes_srgb(tmp_path, kind, options):
    plain = read_both(COLOURS, tmp_path / "plain", kind, **options)
    found = read_both(COLOURS, tmp_path / "p3", kind, icc_profile=icc.DISPLAY_P3, **options)
    assert np.abs(found - plain).max() > 50
    assert np.abs(found - p3_to_srgb(plain)).max() <= 2


@pytest.mark.parametrize("kind, options", [("JPEG", dict(quality=98)), ("PNG", {}), ("WEBP", dict(lossless=True))])
def test_a_profile_that_says_srgb_changes_no_bit(tmp_path, kind, options):
    plain = read_both(COLOURS, tmp_path / "plain", kind, **options)
    assert np.array_equal(plain, read_both(COLOURS, tmp_path / "srgb", kind, icc_profile=icc.SRGB, **options))
    assert np.array_equal(plain, read_both(COLOURS, tmp_path / "pillow", kind, icc_profile=pillow_srgb(), **options))


def pillow_srgb() -> bytes:
    from PIL import ImageCms
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_no_profile_and_no_work():
    assert to_rgb(COLOURS) is COLOURS
    assert to_srgb(icc.SRGB, "RGB") is None and to_srgb(pillow_srgb(), "RGB") is None


def test_preprocess_and_training_read_the_same_colours(tmp_path, one_thread):
    COLOURS.save(tmp_path / "p3.jpg", icc_profile=icc.DISPLAY_P3)
    expected = make_transform()(open_image(tmp_path / "p3.jpg")).numpy()
    assert np.array_equal(preprocess(safe_decode((tmp_path / "p3.jpg").read_bytes())), expected)
    assert np.array_equal(preprocess(Image.open(tmp_path / "p3.jpg")), expected)


def test_grey_by_its_curve(tmp_path):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(30, 0))
    mac = read_both(ramp, tmp_path / "grey.png", "PNG", icc_profile=icc.grey(1.8))
    light = (np.arange(256) / 255) ** 1.8
    assert np.abs(mac[0, 20:, 0] - 255 * (1.055 * light[20:] ** (1 / 2.4) - 0.055)).max() <= 2 and mac[0, 128, 0] == 146
    assert np.array_equal(mac[..., 0], mac[..., 2])
    clear = Image.merge("LA", (ramp, Image.new("L", ramp.size, 255)))
    assert np.array_equal(read_both(clear, tmp_path / "clear.png", "PNG", icc_profile=icc.grey(1.8)), mac)


def test_cmyk_by_its_profile(tmp_path):
    inks = Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    plain = read_both(inks, tmp_path / "plain.jpg", "JPEG")[0, 0]
    printed = read_both(inks, tmp_path / "printed.jpg", "JPEG", icc_profile=icc.cmyk())[0, 0]
    assert plain[0] < 20 and plain[2] > 235 and np.abs(printed - 119).max() <= 2  # L 50 is 119 in sRGB


def test_palette_and_transparency_by_their_profile(tmp_path):
    expected = np.int16(to_rgb(tagged(Image.new("RGB", (2, 2), (200, 60, 40)), icc.DISPLAY_P3)))
    palette = Image.new("RGB", (60, 60), (200, 60, 40)).quantize(4)
    assert np.array_equal(read_both(palette, tmp_path / "palette.png", "PNG", icc_profile=icc.DISPLAY_P3)[:2, :2], expected)
    solid, gone = (Image.new("RGBA", (60, 60), (200, 60, 40, alpha)) for alpha in (255, 0))
    assert np.array_equal(read_both(solid, tmp_path / "solid.png", "PNG", icc_profile=icc.DISPLAY_P3)[:2, :2], expected)
    assert (read_both(gone, tmp_path / "gone.png", "PNG", icc_profile=icc.DISPLAY_P3) == 255).all()


def tagged(image: Image.Image, profile: bytes) -> Image.Image:
    image.info["icc_profile"] = profile
    return image


BROKEN = {"text": b"not a profile", "cut": icc.DISPLAY_P3[:200], "header": icc.DISPLAY_P3[:128], "zeros": bytes(400), "grey": icc.grey(1.8),
          "cmyk": icc.cmyk(), "long": icc.DISPLAY_P3 + bytes(3 << 20), "endless": icc.endless(10)}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_or_foreign_profile_is_not_used(name, tmp_path):
    assert to_rgb(tagged(COLOURS.copy(), BROKEN[name])).tobytes() == COLOURS.tobytes()
    plain = read_both(COLOURS, tmp_path / "plain", "JPEG")
    assert np.array_equal(plain, read_both(COLOURS, tmp_path / "tagged", "JPEG", icc_profile=BROKEN[name]))


def test_damaged_profiles_crash_nothing():
    dice, good = random.Random(0), (icc.DISPLAY_P3, icc.cmyk(), icc.grey(2.2))
    for i in range(300):
        data = bytearray(good[i % 3])
        for _ in range(dice.choice([1, 3, 30])): data[dice.randrange(len(data))] = dice.randrange(256)
        if dice.random() < 0.2: del data[dice.randrange(len(data)):]
        for mode in ("RGB", "CMYK", "L"): assert to_rgb(tagged(Image.new(mode, (3, 2)), bytes(data))).size == (3, 2)


@pytest.mark.parametrize("packed", [b"no zlib", zlib.compress(bytes(2 << 20)), zlib.compress(icc.DISPLAY_P3)[:-9], b""])
def test_a_png_with_a_broken_profile_is_served(packed):
    buffer = BytesIO()
    COLOURS.save(buffer, "PNG")
    data, body = buffer.getvalue(), b"iCCPname\0\0" + packed
    data = data[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]
    assert safe_decode(data).tobytes() == COLOURS.tobytes()
