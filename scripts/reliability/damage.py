"""Damaged videos of the corpus, and files that are no videos: what a player shows of them is read, or they are refused."""

import os
import struct
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

from .corpus import Maker, picture
from .encodings import GOOD, VP9, X264

SOURCES = [
    *("h264.mp4", "h264-faststart.mp4", "h264-fragments.mp4", "h264.mkv", "h264.ts", "h264.flv", "h265.mp4", "av1.mp4"),
    *("vp8.webm", "vp9.webm", "mpeg2.mpg", "mpeg4.avi", "wmv2.wmv", "theora.ogv", "mjpeg.avi", "prores.mov", "ffv1.mkv"),
    *("transparent.gif", "qtrle.mov", "animation.png"),
]
PLACES = (0.05, 0.3, 0.6, 0.9, 0.99)  # parts of a file at which it is truncated
FLIPS = 5  # files of a format with a flipped bit


def make(maker: Maker) -> None:
    """Make all of them."""
    for part in (truncated, flipped, header_lies, huge, changing, packets, no_videos):
        part(maker)
        maker.run()


def truncated(maker: Maker) -> None:
    """Ends cut away, as by a download that broke off."""
    for source in SOURCES:
        data = maker.data(f"codecs/{source}")
        for part in PLACES:
            stem, ending = source.rsplit(".", 1)
            maker.write(f"truncated/{stem}-{part}.{ending}", "truncated", data[: int(len(data) * part)], **_shown(source))


def flipped(maker: Maker) -> None:
    """One bit flipped, at places drawn from a seed."""
    rng = np.random.default_rng(0)
    for source in SOURCES:
        data = maker.data(f"codecs/{source}")
        stem, ending = source.rsplit(".", 1)
        for number in range(FLIPS):
            changed = bytearray(data)
            changed[rng.integers(100, len(data))] ^= 1 << int(rng.integers(8))
            maker.write(f"flipped/{stem}-{number}.{ending}", "a bit flipped", bytes(changed), **_shown(source))
        changed = bytearray(data)
        for place in rng.integers(100, len(data), 20):
            changed[place] ^= 1 << int(rng.integers(8))
        maker.write(f"flipped/{stem}-many.{ending}", "20 bits flipped", bytes(changed), **_shown(source))


def _shown(source: str) -> dict:
    return {"whole": False, "alpha": source in ("transparent.gif", "animation.png")}


def box(data: bytes, name: bytes) -> int:
    """Return where the contents of the first MP4 box of a name begin, behind its size and name."""
    return data.index(name) + 4


def put(data: bytes, place: int, form: str, *values: int) -> bytes:
    """Return data with numbers in place of those at `place`."""
    new = struct.pack(form, *values)
    return data[:place] + new + data[place + len(new) :]


