"""Pictures of the corpus, with the pixels that they show: every mode, turn and depth, and damaged ones."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from .corpus import Maker, picture

TURNS = {  # by EXIF orientation: what a viewer does with the stored rows
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def make(maker: Maker) -> None:
    """Make all of them."""
    rgb, rgba = picture(1)[0], picture(1, alpha=True)[0]
    grey = rgb.astype(float).mean(axis=2).round().astype(np.uint8)
    grey16 = np.linspace(0, 65535, rgb.shape[0] * rgb.shape[1]).reshape(rgb.shape[:2]).round().astype(np.uint16)
    rgb16 = rgb.astype(np.uint16) * 257
    palette = Image.fromarray(rgb).quantize(64)
    pattern = grey > 120

    def add(name: str, kind: str, data: bytes, shown: np.ndarray, tolerance: int = 1) -> None:
        maker.write(f"pictures/{name}", kind, data, tolerance=tolerance)
        shown = shown if shown.ndim == 3 else np.repeat(shown[..., None], 3, axis=2)
        reference = maker.path(f"reference/{name}.npy")
        np.save(reference, shown.astype(np.uint8)[None])

    add("rgb.png", "picture: RGB", saved(Image.fromarray(rgb), "png"), rgb, 0)
    add("grey.png", "picture: grey", saved(Image.fromarray(grey), "png"), grey, 0)
    add("grey16.png", "picture: 16 bits", png(grey16, 0), np.round(grey16 / 257))
    add("rgb16.png", "picture: 16 bits", png(rgb16, 2), rgb)
    add("rgba16.png", "picture: 16 bits", png(rgba.astype(np.uint16) * 257, 6), on_white(rgba))
    add(
        "grey-alpha16.png",
        "picture: 16 bits",
        png(np.stack([grey, rgba[..., 3]], -1).astype(np.uint16) * 257, 4),
        on_white(np.dstack([grey, rgba[..., 3]])),
    )
    add("one-bit.png", "picture: 1 bit", saved(Image.fromarray(pattern), "png"), pattern * 255, 0)
    for depth in (2, 4):
        levels = grey // (256 >> depth)
        add(f"grey-{depth}-bits.png", "picture: 2 and 4 bits", png(levels, 0, depth), levels * (255 // ((1 << depth) - 1)), 0)
    add("rgba.png", "picture: transparent", saved(Image.fromarray(rgba), "png"), on_white(rgba))
    add("rgba.webp", "picture: transparent", saved(Image.fromarray(rgba), "webp", lossless=True, exact=True), on_white(rgba))
    grey_alpha = np.stack([grey, rgba[..., 3]], axis=-1)
    add("grey-alpha.png", "picture: transparent", saved(Image.fromarray(grey_alpha, "LA"), "png"), on_white(grey_alpha))
    colours = np.array(palette.convert("RGB"))
    add("palette.png", "picture: palette", saved(palette, "png"), colours, 0)
    clear = np.array(palette) == 5
    add(
        "palette-clear.png", "picture: palette", saved(palette, "png", transparency=5), np.where(clear[..., None], 255, colours)
    )
    opacities = bytes(np.linspace(0, 255, 64).astype(np.uint8))
    seen = np.dstack([colours, np.frombuffer(opacities, np.uint8)[np.array(palette)]])
    add("palette-opacities.png", "picture: palette", saved(palette, "png", transparency=opacities), on_white(seen))
    red = tuple(int(v) for v in rgb[10, 10])
    keyed = np.where((rgb == red).all(axis=2)[..., None], 255, rgb)
    add("rgb-clear-colour.png", "picture: transparent", saved(Image.fromarray(rgb), "png", transparency=red), keyed, 0)
    level = int(grey[10, 10])
    add(
        "grey-clear-level.png",
        "picture: transparent",
        saved(Image.fromarray(grey), "png", transparency=level),
        np.where(grey == level, 255, grey),
        0,
    )
    add("interlaced.png", "picture: RGB", maker_interlaced(maker, rgb), rgb, 0)
    smooth = {"quality": 100, "subsampling": 0}
    add("rgb.jpg", "picture: JPEG", saved(Image.fromarray(rgb), "jpeg", **smooth), rgb, 4)
    add("420.jpg", "picture: JPEG", saved(Image.fromarray(rgb), "jpeg", quality=100), rgb, 16)
    add("progressive.jpeg", "picture: JPEG", saved(Image.fromarray(rgb), "jpeg", progressive=True, **smooth), rgb, 4)
    add("grey.jpg", "picture: JPEG", saved(Image.fromarray(grey), "jpeg", quality=100), grey, 2)
    cmyk = Image.fromarray(rgb).convert("CMYK")
    add("cmyk.jpg", "picture: CMYK", saved(cmyk, "jpeg", **smooth), rgb, 6)
    add("lossless.webp", "picture: WebP", saved(Image.fromarray(rgb), "webp", lossless=True), rgb, 0)
    add("lossy.webp", "picture: WebP", saved(Image.fromarray(rgb), "webp", quality=100), rgb, 16)
    add("upper.PNG", "picture: RGB", saved(Image.fromarray(rgb), "png"), rgb, 0)
    add("jpeg-named.png", "picture: ending that lies", saved(Image.fromarray(rgb), "jpeg", **smooth), rgb, 4)
    for turn, shown in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = turn
        for name, kind, options, tolerance in (
            ("jpg", "jpeg", smooth, 4),
            ("png", "png", {}, 0),
            ("webp", "webp", {"lossless": True}, 0),
        ):
            add(
                f"turn-{turn}.{name}",
                "picture: EXIF turn",
                saved(Image.fromarray(rgb), kind, exif=exif, **options),
                shown(rgb),
                tolerance,
            )
    exif = Image.Exif()
    exif[0x0112] = 6
    add("turn-6-alpha.png", "picture: EXIF turn", saved(Image.fromarray(rgba), "png", exif=exif), TURNS[6](on_white(rgba)))
    for height, width in ((1, 1), (1, 50), (50, 1), (17, 23)):
        small = picture(1, height, width)[0]
        add(f"{width}x{height}.png", "picture: odd sizes", saved(Image.fromarray(small), "png"), small, 0)
    for name in ("rgb.png", "rgba16.png", "rgb.jpg", "progressive.jpeg", "lossless.webp", "lossy.webp", "palette.png"):
        data = maker.data(f"pictures/{name}")
        for part in (0.1, 0.5, 0.95):
            maker.write(f"pictures/cut-{part}-{name}", "picture: truncated", data[: int(len(data) * part)], whole=False)
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT" + zlib.compress(bytes(1000))) + chunk(b"IEND")
    maker.write("pictures/20000.png", "20,000 pixels a side", bomb, whole=False)
    jpeg = maker.data("pictures/rgb.jpg")
    place = jpeg.index(b"\xff\xc0") + 5
    maker.write(
        "pictures/20000.jpg",
        "20,000 pixels a side",
        jpeg[:place] + struct.pack(">HH", 20_000, 20_000) + jpeg[place + 4 :],
        whole=False,
    )
    for name, data in {"text.png": b"no picture\n" * 20, "text.jpg": b"no picture\n" * 20, "zeros.webp": bytes(1000)}.items():
        maker.write(f"pictures/{name}", "picture: none", data, whole=False)
    frames = [Image.fromarray(f) for f in picture(5)]
    for name, kind, options in (("moving.webp", "webp", {"lossless": True}), ("moving.png", "png", {})):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=40, loop=0, **options)
        maker.write(f"pictures/{name}", "animated picture", data)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    """Return an image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def on_white(pixels: np.ndarray) -> np.ndarray:
    """Return (H, W, channels and alpha) as it is seen on white."""
    colour, alpha = pixels[..., :-1].astype(float), pixels[..., -1:] / 255
    seen = (colour * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return seen if seen.shape[2] == 3 else np.repeat(seen, 3, axis=2)


def chunk(content: bytes) -> bytes:
    """Return a chunk of a PNG: length, name and data, checksum."""
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))


