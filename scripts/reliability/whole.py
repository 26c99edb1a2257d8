"""Whole videos of the corpus: sizes, times, geometry, colours, streams, cuts and names that people's files have."""

import os
import shutil
import unicodedata

import numpy as np

from .corpus import FRAMES, RATE, Maker, picture
from .encodings import AV1, GOOD, VP9, X264, X265

MATRICES = {  # by the name that -colorspace takes: what `scale` calls it
    "bt709": "bt709",
    "smpte170m": "smpte170m",
    "bt470bg": "bt470",
    "smpte240m": "smpte240m",
    "fcc": "fcc",
    "bt2020nc": "bt2020",
}


def make(maker: Maker) -> None:
    """Make all of them."""
    for part in (sizes, interlaced, colours, high_dynamic_range, aspects, times, streams):
        part(maker)
    maker.run()
    for part in (turned, cuts, names):
        part(maker)


def sizes(maker: Maker) -> None:
    """Small, narrow and odd sizes, and those that decord fails on."""
    for width in (2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 30, 34, 48, 66, 72):
        maker.encode(f"sizes/h264-{width}.mp4", "small widths", f"{X264} -pix_fmt yuv420p", pixels=picture(8, 32, width))
    for height, width in ((31, 17), (63, 95), (33, 66), (64, 97), (9, 7), (3, 5), (1, 1), (2, 1)):
        name, pixels = f"{width}x{height}", picture(8, height, width)
        maker.encode(f"sizes/h264-{name}.mp4", "odd sizes", f"{X264} -pix_fmt yuv444p", pixels=pixels)
        maker.encode(f"sizes/vp9-{name}.webm", "odd sizes", f"{VP9} -pix_fmt yuv420p", pixels=pixels)
        maker.encode(f"sizes/ffv1-{name}.mkv", "odd sizes", "-c:v ffv1 -pix_fmt yuv420p", pixels=pixels)
        maker.encode(f"sizes/gif-{name}.gif", "odd sizes", "", pixels=pixels)
    for width in (16, 17, 24, 48):
        maker.encode(f"sizes/av1-{width}.mp4", "odd sizes", f"{AV1} -pix_fmt yuv420p", pixels=picture(8, 18, width))
        maker.encode(f"sizes/mjpeg-{width}.avi", "odd sizes", f"-c:v mjpeg {GOOD}", pixels=picture(8, 18, width))
    maker.encode("sizes/tall.mp4", "large", f"{X264} -pix_fmt yuv420p", pixels=picture(3, 2160, 32), matrix="bt709")
    maker.encode("sizes/wide.mp4", "large", f"{X264} -pix_fmt yuv420p", pixels=picture(3, 32, 4096), matrix="bt709")


def interlaced(maker: Maker) -> None:
    """Fields of two moments woven into one frame, flagged so, in either order."""
    pixels = picture(2 * FRAMES)
    for order, weave in (("tff", "interleave_top"), ("bff", "interleave_bottom")):
        case = {"pixels": pixels, "rate": 2 * RATE, "deinterlace": True, "tolerance": 24}  # the first frame has no neighbour
        first = "-vf tinterlace=" + weave + f",setfield={order},fps={RATE} -flags +ildct+ilme"
        for file, options in {
            f"mpeg2-{order}.mpg": f"-c:v mpeg2video {GOOD} -bf 2",
            f"mpeg2-{order}.ts": f"-c:v mpeg2video {GOOD}",
            f"mpeg4-{order}.avi": f"-c:v mpeg4 {GOOD}",
            f"h264-{order}.mp4": f"{X264}:{order}=1 -pix_fmt yuv420p",
            f"h264-{order}-422-10.mkv": f"{X264}:{order}=1 -pix_fmt yuv422p10le",
            f"prores-{order}.mov": "-c:v prores_ks -profile:v 3",
            f"ffv1-{order}.mkv": "-c:v ffv1 -level 3 -pix_fmt yuv422p",
        }.items():
            kind = "interlaced, " + ("top field first" if order == "tff" else "bottom field first")
            maker.encode(f"interlaced/{file}", kind, f"{first} {options}", **case)
    dv = f"-vf tinterlace=interleave_bottom,setfield=bff,fps={RATE},scale=720:576:interl=1 -c:v dvvideo -pix_fmt yuv420p"
    for file in ("interlaced/dv.dv", "interlaced/dv.avi", "interlaced/dv.mov"):
        maker.encode(file, "DV", f"{dv} -flags +ildct+ilme -aspect 4:3", **{**case, "pixels": picture(16)})


