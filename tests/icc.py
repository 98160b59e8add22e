"Colour profiles (ICC.1:2022) written by hand, for the tests"
import struct


def fixed(*numbers) -> bytes:
    return struct.pack(f">{len(numbers)}i", *(round(n * 65536) for n in numbers))


def profile(space: bytes, pcs: bytes = b"XYZ ", kind: bytes = b"mntr", **tags) -> bytes:
    tags, place, index, body = {"wtpt": xyz(0.9642, 1, 0.8249), **tags}, 128 + 4 + 12 * (len(tags) + 1), b"", b""
    for name, data in tags.items():
        index += name.encode() + struct.pack(">II", place + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s28x", place + len(body), 0x04300000, kind, space, pcs, b"acsp") + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + index + body


def xyz(*numbers) -> bytes: return b"XYZ " + bytes(4) + fixed(*numbers)


def power(exponent: float) -> bytes: return b"curv" + bytes(4) + struct.pack(">IH", 1, round(exponent * 256))


SRGB_CURVE = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
SRGB_LAMPS = (0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)  # adapted to D50, as profiles have them
P3_LAMPS = (0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)


def lamps(colours, curve: bytes = SRGB_CURVE, **tags) -> bytes:
    return profile(b"RGB ", **{f"{name}XYZ": xyz(*colour) for name, colour in zip("rgb", colours)}, rTRC=curve, gTRC=curve, bTRC=curve, **tags)


def grey(exponent: float) -> bytes: return profile(b"GRAY", kTRC=power(exponent))


def cmyk() -> bytes:
    "A printer whose inks all print one grey (L 50): what Pillow's plain formula could never give"
    straight = bytes(range(256))
    table = b"".join(bytes([round(255 * (100 - 50 * min(1, sum(map(int, f"{i:04b}")))) / 100), 128, 128]) for i in range(16))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + straight * 4 + table + straight * 3
    return profile(b"CMYK", b"Lab ", b"prtr", A2B0=lut, A2B1=lut)


def endless(steps: int) -> bytes:
    "A profile in which every colour goes through `steps` matrices"
    matrix = b"matf" + bytes(4) + struct.pack(">HH12f", 3, 3, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
    chain = b"mpet" + bytes(4) + struct.pack(">HHI", 3, 3, steps) + struct.pack(">II", 16 + 8 * steps, len(matrix)) * steps + matrix
    return lamps(P3_LAMPS, D2B1=chain)


SRGB, DISPLAY_P3 = lamps(SRGB_LAMPS), lamps(P3_LAMPS)
