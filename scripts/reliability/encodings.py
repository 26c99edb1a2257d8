"""Encodings of the corpus: rows of file | kind | options of ffmpeg. Files of one kind share a row of the results."""

from .corpus import Maker, picture

X264 = "-c:v libx264 -crf 8 -x264-params threads=1:bframes=2:keyint=10:scenecut=0"
X265 = "-c:v libx265 -crf 8 -x265-params log-level=error:pools=1:frame-threads=1:keyint=10"
VP9 = "-c:v libvpx-vp9 -crf 8 -b:v 0 -cpu-used 8 -row-mt 0 -g 10"
AV1 = "-c:v libaom-av1 -crf 8 -b:v 0 -cpu-used 8 -g 10"
GOOD = "-q:v 2"

CODECS = f"""
h264.mp4 | H.264 8-bit 4:2:0 | {X264} -pix_fmt yuv420p
h264.mov | H.264 8-bit 4:2:0 | {X264} -pix_fmt yuv420p
h264.mkv | H.264 8-bit 4:2:0 | {X264} -pix_fmt yuv420p
h264.ts | H.264 8-bit 4:2:0 | {X264} -pix_fmt yuv420p
h264.flv | H.264 8-bit 4:2:0 | {X264} -pix_fmt yuv420p
h264.avi | H.264 8-bit 4:2:0 | {X264} -pix_fmt yuv420p -bf 0
h264.m4v | H.264 8-bit 4:2:0 | {X264} -pix_fmt yuv420p -f mp4
h264.3gp | H.264 8-bit 4:2:0 | {X264} -pix_fmt yuv420p -bf 0
h264-fragments.mp4 | H.264 8-bit 4:2:0 | {X264} -pix_fmt yuv420p -movflags frag_keyframe+empty_moov
h264-faststart.mp4 | H.264 8-bit 4:2:0 | {X264} -pix_fmt yuv420p -movflags faststart
h264-intra-refresh.mp4 | H.264 8-bit 4:2:0 | {X264}:intra-refresh=1 -pix_fmt yuv420p
h264-open-gop.mp4 | H.264 8-bit 4:2:0 | {X264}:open-gop=1 -pix_fmt yuv420p
h264-slices.mp4 | H.264 8-bit 4:2:0 | {X264}:slices=4 -pix_fmt yuv420p
h264-lossless.mp4 | H.264 8-bit 4:2:0 | -c:v libx264 -qp 0 -pix_fmt yuv420p
h264-422.mp4 | H.264 8-bit 4:2:2 | {X264} -pix_fmt yuv422p
h264-444.mp4 | H.264 8-bit 4:4:4 | {X264} -pix_fmt yuv444p
h264-420-10.mp4 | H.264 10-bit | {X264} -pix_fmt yuv420p10le
h264-422-10.mp4 | H.264 10-bit | {X264} -pix_fmt yuv422p10le
h264-444-10.mp4 | H.264 10-bit | {X264} -pix_fmt yuv444p10le
h264-420-10.mkv | H.264 10-bit | {X264} -pix_fmt yuv420p10le
h264-grey.mp4 | H.264 grey | {X264} -pix_fmt gray
h264-grey-10.mp4 | H.264 grey | {X264} -pix_fmt gray10le
h264-rgb.mp4 | H.264 RGB | -c:v libx264rgb -crf 4 -pix_fmt rgb24
h265.mp4 | HEVC 8-bit | {X265} -pix_fmt yuv420p -tag:v hvc1
h265.mkv | HEVC 8-bit | {X265} -pix_fmt yuv420p
h265-444.mp4 | HEVC 8-bit | {X265} -pix_fmt yuv444p
h265-420-10.mp4 | HEVC 10-bit | {X265} -pix_fmt yuv420p10le
h265-422-10.mp4 | HEVC 10-bit | {X265} -pix_fmt yuv422p10le
h265-420-12.mp4 | HEVC 12-bit | {X265} -pix_fmt yuv420p12le
h265-444-12.mkv | HEVC 12-bit | {X265} -pix_fmt yuv444p12le
h265-rgb.mkv | HEVC RGB | {X265} -pix_fmt gbrp
vp8.webm | VP8 | -c:v libvpx -crf 8 -b:v 2M -cpu-used 8
vp8.mkv | VP8 | -c:v libvpx -crf 8 -b:v 2M -auto-alt-ref 1 -lag-in-frames 12 -cpu-used 4
vp9.webm | VP9 8-bit | {VP9} -pix_fmt yuv420p
vp9.mp4 | VP9 8-bit | {VP9} -pix_fmt yuv420p
vp9-altref.webm | VP9 8-bit | {VP9} -auto-alt-ref 6 -lag-in-frames 16 -pix_fmt yuv420p
vp9-422.webm | VP9 8-bit | {VP9} -pix_fmt yuv422p
vp9-444.webm | VP9 8-bit | {VP9} -pix_fmt yuv444p
vp9-rgb.webm | VP9 RGB | {VP9} -pix_fmt gbrp
vp9-420-10.webm | VP9 10-bit | {VP9} -pix_fmt yuv420p10le
vp9-444-12.mkv | VP9 12-bit | {VP9} -pix_fmt yuv444p12le
av1.mp4 | AV1 8-bit | {AV1} -pix_fmt yuv420p
av1.webm | AV1 8-bit | {AV1} -pix_fmt yuv420p
av1-444.mkv | AV1 8-bit | {AV1} -pix_fmt yuv444p
av1-420-10.mp4 | AV1 10-bit | {AV1} -pix_fmt yuv420p10le
av1-422-12.mkv | AV1 12-bit | {AV1} -pix_fmt yuv422p12le
mpeg1.mpg | MPEG-1 | -c:v mpeg1video -bf 2 {GOOD}
mpeg2.mpg | MPEG-2 | -c:v mpeg2video -bf 2 {GOOD}
mpeg2.ts | MPEG-2 | -c:v mpeg2video -bf 2 {GOOD}
mpeg2.mkv | MPEG-2 | -c:v mpeg2video -bf 2 {GOOD}
mpeg2.vob | MPEG-2 | -c:v mpeg2video -bf 2 {GOOD} -f vob
mpeg2-422.mxf | MPEG-2 | -c:v mpeg2video -pix_fmt yuv422p {GOOD}
mpeg4.mp4 | MPEG-4 part 2 | -c:v mpeg4 {GOOD}
mpeg4-bframes.mp4 | MPEG-4 part 2 | -c:v mpeg4 -bf 2 {GOOD}
mpeg4-bframes.mkv | MPEG-4 part 2 | -c:v mpeg4 -bf 2 {GOOD}
mpeg4.avi | MPEG-4 part 2 | -c:v mpeg4 -vtag DIVX {GOOD}
mpeg4-bframes.avi | MPEG-4 part 2 | -c:v mpeg4 -bf 2 -vtag DX50 {GOOD}
xvid.avi | XviD | -c:v libxvid {GOOD}
xvid-packed.avi | XviD | -c:v libxvid -bf 2 {GOOD}
msmpeg4v2.avi | MS MPEG-4 | -c:v msmpeg4v2 {GOOD}
msmpeg4v3.avi | MS MPEG-4 | -c:v msmpeg4 {GOOD}
wmv1.wmv | WMV | -c:v wmv1 {GOOD}
wmv2.wmv | WMV | -c:v wmv2 {GOOD}
wmv2.asf | WMV | -c:v wmv2 {GOOD}
flv1.flv | FLV1 | -c:v flv {GOOD}
theora.ogv | Theora | -c:v libtheora -q:v 10
mjpeg.avi | Motion JPEG | -c:v mjpeg {GOOD} -pix_fmt yuvj420p
mjpeg.mov | Motion JPEG | -c:v mjpeg {GOOD} -pix_fmt yuvj422p
mjpeg-444.mkv | Motion JPEG | -c:v mjpeg {GOOD} -pix_fmt yuvj444p
prores.mov | ProRes | -c:v prores_ks -profile:v 3
prores-lt.mov | ProRes | -c:v prores_ks -profile:v 1
dnxhr.mov | DNxHR | -vf scale=256:128 -c:v dnxhd -profile:v dnxhr_hq -pix_fmt yuv422p
dnxhr.mxf | DNxHR | -vf scale=256:128 -c:v dnxhd -profile:v dnxhr_lb -pix_fmt yuv422p
dnxhr-10.mov | DNxHR | -vf scale=256:128 -c:v dnxhd -profile:v dnxhr_hqx -pix_fmt yuv422p10le
cineform.mov | CineForm | -c:v cfhd -pix_fmt yuv422p10le
ffv1.mkv | FFV1 | -c:v ffv1 -level 3 -pix_fmt yuv420p
ffv1.avi | FFV1 | -c:v ffv1 -pix_fmt yuv422p
ffv1-rgb.mkv | FFV1 | -c:v ffv1 -pix_fmt bgr0
ffv1-16.mkv | FFV1 | -c:v ffv1 -level 3 -pix_fmt yuv444p16le
ffv1-rgb-16.mkv | FFV1 | -c:v ffv1 -level 3 -pix_fmt gbrp16le
ffv1-grey-16.mkv | FFV1 | -c:v ffv1 -level 3 -pix_fmt gray16le
huffyuv.avi | Huffyuv | -c:v huffyuv -pix_fmt yuv422p
huffyuv-rgb.avi | Huffyuv | -c:v huffyuv -pix_fmt rgb24
ffvhuff.mkv | Huffyuv | -c:v ffvhuff -pix_fmt yuv420p
utvideo.avi | Ut Video | -c:v utvideo -pix_fmt yuv420p
utvideo-rgb.avi | Ut Video | -c:v utvideo -pix_fmt gbrp
magicyuv.avi | MagicYUV | -c:v magicyuv -pix_fmt yuv444p
cinepak.avi | Cinepak | -c:v cinepak -pix_fmt rgb24
msvideo1.avi | MS Video 1 | -c:v msvideo1
zmbv.avi | ZMBV | -c:v zmbv -pix_fmt bgr0
qtrle.mov | QuickTime RLE | -c:v qtrle -pix_fmt rgb24
qtrle-grey.mov | QuickTime RLE | -c:v qtrle -pix_fmt gray
qtrle-555.mov | QuickTime RLE | -c:v qtrle -pix_fmt rgb555be
rpza.mov | QuickTime RPZA | -c:v rpza
smc.mov | QuickTime SMC | -c:v smc -pix_fmt pal8 -vf split[a][b];[a]palettegen=reserve_transparent=0[p];[b][p]paletteuse
svq1.mov | Sorenson SVQ1 | -c:v svq1 -pix_fmt yuv410p
png.mov | PNG in mov | -c:v png -pix_fmt rgb24
png-16.mov | PNG in mov | -c:v png -pix_fmt rgb48be
jpeg2000.mov | JPEG 2000 | -c:v jpeg2000 -pix_fmt yuv420p
jpeg2000-12.mkv | JPEG 2000 | -c:v libopenjpeg -pix_fmt yuv444p12le
raw-420.avi | uncompressed | -c:v rawvideo -pix_fmt yuv420p
raw-bgr.avi | uncompressed | -c:v rawvideo -pix_fmt bgr24
raw-uyvy.mov | uncompressed | -c:v rawvideo -pix_fmt uyvy422
raw-rgb.mov | uncompressed | -c:v rawvideo -pix_fmt rgb24
raw-420.mkv | uncompressed | -c:v rawvideo -pix_fmt yuv420p -allow_raw_vfw 1
raw.nut | uncompressed | -c:v rawvideo -pix_fmt rgb24
raw.y4m | uncompressed | -c:v wrapped_avframe -pix_fmt yuv420p
v210.mov | uncompressed | -c:v v210
v410.mov | uncompressed | -c:v v410
r210.mov | uncompressed | -c:v r210
dirac.mkv | Dirac | -c:v vc2 -pix_fmt yuv422p
snow.avi | Snow | -c:v snow -strict -2 {GOOD}
rv10.rm | RealVideo | -c:v rv10 {GOOD}
rv20.rm | RealVideo | -c:v rv20 {GOOD}
asv1.avi | ASUS | -c:v asv1 {GOOD}
flash-screen.flv | Flash Screen | -c:v flashsv
h263.3gp | H.263 | -vf scale=176:144 -c:v h263 {GOOD}
h261.mkv | H.261 | -vf scale=176:144 -c:v h261 {GOOD}
h264.h264 | raw stream | {X264} -pix_fmt yuv420p -bf 0
h265.hevc | raw stream | {X265} -pix_fmt yuv420p -bf 0
mpeg4.m4v | raw stream | -c:v mpeg4 {GOOD} -f m4v
av1.obu | raw stream | {AV1} -pix_fmt yuv420p
vp9.ivf | IVF | {VP9} -pix_fmt yuv420p
"""

