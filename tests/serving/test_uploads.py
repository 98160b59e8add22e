"""Uploads of strangers: every hostile one is refused in time and without much memory, every odd one is shown as a viewer shows it."""
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import hostile
import numpy as np
import pytest
from PIL import Image

from grocery_nb.data.pictures import open_image
from grocery_nb.serving.uploads import STATUS, Limits, UploadError, safe_decode

SPOTS = (8, 8), (50, 8), (8, 40), (50, 40)


@pytest.mark.parametrize("name", hostile.kinds())
def test_hostile_uploads_are_refused(name):
    begun = time.thread_time()  # of this thread only: a busy machine does not count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UploadError) as refusal: safe_decode(hostile.kinds()[name])
    assert time.thread_time() - begun < 1
    assert 400 <= refusal.value.status < 500 and refusal.value.status == STATUS[refusal.value.code]
    sentence = str(refusal.value)
    assert sentence.isprintable() and len(sentence) < 250 and " at 0x" not in sentence


def test_there_are_enough_kinds():
    codes = set()
    for data in hostile.kinds().values():
        with pytest.raises(UploadError) as refusal: safe_decode(data)
        codes.add(refusal.value.code)
    assert len(hostile.kinds()) >= 100 and codes == set(STATUS)


MEMORY = """
import re, sys
sys.path.insert(0, sys.argv[1])
import hostile
from grocery_nb.serving.uploads import UploadError, safe_decode
def now(name): return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
uploads = hostile.kinds()
safe_decode(hostile.odd_but_good()["jpeg"])
most, worst = 0, ""
for name, data in uploads.items():
    open("/proc/self/clear_refs", "w").write("5")  # forget the highest mark so far
    before = now("VmRSS")
    try: safe_decode(data)
    except UploadError: pass
    if now("VmHWM") - before > most: most, worst = now("VmHWM") - before, name
print(most*1024, worst)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
def test_a_refused_upload_takes_little_memory():
    done = subprocess.run([sys.executable, "-c", MEMORY, str(Path(__file__).parent.parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    most, worst = done.stdout.split()
    assert int(most) <= 100_000_000, worst


@pytest.mark.parametrize("name", hostile.odd_but_good())
def test_odd_uploads_are_shown_as_a_viewer_shows_them(name):
    image, expected = safe_decode(hostile.odd_but_good()[name]), hostile.picture()
    assert image.mode == "RGB" and image.size == expected.size
    if "grey" in name or "16_bit" in name: expected = expected.convert("L").convert("RGB")
    for spot in SPOTS: assert np.abs(np.subtract(image.getpixel(spot), expected.getpixel(spot))).max() <= 3, spot
    if "alpha" in name or "clear" in name: assert image.getpixel((62, 40)) == (255, 255, 255)


@pytest.mark.parametrize("name", [name for name in hostile.odd_but_good() if name != "png_text_bombs"])  # which training refuses
def test_serving_sees_what_training_sees(name, tmp_path):
    (tmp_path / "photo").write_bytes(hostile.odd_but_good()[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow complains of nonsense in EXIF data; safe_decode never shows it to Pillow
        trained = open_image(tmp_path / "photo")
    assert np.array_equal(np.asarray(safe_decode(hostile.odd_but_good()[name])), np.asarray(trained))


@pytest.mark.parametrize("kind", ("JPEG", "PNG", "WEBP", "GIF", "BMP"))
def test_a_picture_that_is_cut_anywhere_is_refused(kind):
    data = hostile.saved(hostile.picture(), kind)
    end = len(data) - 2 if kind == "GIF" else len(data)  # a GIF is read to the end of its first frame only
    for length in range(0, end, max(1, len(data) // 200)):
        with pytest.raises(UploadError) as refusal: safe_decode(data[:length])
        assert refusal.value.status == 400


@pytest.mark.parametrize("name", "jpeg jpeg_progressive jpeg_exif_6 png png_animated gif_animated webp webp_alpha bmp".split())
def test_changed_bytes_give_a_picture_or_a_refusal(name):
    whole, random = hostile.odd_but_good()[name], Random(name)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(random.randint(1, 8)): data[random.randrange(min(len(data), random.choice((40, 10**6))))] = random.randrange(256)
        try: assert safe_decode(bytes(data)).mode == "RGB"
        except UploadError as refusal: assert 400 <= refusal.status < 500


def test_limits_belong_to_the_call_also_in_threads():
    photo, before = hostile.odd_but_good()["jpeg"], (Image.MAX_IMAGE_PIXELS, list(warnings.filters))

    def attempt(number):
        try: return safe_decode(photo, Limits(max_pixels=3071 + number % 2)).size
        except UploadError as refusal: return refusal.code

    with ThreadPoolExecutor(8) as pool: answers = list(pool.map(attempt, range(200)))
    assert answers == ["too_many_pixels", (64, 48)] * 100
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_limits_are_exact():
    data = hostile.saved(Image.new("RGB", (500, 10)), "PNG")
    assert safe_decode(data, Limits(max_bytes=len(data), max_pixels=5000, max_ratio=50)).size == (500, 10)
    for limits, code in ((Limits(max_bytes=len(data) - 1), "too_large"), (Limits(max_pixels=4999), "too_many_pixels"),
                         (Limits(max_ratio=49), "too_many_pixels"), (Limits(formats=("JPEG",)), "unsupported_format")):
        with pytest.raises(UploadError) as refusal: safe_decode(data, limits)
        assert refusal.value.code == code


def test_a_progressive_photo_of_a_telephone_is_taken():
    image = Image.new("RGB", (4000, 3000), "red")
    assert safe_decode(hostile.saved(image, "JPEG", progressive=True)).size == (4000, 3000)


PLUGINS = """
import sys
from grocery_nb.serving.uploads import UploadError, safe_decode
for other in (b"%!PS-Adobe", b"II*\\0"):
    try: safe_decode(other)
    except UploadError: pass
safe_decode(sys.stdin.buffer.read())
print(*{"torch", "PIL.EpsImagePlugin", "PIL.TiffImagePlugin", "PIL.PdfImagePlugin"} & {*sys.modules})
"""


def test_no_plugin_is_loaded_that_is_not_needed():
    done = subprocess.run([sys.executable, "-c", PLUGINS], input=hostile.odd_but_good()["webp_exif"], capture_output=True)
    assert (done.returncode, done.stdout.strip()) == (0, b""), (done.stdout, done.stderr)