def colours(maker: Maker) -> None:
    """Every matrix that is tagged, in both ranges, and what players assume of files that name none."""
    for name, scale in MATRICES.items():
        for values, pixel_format in (("tv", "yuv420p"), ("pc", "yuv444p"), ("tv", "yuv420p10le")):
            tags = f"setparams=colorspace={name}:range={values}"
            options = f"{X264} -vf scale=out_color_matrix={scale}:out_range={values},format={pixel_format},{tags}"
            maker.encode(f"colours/{name}-{values}-{pixel_format}.mp4", "tagged matrices", options)
    for name in ("bt709", "bt2020nc"):
        for file, codec, pixel_format in (("webm", VP9, "yuv420p"), ("mov", "-c:v prores_ks", "yuv422p10le")):
            tags = f"format={pixel_format},setparams=colorspace={name}:range=tv"
            options = f"{codec} -vf scale=out_color_matrix={MATRICES[name]},{tags}"
            maker.encode(f"colours/{name}.{file}", "tagged matrices", options)
    for height, width in ((16, 1280), (16, 1278), (578, 64), (576, 64), (720, 64), (480, 64)):
        matrix = "bt709" if width >= 1280 or height > 576 else "smpte170m"
        scale = f"-vf scale=out_color_matrix={MATRICES[matrix]}"
        pixels = picture(4, height, width)
        for file, options in {
            "h264.mp4": f"{X264} -pix_fmt yuv420p",
            "h265-10.mp4": f"{X265} -pix_fmt yuv420p10le",
            "vp9.webm": f"{VP9} -pix_fmt yuv420p",
        }.items():
            name = f"colours/untagged-{width}x{height}-{file}"
            maker.encode(name, "untagged matrices by size", f"{scale} {options}", pixels=pixels, matrix=matrix)


def high_dynamic_range(maker: Maker) -> None:
    """HLG and PQ, whose numbers mean other light than those of SDR."""
    pixels = (120 + 0.08 * picture()).astype(np.uint8)  # within BT.709: at zero light, rounding grows without bound
    for transfer, tag in (("hlg", "arib-std-b67"), ("pq", "smpte2084")):
        tags = f"setparams=color_primaries=bt2020:color_trc={tag}:colorspace=bt2020nc:range=tv"
        for file, (codec, pixel_format) in {
            "h265-10.mp4": (X265, "yuv420p10le"),
            "h265-12.mkv": (X265, "yuv422p12le"),
            "h264-10.mp4": (X264, "yuv420p10le"),
            "h264-8.mp4": (X264, "yuv420p"),
            "vp9-10.webm": (VP9, "yuv420p10le"),
            "av1-10.mp4": (AV1, "yuv420p10le"),
            "prores.mov": ("-c:v prores_ks -profile:v 3", "yuv422p10le"),
        }.items():
            options = f"{codec} -vf scale=out_color_matrix=bt2020:out_range=tv,format={pixel_format},{tags}"
            maker.encode(f"hdr/{transfer}-{file}", transfer.upper(), options, pixels=pixels, transfer=transfer, tolerance=16)


