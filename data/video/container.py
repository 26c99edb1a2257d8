"""A video file opened with PyAV: its one stream to show, packets, and decoded frames with their times."""

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from .checksums import slices_are_whole
from .display import Display
from .isolated import beat
from .source import UnreadableVideo, VideoSource, openable

_STRICT = {"err_detect": "explode"}

# Demuxers that read this one file and no other: no playlists, which name files and addresses to open.
_DEMUXERS = (
    "3dostr,amv,apng,asf,av1,avi,cine,dhav,dirac,dnxhd,dv,flv,gif,gxf,h261,h263,h264,hevc,ivf,ivr,m4v,matroska,mjpeg,mov,mp4,"
    "mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,rm,vc1,vvc,webm,wtv,yuv4mpegpipe"
)
# Where such a decoder is there, it reads the transparency that the usual one leaves out.
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@dataclass(frozen=True)
class Frame:
    """A decoded frame: its time in ticks, and the picture in the decoder's format."""

    time: int
    decoded: Any


@dataclass(frozen=True, eq=False)
class PacketTable:
    """What a file's packets say of the frames that will be shown.

    Args:
        times: ticks at which the frames are shown, in order; None if the packets do not say.
        keys: ticks of the frames at which decoding can begin.
        places: bytes before the packets of these frames, by their times.
        packets: number of all packets of the stream.
        end: end of the last packet of any stream, in seconds.
    """

    times: np.ndarray | None
    keys: np.ndarray
    places: dict[int, int]
    packets: int
    end: float