ALPHA = f"""
vp8-alpha.webm | VP8 with alpha | -c:v libvpx -auto-alt-ref 0 -b:v 2M -crf 8 -cpu-used 8 -pix_fmt yuva420p
vp9-alpha.webm | VP9 with alpha | {VP9} -auto-alt-ref 0 -pix_fmt yuva420p
prores-4444.mov | ProRes 4444 with alpha | -c:v prores_ks -profile:v 4 -pix_fmt yuva444p10le -alpha_bits 16
qtrle-argb.mov | QuickTime RLE with alpha | -c:v qtrle -pix_fmt argb
png-rgba.mov | PNG in mov with alpha | -c:v png -pix_fmt rgba
png-rgba-16.mov | PNG in mov with alpha | -c:v png -pix_fmt rgba64be
ffv1-rgba.mkv | FFV1 with alpha | -c:v ffv1 -pix_fmt bgra
ffv1-yuva.mkv | FFV1 with alpha | -c:v ffv1 -level 3 -pix_fmt yuva420p
utvideo-rgba.avi | Ut Video with alpha | -c:v utvideo -pix_fmt gbrap
raw-argb.mov | uncompressed with alpha | -c:v rawvideo -pix_fmt argb
still.apng | animated PNG | -c:v apng -f apng -pix_fmt rgba -plays 0
animation.png | animated PNG | -c:v apng -f apng -pix_fmt rgba -plays 0
transparent.gif | GIF | -vf split[a][b];[a]palettegen[p];[b][p]paletteuse=alpha_threshold=128 -gifflags +transdiff
"""