def aspects(maker: Maker) -> None:
    """Pixels that are not square, in the containers that say so in their own way."""
    for ratio in ("4:3", "16:11", "8:9", "2:1", "1:2", "64:45", "101:100"):
        for ending in ("mp4", "mkv", "ts"):
            options = f"{X264} -vf setsar={ratio.replace(':', '/')} -pix_fmt yuv420p"
            maker.encode(f"aspect/{ratio.replace(':', '-')}.{ending}", "pixels that are not square", options)
    for file, options in {
        "mpeg2.mpg": "-vf scale=96:72 -c:v mpeg2video -q:v 2 -aspect 16:9",
        "vp9.webm": f"{VP9} -vf setsar=4/3 -pix_fmt yuv420p",
        "mpeg4.avi": f"-c:v mpeg4 {GOOD} -vf setsar=4/3",
        "prores.mov": "-c:v prores_ks -vf setsar=4/3",
        "av1.mkv": f"{AV1} -vf setsar=4/3 -pix_fmt yuv420p",
        "theora.ogv": "-c:v libtheora -q:v 10 -vf setsar=4/3",
    }.items():
        maker.encode(f"aspect/{file}", "pixels that are not square", options)
    maker.encode("aspect/unknown.mp4", "pixels that are not square", f"{X264} -vf setsar=0 -pix_fmt yuv420p")


def times(maker: Maker) -> None:
    """Variable and unusual rates: held frames, one frame, a thousand a second, one in ten seconds."""
    uneven = "-vf settb=1/1000,setpts='trunc((N*40+7*mod(N*7\\,5))*(1+gt(N\\,11)))' -fps_mode passthrough -enc_time_base 1:1000"
    held = "-vf settb=1/1000,setpts='N*40+3000*gt(N\\,9)' -fps_mode passthrough -enc_time_base 1:1000"
    for ending, codec in (("mp4", X264), ("mkv", X264), ("webm", VP9), ("mov", "-c:v prores_ks"), ("flv", X264)):
        for name, options in (("uneven", uneven), ("held", held)):
            kind = "variable frame rate" if name == "uneven" else "held frames"
            pixel_format = "" if ending == "mov" else "-pix_fmt yuv420p"
            maker.encode(f"times/{name}.{ending}", kind, f"{options} {codec} {pixel_format}")
    delays = "-vf settb=1/100,setpts='N*4+20*mod(N\\,3)' -fps_mode passthrough -enc_time_base 1:100"
    maker.encode("times/delays.gif", "variable frame rate", delays)
    maker.encode("times/delays.apng", "variable frame rate", f"{delays} -c:v apng -f apng -plays 0")
    # Repeated frames that the encoder dropped, as screen recorders write them.
    still = picture(FRAMES).copy()
    still[5:15] = still[5]
    dropped = "-vf mpdecimate -fps_mode vfr"
    for ending, codec in (("mp4", X264), ("mkv", X264), ("gif", "")):
        maker.encode(
            f"times/dropped.{ending}",
            "held frames",
            f"{dropped} {codec} -pix_fmt {'rgb8' if not codec else 'yuv420p'}",
            pixels=still,
        )
    for rate in ("24000/1001", "30000/1001", "60000/1001", "12.5", "1000", "1/10", "7", "240"):
        name = rate.replace("/", "-")
        for ending, codec in (("mp4", X264), ("mkv", X264), ("ts", X264), ("webm", VP9)):
            if not (ending == "ts" and rate == "1/10"):
                maker.encode(f"times/rate-{name}.{ending}", "unusual frame rates", f"{codec} -pix_fmt yuv420p", rate=rate)
    for count in (1, 2):
        for file, options in {
            "mp4": X264,
            "mkv": X264,
            "webm": VP9,
            "avi": f"-c:v mpeg4 {GOOD}",
            "gif": "",
            "ts": X264,
        }.items():
            more = "-pix_fmt yuv420p" if file != "gif" else ""
            maker.encode(f"times/{count}-frames.{file}", "one or two frames", f"{options} {more}", pixels=picture(count))
    maker.encode("times/late.mp4", "starts late", f"{X264} -pix_fmt yuv420p -vf setpts=PTS+1.5/TB")
    maker.encode("times/late.mkv", "starts late", f"{X264} -pix_fmt yuv420p -output_ts_offset 1.5")
    maker.encode("times/late.ts", "starts late", f"{X264} -pix_fmt yuv420p -output_ts_offset 95000")


