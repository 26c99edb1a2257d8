"""Videos and pictures as files: what a player shows of them, as uint8 RGB (T, H, W, 3), and writing them.

`decode_strictly` passes once over a file and refuses damage; `read_frames` fetches frames by their numbers. PyAV decides what
the frames of a file are. PyAV and decord are imported in this room alone, and lazily.
"""

from .images import IMAGE_EXTENSIONS, IMAGE_FPS, ImageError, is_image, to_rgb
from .isolated import READER, IsolatedReader
from .reader import VideoHeader, frame_times, read_frames, read_header, stream_frames
from .source import READ_TIMEOUT, REENCODE, UnreadableVideo, VideoBytes, VideoSource
from .strict import VideoFacts, decode_strictly
from .times import TIE, at_constant_rate, pick_by_time
from .writer import encode_mp4, write_video

__all__ = [
    "IMAGE_EXTENSIONS",
    "IMAGE_FPS",
    "READER",
    "READ_TIMEOUT",
    "REENCODE",
    "TIE",
    "ImageError",
    "IsolatedReader",
    "UnreadableVideo",
    "VideoBytes",
    "VideoFacts",
    "VideoHeader",
    "VideoSource",
    "at_constant_rate",
    "decode_strictly",
    "encode_mp4",
    "frame_times",
    "is_image",
    "pick_by_time",
    "read_frames",
    "read_header",
    "stream_frames",
    "to_rgb",
    "write_video",
]