COLOURS = f"""
range-pc.mp4 | full range | {X264} -vf scale=out_range=pc,format=yuv420p,setparams=range=pc
range-pc-10.mp4 | full range | {X265} -vf scale=out_range=pc,format=yuv420p10le,setparams=range=pc
range-pc.webm | full range | {VP9} -vf scale=out_range=pc,format=yuv420p,setparams=range=pc
range-pc-grey.mp4 | full range | {X264} -vf scale=out_range=pc,format=gray,setparams=range=pc
range-pc-av1.mp4 | full range | {AV1} -vf scale=out_range=pc,format=yuv420p,setparams=range=pc
range-tv.mp4 | limited range | {X264} -vf scale=out_range=tv,format=yuv420p,setparams=range=tv
yuvj.mp4 | full range | {X264} -pix_fmt yuvj420p
"""

ALPHA_DECODERS = {"vp8-alpha.webm": "libvpx", "vp9-alpha.webm": "libvpx-vp9"}  # ffmpeg's own leave the transparency out


def make(maker: Maker) -> None:
    """Make all of them."""
    for table, case in ((CODECS, {}), (ALPHA, {"alpha": True, "pixels": picture(alpha=True)}), (COLOURS, {})):
        for row in table.strip().splitlines():
            file, kind, options = (part.strip() for part in row.split("|"))
            maker.encode(f"codecs/{file}", kind, options, decoder=ALPHA_DECODERS.get(file), **case)