def streams(maker: Maker) -> None:
    """Sound, pictures beside the video, several videos."""
    maker.encode("streams/.cover.png", "picture", "-frames:v 1 -vf negate,scale=200:200", pixels=picture(1))
    maker.cases.pop()  # an ingredient
    maker.run()
    cover = f"-i {maker.folder / 'streams/.cover.png'}"
    sound = "-f lavfi -t {} -i sine=r=16000"
    encode = f"{X264} -pix_fmt yuv420p"
    for ending in ("mp4", "mov", "m4v"):
        options = "-map 0 -map 1 -c:v:0 libx264 -crf 8 -pix_fmt:v:0 yuv420p -c:v:1 png -disposition:v:1 attached_pic -f mp4"
        maker.encode(f"streams/cover.{ending}", "cover art", options, inputs=cover, stream=0)
        options = "-map 1 -map 0 -c:v:1 libx264 -crf 8 -pix_fmt:v:1 yuv420p -c:v:0 png -disposition:v:0 attached_pic -f mp4"
        maker.encode(f"streams/cover-first.{ending}", "cover art", options, inputs=cover)
    attach = f"-attach {maker.folder / 'streams/.cover.png'} -metadata:s:t mimetype=image/png -metadata:s:t filename=cover.png"
    maker.encode("streams/cover.mkv", "cover art", f"{encode} {attach}")
    for ending, codec in {
        "mp4": "aac",
        "mkv": "libopus",
        "ts": "mp2",
        "avi": "mp2",
        "mov": "pcm_s16le",
        "webm": "libopus",
    }.items():
        video = f"{VP9} -pix_fmt yuv420p" if ending == "webm" else encode if ending != "avi" else f"-c:v mpeg4 {GOOD}"
        for name, seconds in (("longer", 3), ("shorter", 0.3)):
            options = f"-map 1 -map 0 {video} -c:a {codec}"
            maker.encode(f"streams/sound-{name}.{ending}", "with sound", options, inputs=sound.format(seconds))
    small = "[0]split[a][b];[b]negate,scale=48:32[s]"
    for ending, codec in (("mp4", encode), ("mkv", encode), ("ts", encode)):
        # The second is the default, or the larger.
        graph = f"-filter_complex {small}"
        options = f"{graph} -map [s] -map [a] {codec} -disposition:v:0 0 -disposition:v:1 default"
        maker.encode(f"streams/two-default-second.{ending}", "several videos", options)
        options = f"{graph} -map [a] -map [s] {codec} -disposition:v:0 default -disposition:v:1 0"
        maker.encode(f"streams/two-default-first.{ending}", "several videos", options)
    maker.encode("streams/timecode.mov", "with other streams", f"{encode} -timecode 01:00:00:00")
    subtitles = maker.path("streams/.words.srt")
    subtitles.write_text("1\n00:00:00,000 --> 00:00:02,000\nwords\n", encoding="utf-8")
    for ending, codec in (("mp4", "mov_text"), ("mkv", "srt")):
        options = f"-map 1 -map 0 {encode} -c:s {codec}"
        maker.encode(f"streams/subtitles.{ending}", "with other streams", options, inputs=f"-i {subtitles}")


def turned(maker: Maker) -> None:
    """The eight display matrices of players, an oblique one, and the same in the streams themselves."""
    for flipped in (False, True):
        for angle in (0, 90, 180, 270):
            name = f"{angle}{'-mirrored' if flipped else ''}"
            before = f"-display_rotation {angle}" + (" -display_hflip" if flipped else "")
            kind = "mirrored" if flipped else "rotated"
            for ending in ("mp4", "mov"):
                maker.copy("codecs/h264.mp4", f"turned/{name}.{ending}", kind, before=before)
            if angle or not flipped:
                maker.copy("codecs/h265-420-10.mp4", f"turned/{name}-10.mp4", kind, before=before)
    for angle in (90, 180, 270):
        maker.copy("codecs/h264.mp4", f"turned/{angle}.mkv", "rotated", before=f"-display_rotation {angle}")
        maker.copy("aspect/4-3.mp4", f"turned/{angle}-aspect.mp4", "rotated", before=f"-display_rotation {angle}")
    for name, options in {
        "sei-90": "display_orientation=insert:rotate=90",
        "sei-180": "display_orientation=insert:rotate=180",
        "sei-flip": "display_orientation=insert:flip=horizontal",
    }.items():
        for ending in ("mp4", "ts"):
            kind = "mirrored" if "flip" in name else "rotated"
            maker.copy("codecs/h264.mp4", f"turned/{name}.{ending}", kind, f"-c copy -bsf:v h264_metadata={options}")
    for angle in (30, 45, 91):
        before = f"-display_rotation {angle}"
        note = "turned by no multiple of 90 degrees"
        maker.copy("codecs/h264.mp4", f"turned/{angle}.mp4", "oblique", before=before, note=note)