def png(samples: np.ndarray, colour: int, depth: int | None = None) -> bytes:
    """Return a PNG of samples (H, W) or (H, W, C) of a colour type, 16 bits deep where they are uint16."""
    depth = depth or (16 if samples.dtype == np.uint16 else 8)
    height, width = samples.shape[:2]
    if depth < 8:
        bits = ((samples[..., None] >> np.arange(depth)[::-1]) & 1).reshape(height, -1)
        rows = np.packbits(bits.astype(np.uint8), axis=1)
    else:
        rows = samples.astype(">u2" if depth == 16 else np.uint8).reshape(height, -1).view(np.uint8)
    lines = b"".join(b"\x00" + row.tobytes() for row in rows)
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(header) + chunk(b"IDAT" + zlib.compress(lines)) + chunk(b"IEND")


def maker_interlaced(maker: Maker, pixels: np.ndarray) -> bytes:
    """Return an interlaced (Adam7) PNG; PIL writes none, ffmpeg does."""
    size = f"{pixels.shape[1]}x{pixels.shape[0]}"
    words = f"-f rawvideo -pix_fmt rgb24 -s {size} -i - -c:v png -flags +ilme -frames:v 1 -update 1".split()
    maker.call([*words, str(maker.path("reference/.interlaced.png"))], pixels.tobytes())
    return maker.data("reference/.interlaced.png")