def header_lies(maker: Maker) -> None:
    """Counts, sizes, times and places that are not true."""
    mp4, kind = maker.data("codecs/h264.mp4"), "header that lies"
    stsz, stts, stco, mdhd, tkhd = (box(mp4, name) for name in (b"stsz", b"stts", b"stco", b"mdhd", b"tkhd"))
    elst, avc1, ctts, mvhd, stsc = (box(mp4, name) for name in (b"elst", b"avc1", b"ctts", b"mvhd", b"stsc"))
    lies: dict[str, Callable[[], bytes]] = {
        "samples-2-billion": lambda: put(mp4, stsz + 4, ">II", 1, 0x7FFFFFFF),
        "samples-100-million": lambda: put(put(mp4, stsz + 4, ">II", 1, 100_000_000), stts + 8, ">I", 100_000_000),
        "samples-fewer": lambda: put(mp4, stsz + 8, ">I", 12),
        "samples-more": lambda: put(mp4, stsz + 8, ">I", 25),
        "sample-size-zero": lambda: put(mp4, stsz + 12, ">III", 0, 0, 0),
        "sample-size-2-gigabytes": lambda: put(mp4, stsz + 12 + 20, ">I", 0x7FFFFFFF),
        "times-count": lambda: put(mp4, stts + 8, ">I", 0x7FFFFFFF),
        "times-fewer": lambda: put(mp4, stts + 8, ">I", 10),
        "times-entries": lambda: put(mp4, stts + 4, ">I", 0x0FFFFFFF),
        "times-all-equal": lambda: put(mp4, stts + 12, ">I", 0),
        "times-huge": lambda: put(mp4, stts + 12, ">I", 0x7FFFFFFF),
        "times-negative": lambda: put(mp4, stts + 12, ">i", -512),
        "offsets-count": lambda: put(mp4, stco + 4, ">I", 0x3FFFFFFF),
        "offsets-behind-end": lambda: put(mp4, stco + 8, ">I", 0x7FFFFFFF),
        "offsets-zero": lambda: put(mp4, stco + 8, ">I", 0),
        "chunks-entries": lambda: put(mp4, stsc + 4, ">I", 0x0FFFFFFF),
        "chunks-samples": lambda: put(mp4, stsc + 12, ">I", 0x7FFFFFFF),
        "order-entries": lambda: put(mp4, ctts + 4, ">I", 0x0FFFFFFF),
        "order-back": lambda: put(mp4, ctts + 12, ">i", 20_000),
        "order-negative": lambda: put(mp4, ctts + 12, ">i", -20_000),
        "duration-long": lambda: put(mp4, mdhd + 16, ">I", 0x7FFFFFFF),
        "duration-zero": lambda: put(mp4, mdhd + 16, ">I", 0),
        "timescale-zero": lambda: put(mp4, mdhd + 12, ">I", 0),
        "timescale-one": lambda: put(mp4, mdhd + 12, ">I", 1),
        "timescale-huge": lambda: put(mp4, mdhd + 12, ">I", 0xFFFFFFFF),
        "film-timescale-zero": lambda: put(mp4, mvhd + 12, ">I", 0),
        "track-20000": lambda: put(mp4, tkhd + 76, ">II", 20_000 << 16, 20_000 << 16),
        "entry-20000": lambda: put(mp4, avc1 + 24, ">HH", 20_000, 20_000),
        "entry-zero": lambda: put(mp4, avc1 + 24, ">HH", 0, 0),
        "matrix-zero": lambda: put(mp4, tkhd + 40, ">9i", *[0] * 9),
        "matrix-shear": lambda: put(mp4, tkhd + 40, ">9i", 1 << 16, 1 << 15, 0, 0, 1 << 16, 0, 0, 0, 1 << 30),
        "matrix-wild": lambda: put(mp4, tkhd + 40, ">9i", *[0x7FFFFFFF] * 9),
        "edit-behind-end": lambda: put(mp4, elst + 12, ">i", 10_000_000),
        "edit-empty": lambda: put(mp4, elst + 8, ">I", 0),
        "edit-nothing": lambda: put(mp4, elst + 12, ">i", -1),
        "edit-count": lambda: put(mp4, elst + 4, ">I", 0x0FFFFFFF),
        "edit-still": lambda: put(mp4, elst + 16, ">I", 0),
        "edit-fast": lambda: put(mp4, elst + 16, ">I", 2 << 16),
        "codec-unknown": lambda: mp4.replace(b"avc1", b"xyz1"),
        "codec-other": lambda: mp4.replace(b"avc1", b"hvc1").replace(b"avcC", b"hvcC"),
        "codec-data-none": lambda: mp4.replace(b"avcC", b"free"),
        "data-elsewhere": lambda: put(mp4, box(mp4, b"url "), ">I", 0),
        "box-endless": lambda: put(mp4, mp4.index(b"moov") - 4, ">I", 0x7FFFFFFF),
        "box-zero": lambda: put(mp4, mp4.index(b"trak") - 4, ">I", 0),
        "box-tiny": lambda: put(mp4, mp4.index(b"stbl") - 4, ">I", 3),
    }
    for name, lie in lies.items():
        maker.write(f"lies/{name}.mp4", kind, lie(), whole=False)
    moov = struct.pack(">I4s", 0, b"moov") * 20_000
    nested = b"".join(struct.pack(">I4s", 8 * (20_000 - k), b"moov") for k in range(20_000))
    head = mp4[: mp4.index(b"ftyp") - 4 + struct.unpack(">I", mp4[:4])[0]]
    boxes = {"nested": head + nested, "nested-zero": head + moov, "only-type": head, "no-media": _without(mp4, b"mdat")}
    for name, data in boxes.items():
        maker.write(f"lies/{name}.mp4", kind, data, whole=False)
    fragments = maker.data("codecs/h264-fragments.mp4")
    trun = box(fragments, b"trun")
    maker.write("lies/fragment-samples.mp4", kind, put(fragments, trun + 4, ">I", 0x0FFFFFFF), whole=False)
    maker.write("lies/fragment-offset.mp4", kind, put(fragments, trun + 8, ">I", 0x7FFFFFFF), whole=False)

    avi = maker.data("codecs/mpeg4.avi")
    strh, avih = avi.index(b"strh") + 8, avi.index(b"avih") + 8
    for name, data in {
        "frames-billion": put(put(avi, strh + 32, "<I", 10**9), avih + 16, "<I", 10**9),
        "frames-zero": put(put(avi, strh + 32, "<I", 0), avih + 16, "<I", 0),
        "rate-zero": put(avi, strh + 20, "<II", 0, 0),
        "rate-huge": put(avi, strh + 20, "<II", 1, 0xFFFFFFFF),
        "no-index": avi[: avi.index(b"idx1")],
        "index-zeros": avi[: avi.index(b"idx1") + 8] + bytes(len(avi) - avi.index(b"idx1") - 8),
    }.items():
        maker.write(f"lies/{name}.avi", kind, data, whole=False)
    mkv = maker.data("codecs/h264.mkv")
    clusters = [i for i in range(len(mkv)) if mkv.startswith(b"\x1f\x43\xb6\x75", i)]
    duration = mkv.index(b"\x44\x89")  # the segment's duration: a float behind its length
    for name, data in {
        "duration": mkv[: duration + 3] + struct.pack(">d", 1e12) + mkv[duration + 11 :],
        "size": mkv[: clusters[0] + 4] + b"\x01\x00\xff\xff\xff\xff\xff\xff" + mkv[clusters[0] + 12 :],
        "unknown-element": mkv[: clusters[0]] + b"\xbf\x84abcd" + mkv[clusters[0] :],
        "garbage-inside": mkv[: clusters[0]] + bytes(range(256)) * 8 + mkv[clusters[0] :],
    }.items():
        maker.write(f"lies/{name}.mkv", kind, data, whole=False)
    gif = maker.data("codecs/transparent.gif")
    maker.write("lies/no-end.gif", kind, gif[:-1], whole=False, alpha=True)
    maker.write("lies/garbage-behind.gif", "garbage behind the end", gif + bytes(range(256)) * 4, whole=False, alpha=True)
    maker.write("lies/garbage-behind.mp4", "garbage behind the end", mp4 + bytes(range(256)) * 4, whole=False)
    maker.write("lies/garbage-before.ts", "garbage before the start", bytes(1000) + maker.data("codecs/h264.ts"), whole=False)