def cuts(maker: Maker) -> None:
    """Lossless cuts at and beside key frames, whose edit lists hide what leads up to them."""
    sources = "codecs/h264.mp4 codecs/h264-open-gop.mp4 codecs/h265.mp4 codecs/mpeg4-bframes.mp4 codecs/vp9.mp4"
    for source in f"{sources} streams/sound-longer.mp4 times/uneven.mp4 interlaced/h264-tff.mp4".split():
        name = source.split("/")[1].rsplit(".")[0]
        more = {"deinterlace": True, "tolerance": 24} if "interlaced" in source else {}
        for start, length in ((0.3, 0.4), (0.13, 0.6)):
            endings = "mp4 mkv" if "vp9" in name else "mp4 mov mkv" if "mpeg4" in name else "mp4 mov mkv ts"
            for ending in endings.split():
                file = f"cuts/{name}-{start}.{ending}"
                maker.copy(source, file, f"lossless cut to {ending}", f"-t {length} -c copy", f"-ss {start}", **more)
    maker.copy("codecs/h264.mp4", "cuts/delayed.mp4", "starts late", before="-itsoffset 1")
    for source, ending in (("codecs/mpeg2.mpg", "mpg"), ("codecs/xvid-packed.avi", "avi"), ("codecs/wmv2.wmv", "wmv")):
        name = f"cuts/{source.split('/')[1].rsplit('.')[0]}.{ending}"
        maker.copy(source, name, f"lossless cut to {ending}", "-t 0.5 -c copy", "-ss 0.2")


def names(maker: Maker) -> None:
    """Names that are no trouble to a file system, and endings that lie."""
    folder = maker.path("names/x").parent
    for name in (
        "12:30.mp4", "file:x.mp4", "http:x.mp4", "new\nline.mp4", "emoji 🎬.mp4", "\udcff\udcfe.mp4", "latin-\udce9.mp4",
        unicodedata.normalize("NFD", "Café Ü.mp4"), unicodedata.normalize("NFC", "Café Å.mp4"), "-y.mp4", "a b.mp4", "%03d.mp4",
        "100%.mp4", "star*?.mp4", "concat:a|b.mp4", "quote'\".mp4", "back\\slash.mp4", "upper.MP4", "tab\t.mp4", "[1].mp4",
        "data:video,x.mp4", "pipe:0.mp4", "pipe:1", "x" * 250 + ".mp4", "subfile,,start,0,end,9,,:x.mp4", "#.mp4", "日本語.mp4",
        ".hidden.mp4", "two.dots..mp4", "$HOME.mp4", "`x`.mp4", "crypto:x.mp4", "async:x.mp4", "a,b;c.mp4",
    ):  # fmt: skip
        shutil.copy(maker.folder / "codecs/h264.mp4", folder / name)
        maker.add(f"names/{name}", "odd names")
    for name, source in {
        "matroska.mp4": "h264.mkv",
        "transport.mp4": "h264.ts",
        "webm.mp4": "vp9.webm",
        "gif.mp4": "transparent.gif",
        "avi.mp4": "h264.avi",
        "mpg.mp4": "mpeg2.mpg",
        "mp4.mkv": "h264.mp4",
        "mp4.avi": "h264.mp4",
        "mp4.gif": "h264.mp4",
        "no-ending": "h264.mp4",
    }.items():
        shutil.copy(maker.folder / "codecs" / source, folder / name)
        maker.add(f"names/{name}", "endings that lie", alpha=source == "transparent.gif")
    os.symlink("../codecs/h264.mp4", folder / "link.mp4")
    maker.add("names/link.mp4", "odd names")
