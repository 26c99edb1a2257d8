"""Functions that children of the isolated reader run in tests: light to import."""

import os
import signal
import time

from promag.data.video import UnreadableVideo
from promag.data.video.isolated import beat


def crash(source, number):
    os.kill(os.getpid(), number)


def take(source, size):
    return len(b"x" * size)


def wait(source, seconds, signs=0):
    for _ in range(signs):
        time.sleep(seconds)
        beat(0.01)
    time.sleep(seconds)
    return "done"


def own_process(source):
    return os.getpid()


def refuse(source):
    raise UnreadableVideo(source, "holds no frames")


def count(source, stop, then=None):
    yield from range(stop)
    if then == "crash":
        crash(source, signal.SIGSEGV)
    if then == "refuse":
        refuse(source)


def folder(source):
    return os.path.abspath(source)


def most_memory(source):
    """Return the largest resident size of this process so far, in bytes."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
