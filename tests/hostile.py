"""What strangers send: uploads that must be refused, and odd ones that must be taken; made here, without files, the same each time."""
import json
import struct
import zipfile
import zlib
from functools import cache
from io import BytesIO
from random import Random

import numpy as np
from PIL import Image

MEGABYTE = 1_000_000
PNG, JPEG_START = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"


def picture(width: int = 64, height: int = 48) -> Image.Image:
    "A picture whose four quarters differ: red, green, blue and grey"
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    top, left = np.arange(height)[:, None] < height // 2, np.arange(width)[None, :] < width // 2
    pixels[top & left], pixels[top & ~left], pixels[~top & left], pixels[~top & ~left] = (220, 30, 30), (30, 200, 30), (30, 30, 210), (128,) * 3
    return Image.fromarray(pixels)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes = b"") -> bytes:
    "A PNG chunk with its checksum"
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, raw: bytes = b"", bits: int = 8, colour: int = 0, between: bytes = b"") -> bytes:
    "A PNG with any size in its header, any pixel data, and more chunks between the two"
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return PNG + chunk(b"IHDR", header) + between + chunk(b"IDAT", zlib.compress(raw, 1)) + chunk(b"IEND")


def flat_png(width: int, height: int, bits: int) -> bytes:
    "A whole PNG of one colour, packed row by row"
    pack = zlib.compressobj(9)
    rows = b"".join(pack.compress(bytes(1 + (width * bits + 7) // 8)) for _ in range(height)) + pack.flush()
    return PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND")


def segment(kind: int, body: bytes = b"") -> bytes:
    "A JPEG segment"
    return struct.pack(">BBH", 0xFF, kind, len(body) + 2) + body


def jpeg_of(width: int, height: int, **options) -> bytes:
    "A small JPEG whose frame claims another size"
    data = bytearray(saved(picture(), "JPEG", **options))
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    struct.pack_into(">HH", data, frame + 5, height, width)
    return bytes(data)


def exif_of(orientation: int, order: str = "<") -> bytes:
    "EXIF data with nothing but an orientation"
    return (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def with_exif(data: bytes, exif: bytes) -> bytes:
    "A JPEG with EXIF data in front"
    return data[:2] + segment(0xE1, b"Exif\0\0" + exif) + data[2:]


def riff(body: bytes, name: bytes = b"WEBP") -> bytes:
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + name + body


def riff_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def webp_canvas(width: int, height: int, *chunks: bytes, flags: int = 0) -> bytes:
    "A WebP of the extended kind: its canvas may be 16 million pixels wide"
    head = struct.pack("<I", flags) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return riff(riff_chunk(b"VP8X", head) + b"".join(chunks))


def bmp(width: int, height: int, bits: int = 24, compression: int = 0, body: bytes = b"", offset: int = 54) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, offset) + info + body


def gif(width: int, height: int, body: bytes) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + body


def tiff(entries: list, next_directory: int = 0) -> bytes:
    "A TIFF with one directory of (tag, kind, count, value)"
    rows = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + struct.pack("<I", next_directory)


def archive(name: str, contents: bytes) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as z: z.writestr(zipfile.ZipInfo(name), contents)
    return buffer.getvalue()


def not_pictures() -> dict:
    photo, noise = saved(picture(), "JPEG"), Random(0).randbytes(5000)
    return {
        "empty": b"", "one_byte": b"\xff", "nul_bytes": bytes(MEGABYTE), "random_bytes": b"\x07" + noise, "newlines": b"\n" * 1000,
        "text": b"this is a picture, I promise", "html": b"<!doctype html><html><body><img src=x onerror=alert(1)></body></html>",
        "json": json.dumps({"image": "aGVsbG8="}).encode(), "data_url": b"data:image/png;base64,iVBORw0KGgo=",
        "zip": archive("a.jpg", photo),
        "zip_bomb": archive("a.txt", b"") + zlib.compress(bytes(MEGABYTE)), "nested_zip": archive("b.zip", archive("a.zip", photo)),
        "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + noise, "program": b"\x7fELF\x02\x01\x01" + bytes(100), "wav": riff(noise, b"WAVE"),
        "pickle": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "script": b"#!/bin/sh\nrm -rf /\n",
        "bm_text": b"BMW, a text that begins like a BMP",
    }


def other_formats() -> dict:
    laughs = b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a "ha">'
    laughs += b"".join(b'<!ENTITY %c "&%c;&%c;">' % (97 + i, 96 + i, 96 + i) for i in range(1, 25))
    size = [(256, 3, 1, 8), (257, 3, 1, 8)]
    return {
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "svg_laughs": laughs + b"]><svg>&y;</svg>",
        "pdf": b"%PDF-1.7\n1 0 obj<</JS(app.alert(1))>>endobj",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n{} loop\n",
        "eps_dos": b"\xc5\xd0\xd3\xc6" + bytes(40), "psd": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3),
        "ico": b"\0\0\x01\0\x01\0\0\0\0\0\x01\0\x20\0\x28\0\0\0\x16\0\0\0" + bytes(40), "tiff": saved(picture(), "TIFF"),
        "tiff_loop": tiff(size, next_directory=8),
        "tiff_same_megabytes": tiff(size + [(1000 + i, 7, MEGABYTE, 0) for i in range(500)]) + bytes(MEGABYTE),
        "tiff_huge": tiff([(256, 4, 1, 2**31), (257, 4, 1, 2**31)]), "heic": b"\0\0\0\x20ftypheic" + bytes(60),
        "avif": b"\0\0\0\x20ftypavif" + bytes(60),
        "jpeg_xl": b"\xff\x0a" + bytes(50), "jpeg_2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50),
        "icns": b"icns\xff\xff\xff\xff" + bytes(50),
        "ppm_huge": b"P6\n99999 99999\n255\n", "pdf_with_jpeg": b"%PDF-1.7\n" + saved(picture(), "JPEG"),
        "html_with_png": b"<html>" + saved(picture(), "PNG"),
    }


def broken_jpegs() -> dict:
    whole, slow = saved(picture(400, 300), "JPEG"), saved(picture(400, 300), "JPEG", progressive=True)
    frame, scan = whole.index(b"\xff\xc0"), whole.index(b"\xff\xda")
    last = slow.rindex(b"\xff\xda")
    return {
        "jpeg_signature": b"\xff\xd8\xff", "jpeg_cut_in_header": whole[:100], "jpeg_cut_before_pixels": whole[:scan],
        "jpeg_cut_in_scan_header": whole[:scan + 5],
        "jpeg_half": whole[:len(whole) // 2], "jpeg_without_last_bytes": whole[:-2], "jpeg_without_last_byte": whole[:-1],
        "jpeg_progressive_half": slow[:len(slow) // 2],
        "jpeg_no_frame": whole[:frame] + whole[whole.index(b"\xff\xc4"):],
        "jpeg_two_frames": whole[:frame] + whole[frame:frame + 19] + whole[frame:],
        "jpeg_huge": jpeg_of(65500, 65500), "jpeg_zero": jpeg_of(0, 0), "jpeg_no_height": jpeg_of(64, 0), "jpeg_strip": jpeg_of(60000, 10),
        "jpeg_twelve_bits": whole[:frame + 4] + b"\x0c" + whole[frame + 5:],
        "jpeg_no_components": whole[:frame + 9] + b"\0" + whole[frame + 10:],
        "jpeg_comment_flood": JPEG_START + segment(0xFE) * (2 * MEGABYTE), "jpeg_fill_flood": JPEG_START + b"\xff" * (8 * MEGABYTE),
        "jpeg_junk": JPEG_START + b"\xff\xe0\0\x02" + bytes(9 * MEGABYTE),
        "jpeg_exif_flood": JPEG_START + segment(0xE1, b"Exif\0\0" + exif_of(6)) * 20_000 + whole[2:],
        "jpeg_many_scans": slow[:last] + slow[last:-2] * 5000 + slow[-2:],
        "jpeg_progressive_memory": jpeg_of(4900, 4900, progressive=True, subsampling=0),
        "jpeg_no_tables": JPEG_START + whole[frame:], "jpeg_twice_the_start": JPEG_START * 1000,
        "jpeg_exif_nonsense_and_cut": with_exif(whole, b"II*\0\xff\xff\xff\xff")[:-50], "jpeg_named_png": PNG + whole,
        "jpeg_lengths_of_zero": JPEG_START + b"\xff\xe0\0\0" * 50_000,
    }


def broken_pngs() -> dict:
    whole = saved(picture(), "PNG")
    data = whole.index(b"IDAT")
    def flipped(place): return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:]
    large, packed = chunk(b"IHDR", struct.pack(">IIBBBBB", 4900, 4900, 8, 2, 0, 0, 0)), zlib.compress(bytes(4900 * 3 + 1) * 4900, 1)
    return {
        "png_signature": PNG, "png_header_only": whole[:33], "png_half": whole[:len(whole) // 2], "png_without_last_byte": whole[:-1],
        "png_without_end": whole[:-12],
        "png_size_checksum": flipped(20), "png_pixel_checksum": flipped(len(whole) - 14), "png_pixels_changed": flipped(data + 12),
        "png_no_pixels": PNG + whole[8:33] + chunk(b"IEND"), "png_no_zlib": PNG + whole[8:33] + chunk(b"IDAT", b"hello") + chunk(b"IEND"),
        "png_bomb": flat_png(9250, 9250, bits=4), "png_bomb_of_bits": flat_png(16000, 16000, bits=1), "png_huge": png(2**31 - 1, 2**31 - 1),
        "png_zero": png(0, 0),
        "png_wide": flat_png(1_000_000, 1, bits=8), "png_high": flat_png(1, 100_000, bits=8),
        "png_large_and_broken": PNG + large + chunk(b"IDAT", packed[:len(packed) * 9 // 10] + b"\xff" * 100) + chunk(b"IEND"),
        "png_chunk_flood": png(8, 8, bytes(72), between=chunk(b"prVt") * 200_000),
        "png_pixel_flood": PNG + whole[8:33] + chunk(b"IDAT") * 200_000 + whole[data - 4:],
        "png_text_flood": png(8, 8, bytes(72), between=chunk(b"tEXt", b"a\0b") * 100_000),
        "png_frame_flood": png(8, 8, bytes(72), between=chunk(b"fcTL", bytes(26)) * 100_000),
        "png_length": PNG + b"\xff\xff\xff\xffIHDR" + whole[16:], "png_colour_type": png(8, 8, bytes(72), colour=5),
        "png_bits": png(8, 8, bytes(72), bits=3),
        "png_short_header": PNG + chunk(b"IHDR", bytes(5)) + whole[33:], "png_header_second": PNG + chunk(b"tEXt", b"a\0b") + whole[8:],
        "png_in_png": PNG + whole,
        "png_two_headers": whole[:33] + chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)) + whole[33:],
    }


def broken_others() -> dict:
    still, moving, web = saved(picture(), "GIF"), b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0", saved(picture(), "WEBP")
    frame = b"," + struct.pack("<4HB", 0, 0, 4, 4, 0) + b"\x02\x02\x4c\x01\0;"
    large = saved(Image.new("RGB", (2400, 2400), "red"), "WEBP", quality=90, method=0)
    return {
        "gif_signature": b"GIF89a", "gif_no_frame": gif(8, 8, b";"), "gif_half": still[:len(still) // 2], "gif_without_pixels": still[:-20],
        "gif_junk": gif(8, 8, b"junk"),
        "gif_script": b"GIF89a=1/*" + bytes(10) + b"*/;alert(1)", "gif_huge": gif(65535, 65535, frame),
        "gif_frame_beyond_screen": gif(1, 1, b"," + struct.pack("<4HB", 60000, 60000, 5000, 5000, 0) + frame[10:]),
        "gif_zero": gif(0, 0, b"," + bytes(9) + frame[10:]),
        "gif_comment_flood": gif(8, 8, b"!\xfe" + b"\x01a" * (4 * MEGABYTE) + b"\0" + frame),
        "gif_block_flood": gif(8, 8, b"!\xfe\0" * MEGABYTE + frame),
        "gif_huge_animation": gif(30000, 30000, moving + frame[:-1] * 10_000 + b";"),
        "webp_signature": riff(b""), "webp_half": web[:len(web) // 2], "webp_without_last_byte": web[:-1],
        "webp_flat_bomb": saved(Image.new("RGB", (5000, 5000)), "WEBP", lossless=True, method=0),
        "webp_canvas": webp_canvas(2**24, 2**24, riff_chunk(b"VP8L", b"\x2f\0\0\0\0")),
        "webp_canvas_and_small_picture": webp_canvas(9000, 9000, web[12:]),
        "webp_unknown_chunk": riff(riff_chunk(b"JUNK", bytes(20)) + web[12:]),
        "webp_noise": riff(riff_chunk(b"VP8 ", b"\0\0\0\x9d\x01\x2a\x40\0\x30\0" + Random(1).randbytes(500))),
        "webp_frame_flood": webp_canvas(16000, 16000, riff_chunk(b"ANMF", bytes(24)) * 50_000, flags=2),
        "webp_large_and_cut": large[:len(large) // 2] + bytes(len(large) - len(large) // 2),
        "bmp_header": bmp(8, 8), "bmp_half": saved(picture(), "BMP")[:3000], "bmp_huge": bmp(100_000, 100_000),
        "bmp_negative": bmp(-8, 8, body=bytes(192)), "bmp_zero": bmp(0, 0),
        "bmp_run_length": bmp(4000, 4000, 8, 1, b"\x01\x07" * MEGABYTE), "bmp_seven_bits": bmp(8, 8, 7, body=bytes(192)),
        "bmp_offset": bmp(8, 8, offset=2**31, body=bytes(192)),
        "too_large": saved(picture(), "JPEG") + bytes(10 << 20),
    }


@cache
def kinds() -> dict:
    "Hostile and broken uploads by name; each must be refused with a status from 400 to 499"
    return {**not_pictures(), **other_formats(), **broken_jpegs(), **broken_pngs(), **broken_others()}


def text_bombs() -> bytes:
    "Sixty compressed texts of a megabyte each, and a profile"
    text = zlib.compress(bytes(MEGABYTE))
    texts = [chunk(b"zTXt", b"k%d\0\0" % i + text) + chunk(b"iTXt", b"k%d\0\1\0\0\0" % i + text) for i in range(60)]
    return b"".join(texts) + chunk(b"iCCP", b"p\0\0" + text)


def exif_bomb() -> bytes:
    "Five thousand entries that all claim the same sixty kilobytes"
    return tiff([(1 + i, 7, 60_000, 8) for i in range(5000)]).ljust(65_000, b"x")


@cache
def odd_but_good() -> dict:
    "Unusual uploads by name, each of them whole: they must be taken and show `picture` (those named grey or 16_bit without colour)"
    image = picture()
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how the camera stored it: the inverse of what the orientation says
    def stored(orientation): return image if turns[orientation] is None else image.transpose(Image.Transpose(turns[orientation]))
    grey = np.asarray(image.convert("L")).astype(np.uint16)
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(64) < 60, 255, 0).astype(np.uint8)[None].repeat(48, axis=0)))
    photo, plain, other = saved(image, "JPEG", quality=95), saved(image, "PNG"), image.transpose(Image.Transpose.ROTATE_180)
    taken = {
        "jpeg": photo, "jpeg_progressive": saved(image, "JPEG", quality=95, progressive=True),
        "jpeg_444": saved(image, "JPEG", quality=95, subsampling=0),
        "jpeg_cmyk": saved(image.convert("CMYK"), "JPEG", quality=95), "jpeg_grey": saved(image.convert("L"), "JPEG", quality=95),
        "jpeg_with_archive_behind": photo + archive("a.txt", b"hello"), "jpeg_exif_nonsense": with_exif(photo, b"II*\0\xff\xff\xff\xff"),
        "jpeg_exif_bomb": with_exif(photo, exif_bomb()), "jpeg_comments": photo[:2] + segment(0xFE, b"hello") * 500 + photo[2:],
        "mpo": saved(image, "MPO", save_all=True, append_images=[other], quality=95),
        "png": plain, "png_palette": saved(image.quantize(8), "PNG"), "png_16_bit": saved(Image.fromarray(grey * 257), "PNG"),
        "png_grey_alpha": saved(clear.convert("LA"), "PNG"),
        "png_alpha": saved(clear, "PNG"), "png_palette_alpha": saved(clear.quantize(16), "PNG"),
        "png_text_bombs": plain[:33] + text_bombs() + plain[33:],
        "png_animated": saved(image, "PNG", save_all=True, append_images=[other]),
        "png_exif": plain[:33] + chunk(b"eXIf", exif_of(3, ">")) + saved(stored(3), "PNG")[33:],
        "gif": saved(image, "GIF"), "gif_animated": saved(image, "GIF", save_all=True, append_images=[other]),
        "gif_clear": saved(clear, "GIF"),
        "webp": saved(image, "WEBP", quality=95), "webp_lossless": saved(image, "WEBP", lossless=True),
        "webp_alpha": saved(clear, "WEBP", lossless=True),
        "webp_animated": saved(image, "WEBP", lossless=True, save_all=True, append_images=[other]),
        "webp_exif": saved(stored(6), "WEBP", lossless=True, exif=exif_of(6)),
        "bmp": saved(image, "BMP"), "bmp_palette": saved(image.quantize(8), "BMP"),
    }
    return {**taken, **{f"jpeg_exif_{n}": with_exif(saved(stored(n), "JPEG", quality=95), exif_of(n, "<>"[n % 2])) for n in range(1, 9)}}