class Container:
    """An open file and the stream of it that a player shows; `open_container` opens one."""

    def __init__(self, source: VideoSource, container: Any, options: dict[str, str]):
        from av.stream import Disposition

        self.source, self.container = source, container
        real = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not real:
            covers = len(container.streams.video)
            raise UnreadableVideo(source, "holds a cover picture and no video" if covers else "holds no video stream")
        self.stream = stream = max(real, key=_preference)
        if stream.codec_context is None:
            raise UnreadableVideo(source, "its codec is unknown")
        self.decoder = _alpha_decoder(stream) or stream.codec_context
        self.decoder.options = options
        self.decoder.thread_count = 1  # many files are read side by side
        self.display = Display(source, stream.sample_aspect_ratio)
        if stream.time_base is None:
            raise UnreadableVideo(source, "states no unit of time")
        self.tick: Fraction = stream.time_base

    @property
    def codec(self) -> str:
        """Name of the codec."""
        return self.stream.codec_context.name

    def packets(self) -> PacketTable:
        """Read the packets of the file, from its start, without decoding any."""
        times, keys, places, count, end = [], [], {}, 0, 0.0
        ticks: dict[int, float] = {}  # seconds a tick of each stream; a fraction for each packet takes longer than reading it
        for packet in self.container.demux():
            beat()
            if packet.stream_index not in ticks:
                ticks[packet.stream_index] = float(packet.time_base or 0)
            if packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * ticks[packet.stream_index])
            if packet.stream_index != self.stream.index or not packet.size:
                continue
            count += 1
            if packet.is_keyframe:  # even one that an edit list hides: decoding begins there
                keys.append(packet.pts)
                places[packet.pts] = packet.pos
            # A hidden frame of VP8 (RFC 6386, section 9.1) is a packet of its own.
            if packet.is_discard or (self.codec == "vp8" and not memoryview(packet)[0] & 0x10):
                continue
            times.append(packet.pts)
        known = bool(keys) and None not in [*times, *keys] and self._packets_are_frames()
        # Frames before the first key frame, as after a cut without encoding, refer to what is not there.
        shown = np.sort(np.array(times if known else [], np.int64))
        shown = shown[shown >= min(keys, default=0)] if known else shown
        known = known and bool((np.diff(shown) > 0).all())
        starts = np.array(sorted(key for key in keys if key is not None), np.int64)
        return PacketTable(shown if known else None, starts, places, count, end)

    def _packets_are_frames(self) -> bool:
        formats = {"mov", "mp4", "matroska", "webm", "gif", "flv"}
        codecs = {"h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "mjpeg", "prores", "ffv1", "dnxhd", "qtrle", "png", "gif"}
        return bool(formats & set(self.container.format.name.split(","))) and self.codec in codecs

    def check_index(self, packets: PacketTable) -> None:
        """Raise UnreadableVideo where the index of an AVI, which alone says when its packets are shown, leads elsewhere."""
        if self.container.format.name != "avi":
            return
        for time in packets.keys[:: max(1, len(packets.keys) // 64)].tolist():
            found = next(self.container.demux(self.stream), None) if self.seek(time) else None
            if found is not None and found.size and packets.places.get(found.pts) != found.pos:
                raise UnreadableVideo(self.source, "its index leads to other frames than reading in order; re-encode it")

    def frames(self) -> Iterator[Frame]:
        """Decode from where the file stands, deinterlacing what is interlaced; raises UnreadableVideo for damage."""
        deinterlacer, previous = None, None
        for frame in self._decoded():
            last, previous = previous, Frame(self._time(frame, previous and previous.time), frame)
            if frame.interlaced_frame and deinterlacer is None:
                self.display.notes.add("deinterlaced")
                deinterlacer = _Deinterlacer(last)
            if deinterlacer is None:
                yield previous
            else:
                yield from deinterlacer.push(previous)
        if deinterlacer is not None:
            yield from deinterlacer.finish()

    def _time(self, frame: Any, previous: int | None) -> int:
        """Return the time of a frame in ticks; AVI states when frames are decoded, and the last ones of some files no time."""
        stated = [frame.dts] if self.container.format.name == "avi" else [frame.pts, frame.dts]
        known = next((time for time in stated if time is not None), None)
        if known is not None:
            return known
        return 0 if previous is None else previous + max(1, round(1 / (self.stream.average_rate or 25) / self.tick))

    def _decoded(self) -> Iterator[Any]:
        count, sums = 0, set[bool]()
        for packet in self.container.demux(self.stream):
            beat()
            if self.codec == "ffv1" and packet.size:
                sums.add(slices_are_whole(bytes(packet)))
            if packet.is_corrupt or len(sums) == 2:  # wrong checksums among right ones
                raise UnreadableVideo(self.source, f"corrupt data after {count} frames")
            for frame in self.decoder.decode(packet if packet.size else None):
                if frame.is_corrupt:
                    raise UnreadableVideo(self.source, f"frame {count} is corrupt")
                count += 1
                yield frame

    def seek(self, time: int) -> bool:
        """Go to a place at or before `time` (ticks) where decoding can begin; return whether the file can be sought in."""
        from av.error import FFmpegError

        if self.stream.codec_context.pix_fmt == "pal8":
            return False  # its palette comes with the first packet alone
        try:
            self.container.seek(time, stream=self.stream)
        except FFmpegError:
            return False
        if self.decoder is not self.stream.codec_context:
            self.decoder.flush_buffers()
        return True


class _Deinterlacer:
    """bwdif: one frame for each, with its own time; frames that are not marked as interlaced pass unchanged.

    A frame is made from itself and its neighbours: `before` is the one before the first.
    """

    def __init__(self, before: Frame | None):
        self.graph: Any = None
        self.waiting = deque[tuple[int, bool]]()  # time, whether the frame is wanted
        if before is not None:
            self._push(before, False)

    def push(self, frame: Frame) -> Iterator[Frame]:
        self._push(frame, True)
        yield from self._pull()

    def finish(self) -> Iterator[Frame]:
        self.graph.push(None)
        yield from self._pull()

    def _push(self, frame: Frame, wanted: bool) -> None:
        from av.filter import Graph

        picture = frame.decoded
        if self.graph is None:
            self.graph = Graph()
            self.graph.threads = 1
            options = {"format": picture.format, "time_base": picture.time_base}
            start = self.graph.add_buffer(width=picture.width, height=picture.height, **options)
            bwdif = self.graph.add("bwdif", "mode=send_frame:deint=interlaced")
            end = self.graph.add("buffersink")
            start.link_to(bwdif)
            bwdif.link_to(end)
            self.graph.configure()
        self.waiting.append((frame.time, wanted))
        self.graph.push(picture)

    def _pull(self) -> Iterator[Frame]:
        from av import error

        while self.waiting:
            try:
                shown = self.graph.pull()
            except (error.BlockingIOError, error.EOFError):
                return
            time, wanted = self.waiting.popleft()
            if wanted:
                yield Frame(time, shown)


def _preference(stream: Any) -> tuple[bool, int]:
    """Return what players choose among several videos by: the default one, then the largest."""
    from av.stream import Disposition

    context = stream.codec_context
    return bool(stream.disposition & Disposition.default), context.width * context.height if context else 0


def _alpha_decoder(stream: Any) -> Any:
    from av import CodecContext, codecs_available

    name = _WITH_ALPHA.get(stream.codec_context.name)
    wanted = str(next((v for k, v in stream.metadata.items() if k.lower() == "alpha_mode"), "0")) == "1"
    return CodecContext.create(name, "r") if wanted and name in codecs_available else None


@contextlib.contextmanager
def open_container(source: VideoSource, max_pixels: int | None = None) -> Iterator[Container]:
    """Open a video; raises UnreadableVideo for what is none, and for what its decoder refuses while it is open.

    Pictures of more than `max_pixels` (width times height) are not decoded.
    """
    import av
    from av.error import FFmpegError

    options = _STRICT if max_pixels is None else {**_STRICT, "max_pixels": str(max_pixels)}
    with openable(source) as file:
        try:
            with av.open(file, options={**options, "format_whitelist": _DEMUXERS}, metadata_errors="ignore") as container:
                yield Container(source, container, options)
        except (FFmpegError, OSError) as error:
            raise UnreadableVideo(source, f"cannot be opened or decoded as a video ({error.strerror or error})") from error