def _without(data: bytes, name: bytes) -> bytes:
    start = data.index(name) - 4
    return data[:start] + data[start + struct.unpack(">I", data[start : start + 4])[0] :]


def huge(maker: Maker) -> None:
    """Headers that state 16,000 to 20,000 pixels a side: a reader must not reserve memory for them unasked."""
    kind, side = "20,000 pixels a side", 20_000
    large = picture(2, 260, 300)
    for name, options in {
        ".large.mkv": "-c:v ffv1",
        ".raw.mkv": "-c:v rawvideo -pix_fmt yuv420p -allow_raw_vfw 1",
        ".raw.avi": "-c:v rawvideo -pix_fmt bgr24",
    }.items():
        maker.encode(f"huge/{name}", kind, options, pixels=large)
        maker.cases.pop()  # ingredients
    maker.run()
    gif = maker.data("codecs/transparent.gif")
    maker.write("huge/screen.gif", kind, put(gif, 6, "<HH", side, side), whole=False, alpha=True)
    maker.write("huge/screen.mp4", kind, put(gif, 6, "<HH", side, side), whole=False, alpha=True)
    for source in ("vp8.webm", "vp8.mkv"):
        data = maker.data(f"codecs/{source}")
        maker.write(f"huge/{source}", kind, put(data, data.index(b"\x9d\x01\x2a") + 3, "<HH", 16_383, 16_383), whole=False)
    data = bytearray(maker.data("codecs/mjpeg.avi"))
    place = -1
    while (place := data.find(b"\xff\xc0\x00\x11\x08", place + 1)) >= 0:
        data[place + 5 : place + 9] = struct.pack(">HH", side, side)
    maker.write("huge/mjpeg.avi", kind, bytes(data), whole=False)
    for source in ("png.mov", "animation.png"):
        data = maker.data(f"codecs/{source}")
        while (place := data.find(b"IHDR" + struct.pack(">II", 96, 64))) >= 0:
            header = b"IHDR" + struct.pack(">II", side, side) + data[place + 12 : place + 17]
            data = data[:place] + header + struct.pack(">I", zlib.crc32(header)) + data[place + 21 :]
        maker.write(f"huge/{source}", kind, data, whole=False, alpha=source != "png.mov")
    for source in (".large.mkv", ".raw.mkv"):
        data = maker.data(f"huge/{source}")
        for tag, old in ((b"\xb0\x82", 300), (b"\xba\x82", 260)):
            data = data.replace(tag + struct.pack(">H", old), tag + struct.pack(">H", side))
        maker.write(f"huge/{source[1:]}", kind, data, whole=False)
    data = maker.data("huge/.raw.avi")
    maker.write("huge/raw.avi", kind, put(data, data.index(b"strf") + 12, "<ii", side, side), whole=False)
    stream = maker.data("codecs/h264.h264")
    start = stream.index(b"\x00\x00\x00\x01\x67")
    end = stream.index(b"\x00\x00\x00\x01", start + 4)
    for width, height in ((1250, 1250), (1250, 4)):
        name, forged = f"huge/h264-{width * 16}x{height * 16}", stream[:start] + _parameters(width, height) + stream[end:]
        maker.write(f"{name}.h264", kind, forged, whole=False)
        maker.copy(f"{name}.h264", f"{name}.mp4", kind, before="-f h264", whole=False)
        maker.copy(f"{name}.h264", f"{name}.mkv", kind, "-c copy -bsf:v setts=ts=N*40", before="-f h264", whole=False)


def _parameters(columns: int, rows: int) -> bytes:
    """Return an H.264 sequence parameter set of a picture of so many macroblocks (ITU-T H.264, 7.3.2.1.1)."""

    def code(value: int) -> str:  # ue(v), 9.1
        return "0" * ((value + 1).bit_length() - 1) + f"{value + 1:b}"

    bits = f"{100:08b}{0:08b}{62:08b}" + code(0) + code(1) + code(0) + code(0) + "00"  # high profile, 4:2:0, 8 bits
    bits += code(0) + code(2) + code(1) + "0" + code(columns - 1) + code(rows - 1) + "1100" + "1"
    bits += "0" * (-len(bits) % 8)
    payload = int(bits, 2).to_bytes(len(bits) // 8, "big")
    for zeros in (b"\x00\x00\x00", b"\x00\x00\x01", b"\x00\x00\x02", b"\x00\x00\x03"):
        payload = payload.replace(zeros, zeros[:2] + b"\x03" + zeros[2:])
    return b"\x00\x00\x00\x01\x67" + payload


def changing(maker: Maker) -> None:
    """Sizes, shapes, formats and clocks that change within one stream."""
    x264 = f"{X264} -pix_fmt yuv420p -bf 0 -f h264"
    pieces = {
        "small": (f"{x264}", picture(12)),
        "large": (f"{x264}", picture(12, 96, 128)),
        "full": (f"{x264} -vf scale=out_range=pc,format=yuv420p,setparams=range=pc", picture(12)),
        "chroma": (f"{X264} -bf 0 -pix_fmt yuv444p -f h264", picture(12)),
        "deep": (f"{X264} -bf 0 -pix_fmt yuv420p10le -f h264", picture(12)),
        "oblong": (f"{x264} -vf setsar=2", picture(12)),
    }
    for name, (options, pixels) in pieces.items():
        maker.encode(f"changing/.{name}.h264", "", options, pixels=pixels)
    for name, pixels in (("small", picture(12)), ("large", picture(12, 96, 128))):
        maker.encode(f"changing/.{name}.ts", "", f"{X264} -pix_fmt yuv420p", pixels=pixels)
        maker.encode(f"changing/.{name}.mpg", "", f"-c:v mpeg2video {GOOD} -f mpeg2video", pixels=pixels)
        maker.encode(f"changing/.{name}.ivf", "", f"{VP9} -pix_fmt yuv420p", pixels=pixels)
        maker.encode(f"changing/.{name}.mjpeg", "", f"-c:v mjpeg {GOOD}", pixels=pixels)
        maker.encode(f"changing/.{name}.obu", "", "-c:v libaom-av1 -cpu-used 8 -g 10 -pix_fmt yuv420p", pixels=pixels)
    del maker.cases[-(len(pieces) + 10) :]  # ingredients
    maker.run()
    for second in ("large", "full", "chroma", "deep", "oblong"):
        kind = "size that changes" if second in ("large", "oblong") else "format that changes"
        joined = maker.data("changing/.small.h264") + maker.data(f"changing/.{second}.h264")
        maker.write(f"changing/{second}.h264", kind, joined, whole=False)
        maker.copy(f"changing/{second}.h264", f"changing/{second}.mp4", kind, before="-f h264", whole=False)
        maker.copy(
            f"changing/{second}.h264", f"changing/{second}.ts", kind, "-c copy -bsf:v setts=ts=N*3600", "-f h264", whole=False
        )
        back = maker.data(f"changing/.{second}.h264") + maker.data("changing/.small.h264")
        maker.write(f"changing/{second}-first.h264", kind, back, whole=False)
    for ending, container in (("mpg", "mpg"), ("mjpeg", "avi"), ("obu", "mp4")):
        joined = maker.data(f"changing/.small.{ending}") + maker.data(f"changing/.large.{ending}")
        maker.write(f"changing/joined.{ending}", "size that changes", joined, whole=False)
        if ending != "mpg":
            maker.copy(f"changing/joined.{ending}", f"changing/joined-{ending}.{container}", "size that changes", whole=False)
    ivf = maker.data("changing/.small.ivf") + maker.data("changing/.large.ivf")[32:]
    maker.write("changing/joined.ivf", "size that changes", ivf, whole=False)
    maker.copy("changing/joined.ivf", "changing/joined.webm", "size that changes", "-c copy -bsf:v setts=ts=N", whole=False)
    for names, kind in ((("small", "small"), "times that go back"), (("small", "large"), "size that changes")):
        joined = b"".join(maker.data(f"changing/.{name}.ts") for name in names)
        maker.write(f"changing/{'-'.join(names)}.ts", kind, joined, whole=False)
    for name, times in {"back": "if(eq(N\\,12)\\,0\\,PTS)", "doubled": "floor(PTS/2000)*2000"}.items():
        for ending in ("mp4", "mkv", "ts", "avi"):
            source = "codecs/mpeg4.avi" if ending == "avi" else "codecs/h264.3gp"
            options = f"-c copy -bsf:v setts=pts='{times}':dts=DTS -max_interleave_delta 0"
            file = f"changing/times-{name}.{ending}"
            maker.copy(source, file, "times that go back", options, whole=False, optional=True)


def packets(maker: Maker) -> None:
    """Packets lost or spoilt, streams that begin between key frames, encrypted samples."""
    noises = {
        "first-lost": "drop='lt(n\\,3)'",
        "some-lost": "drop='eq(mod(n\\,7)\\,3)'",
        "last-lost": "drop='gt(n\\,20)'",
        "spoilt": "amount=-1000",
    }
    sources = "h264.mp4 h264.mkv h264.ts h265.mp4 vp8.webm vp9.webm av1.mp4 mpeg2.mpg mpeg4.avi xvid-packed.avi"
    for source in sources.split():
        stem, ending = source.rsplit(".", 1)
        for name, noise in noises.items():
            kind = "packets spoilt" if name == "spoilt" else "packets lost"
            file, options = f"packets/{stem}-{name}.{ending}", f"-c copy -bsf:v noise={noise}"
            origin = "h264.mp4" if ending == "ts" else source  # this bitstream filter between two .ts kills some ffmpegs
            maker.copy(f"codecs/{origin}", file, kind, options, "-copyts", whole=False, optional=True)
    data = maker.data("codecs/h264.ts")
    for every in (5, 20):
        kept = b"".join(data[i : i + 188] for i in range(0, len(data), 188) if i // 188 % every != every - 1)
        maker.write(f"packets/every-{every}-lost.ts", "packets lost", kept, whole=False)
    key = f"-encryption_scheme cenc-aes-ctr -encryption_key {'76' * 16} -encryption_kid {'a7' * 16}"
    maker.copy("codecs/h264.mp4", "packets/encrypted.mp4", "encrypted", f"-c copy {key}", whole=False)


def no_videos(maker: Maker) -> None:
    """Files that are no videos, whatever their names say."""
    kind = "no video"
    h264 = maker.folder / "codecs/h264.mp4"
    rng = np.random.default_rng(1)
    playlist = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    texts = {
        "playlist.mp4": playlist.format(maker.folder / "codecs/h264.ts"),
        "playlist.m3u8": playlist.format("../codecs/h264.ts"),
        "playlist-file.mp4": playlist.format(f"file://{h264}"),
        "playlist-remote.mp4": playlist.format("http://127.0.0.1:9/x.ts"),
        "playlist-data.mp4": playlist.format("data:video/mp4;base64,AAAA"),
        "concat.mp4": f"ffconcat version 1.0\nfile '{h264}'\n",
        "concat-near.mp4": "ffconcat version 1.0\nfile ../codecs/h264.mp4\n",
        "concat-passwd.mp4": "ffconcat version 1.0\nfile /etc/passwd\n",
        "session.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        "manifest.mp4": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f'<Representation id="0"><BaseURL>{h264}</BaseURL></Representation></AdaptationSet></Period></MPD>',
        "text.mp4": "no video at all\n" * 100,
        "page.mp4": "<!doctype html><html><body>404</body></html>",
        "subtitles.mp4": "1\n00:00:00,000 --> 00:00:02,000\nwords\n",
        "subtitles.webm": "WEBVTT\n\n00:00.000 --> 00:02.000\nwords\n",
        "pointer.mp4": "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234\n",
        "metadata.mp4": ";FFMETADATA1\ntitle=x\n",
    }  # fmt: skip
    for name, text in texts.items():
        lists = name.startswith(("playlist", "concat", "manifest", "session"))
        maker.write(f"none/{name}", "playlist" if lists else kind, text.encode(), whole=False)
    for ending in ("mp4", "mkv", "webm", "avi", "mov", "gif", "ts", "png"):
        maker.write(f"none/empty.{ending}", kind, b"", whole=False)
    maker.write("none/zeros.mp4", kind, bytes(100_000), whole=False)
    maker.write("none/noise.mp4", kind, rng.bytes(100_000), whole=False)
    maker.write("none/noise.ts", kind, b"".join(b"\x47" + rng.bytes(187) for _ in range(500)), whole=False)
    maker.write("none/noise.mpg", kind, b"".join(b"\x00\x00\x01" + rng.bytes(187) for _ in range(500)), whole=False)
    maker.write("none/noise.h264", kind, b"".join(b"\x00\x00\x00\x01" + rng.bytes(187) for _ in range(500)), whole=False)
    with zipfile.ZipFile(maker.path("none/archive.mp4"), "w") as archive:
        archive.writestr("x.mp4", maker.data("codecs/h264.mp4"))
    maker.add("none/archive.mp4", kind, whole=False)
    tone = "-f lavfi -t 1 -i sine=r=16000"
    sounds = {
        "sound.m4a": "-c:a aac -f mp4",
        "sound.mp4": "-c:a aac",
        "sound.mkv": "-c:a libopus",
        "sound.webm": "-c:a libopus",
        "sound.ogv": "-c:a libvorbis",
        "wave.mp4": "-c:a pcm_s16le -f wav",
        "mp3.mp4": "-c:a libmp3lame -f mp3",
    }
    for file, options in sounds.items():
        maker.encode(f"none/{file}", "sound alone", f"-map 1 {options}", inputs=tone, whole=False)
    cover = f"{tone} -i {maker.folder / 'streams/.cover.png'}"
    for file, options in {"cover.m4a": "-c:a aac -f mp4", "cover.mp4": "-c:a aac", "cover.mp3": "-c:a libmp3lame"}.items():
        words = f"-map 1 -map 2 {options} -c:v png -disposition:v attached_pic"
        maker.encode(f"none/{file}", "sound alone", words, inputs=cover, whole=False)
    words = f"-map 1 -c:a libopus -attach {maker.folder / 'streams/.cover.png'} -metadata:s:t mimetype=image/png"
    maker.encode("none/cover.mkv", "sound alone", words, inputs=tone, whole=False)
    maker.copy("streams/subtitles.mkv", "none/subtitles.mkv", kind, "-map 0:s -c copy", whole=False)
    maker.path("none/folder.mp4/x").parent.mkdir(exist_ok=True)
    os.symlink("nowhere.mp4", maker.path("none/dangling.mp4"))
    os.symlink("loop.mp4", maker.path("none/loop.mp4"))
    os.mkfifo(maker.path("none/pipe.mp4"))
    for name in ("folder", "dangling", "loop", "pipe"):
        maker.add(f"none/{name}.mp4", kind, whole=False)
    maker.write("none/picture.mp4", "picture named as a video", maker.data("streams/.cover.png"), whole=False)
