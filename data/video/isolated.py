"""Functions of the reader in processes of their own, with limits on memory and time.

    READER.call(decode_strictly, "video.mp4")

Decoders are C code that reads files of strangers. Where one crashes, hangs or takes all memory, a child process ends and the
file is unreadable like any other. A child is a new Python that imports this room alone; no process with threads is forked.
"""

import concurrent.futures
import contextlib
import functools
import inspect
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from .source import READ_TIMEOUT, UnreadableVideo, VideoSource, within

MEMORY = 4 * 2**30  # bytes that a child may take
IDLE = 30.0  # seconds after which a child without work ends
BEAT = 1.0  # seconds between two signs of life

_READY, _GOES_ON, _ITEM, _RESULT, _ERROR, _NO_MEMORY = range(6)  # what a child sends


class _LostError(Exception):
    """A child died or ran out of memory before its function ended."""


class IsolatedReader:
    """Runs functions of the reader in child processes, which serve many calls and are replaced where they end.

    Args:
        memory: bytes that a child may take; the limit holds on Linux alone.
        silence: seconds in which a child must decode a frame or return.
        total: seconds that one call may wait for its child in all; None for no limit.
        processes: calls that run at a time, while others wait; None for no limit.
    """

    def __init__(
        self,
        memory: int = MEMORY,
        silence: float = READ_TIMEOUT,
        total: float | None = None,
        processes: int | None = None,
    ):
        self.memory, self.silence, self.total = memory, silence, total
        self._places = threading.BoundedSemaphore(processes) if processes else contextlib.nullcontext()
        self._idle: list[_Child] = []
        self._thread = threading.local()  # its `calls` are those of the pool that the thread is of
        weakref.finalize(self, _end_all, self._idle)

    def call(self, function: Callable[..., Any], source: VideoSource, *arguments: Any, **options: Any) -> Any:
        """Return `function(source, *arguments, **options)`, computed in a child; the function can be imported by its name.

        Raises what it raises, and UnreadableVideo where the child crashes, takes too much memory or too long.
        """
        *_, (_, result) = self._answers(functools.partial(function, source, *arguments, **options), source)
        return result

    def stream(
        self, function: Callable[..., Iterator[Any]], source: VideoSource, *arguments: Any
    ) -> Generator[Any, None, None]:
        """Yield what the generator `function(source, *arguments)` yields, as it comes; raises as `call` does."""
        for kind, value in self._answers(functools.partial(function, source, *arguments), source):
            if kind == _ITEM:
                yield value

    @contextlib.contextmanager
    def pool(self, workers: int) -> Iterator[ThreadPoolExecutor]:
        """Give threads that may call this reader; their calls end at once where the block raises, also for Ctrl-C."""
        calls = _Calls()
        pool = ThreadPoolExecutor(workers, initializer=lambda: setattr(self._thread, "calls", calls))
        try:
            yield pool
        except BaseException:
            calls.end()  # else closing the pool would wait for whole films
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _answers(self, work: Callable[[], Any], source: VideoSource) -> Iterator[tuple[int, Any]]:
        """Yield the items and the result; a used child that is lost before its first answer is replaced by a new one."""
        with self._places:
            answered, child = False, self._take()
            if child is not None:
                try:
                    for answer in self._ask(child, work, source):
                        answered = True
                        yield answer
                    return
                except _LostError as lost:  # for the sake of earlier files perhaps, or because it had been idle
                    if answered:
                        raise UnreadableVideo(source, str(lost)) from None
            try:
                yield from self._ask(_Child(self.memory), work, source)
            except _LostError as lost:
                raise UnreadableVideo(source, str(lost)) from None

    def _ask(self, child: "_Child", work: Callable[[], Any], source: VideoSource) -> Iterator[tuple[int, Any]]:
        usable, patience, left = False, self.silence, self.total or math.inf
        too_long = f"takes longer than {self.total or 0:g} s to decode"
        calls = getattr(self._thread, "calls", None) or _Calls()
        try:
            calls.begin(child)
            if not child.ready:
                child.ready = (
                    within(READ_TIMEOUT, source, child.receive, "no process could be started to decode it") is not None
                )
            child.send((_folder(), work))
            while not usable:
                began = time.monotonic()
                kind, value = within(min(patience, left), source, child.receive, too_long if left < patience else None)
                left = max(0.0, left - (time.monotonic() - began))
                patience = self.silence + (value if kind == _GOES_ON else 0)
                if kind == _NO_MEMORY:
                    raise _LostError(f"takes more than {self.memory / 2**30:.3g} GB to decode")
                usable = kind in (_RESULT, _ERROR)
                if kind == _ERROR:
                    raise value
                if kind in (_ITEM, _RESULT):
                    yield kind, value
        except _LostError:
            if calls.ended:
                raise concurrent.futures.CancelledError from None
            raise
        finally:
            calls.children.discard(child)
            if usable:
                self._idle.append(child)
            else:
                child.end()

    def _take(self) -> "_Child | None":
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                child = self._idle.pop()
                if child.parent == os.getpid():  # else it belongs to the process that this one was forked from
                    return child
        return None


class _Calls:
    """The calls of a pool's threads, which end together."""

    def __init__(self):
        self.ended, self.children = False, set[_Child]()
        self._lock = threading.Lock()

    def begin(self, child: "_Child") -> None:
        """Add the child of a call; raises CancelledError where the calls have ended."""
        with self._lock:
            if self.ended:
                raise concurrent.futures.CancelledError
            self.children.add(child)

    def end(self) -> None:
        """Kill the children of all calls, and let no other call begin."""
        with self._lock:
            self.ended = True
            for child in tuple(self.children):
                child.process.kill()


class _Child:
    """A Python process that runs functions one after the other."""

    def __init__(self, memory: int):
        code = f"import sys; sys.path[:] = {sys.path!a}; from {__name__} import serve; serve({memory})"
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.parent, self.ready = os.getpid(), False
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **one_thread}
        )

    def send(self, request: Any) -> None:
        """Send a request; raises _LostError where the child has ended."""
        try:
            _send(self.process.stdin, request)
        except OSError:
            raise _LostError(self._death()) from None

    def receive(self) -> tuple[int, Any]:
        """Wait for an answer; raises _LostError where the child has ended."""
        try:
            return _receive(self.process.stdout)
        except (OSError, EOFError):
            raise _LostError(self._death()) from None

    def _death(self) -> str:
        status = self.process.wait()
        return f"its decoder crashed ({f'signal {-status}' if status < 0 else f'exit status {status}'})"

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]


def _end_all(children: "list[_Child]") -> None:
    for child in children:
        if child.parent == os.getpid():
            child.end()


READER = IsolatedReader()


def _folder() -> str | None:
    """Return the folder that relative names mean; None where it was removed."""
    try:
        return os.getcwd()
    except OSError:
        return None


def _send(file: Any, message: Any) -> None:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    file.write(len(data).to_bytes(8, "big"))
    file.write(data)
    file.flush()


def _receive(file: Any) -> Any:
    size = file.read(8)
    data = file.read(int.from_bytes(size, "big"))
    if len(size) < 8 or len(data) < int.from_bytes(size, "big"):
        raise EOFError
    return pickle.loads(data)


# -- in the child ----------------------------------------------------------------------------------------------------

_answers: BinaryIO | None = None  # where the answers of this process go, if it is a child
_last_sign = 0.0  # when it last sent one


def beat(seconds: float = 0) -> None:
    """Let the parent of a child know that work goes on, and that the next sign may take `seconds` longer than usual."""
    global _last_sign
    if _answers is not None and (seconds or time.monotonic() > _last_sign + BEAT):
        _last_sign = time.monotonic()
        _send(_answers, (_GOES_ON, seconds))


def serve(memory: int) -> None:
    """Answer requests until there are no more, as a child of `memory` bytes."""
    global _answers
    asked, _answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # what decoders print
        os.dup2(silence, stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal, and the parent decides
    _limit(memory)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_take_requests, args=(asked, requests), daemon=True).start()
    with contextlib.suppress(queue.Empty, OSError):
        _send(_answers, (_READY, None))
        while True:
            _send(_answers, _answer(_answers, requests.get(timeout=IDLE)))
    os._exit(0)  # the thread waits in a read


def _take_requests(asked: BinaryIO, requests: "queue.SimpleQueue[Any]") -> None:
    while True:
        try:
            requests.put(_receive(asked))
        except EOFError:  # the parent has ended, whatever a decoder is doing here
            os._exit(0)
        except Exception as error:  # a function that cannot be imported here
            requests.put(error)


def _answer(file: BinaryIO, request: Any) -> tuple[int, Any]:
    try:
        if isinstance(request, Exception):
            return _ERROR, request
        folder, work = request
        if folder is not None and folder != _folder():
            os.chdir(folder)
        result = work()
        if inspect.isgenerator(result):
            for item in result:
                _send(file, (_ITEM, item))
            result = None
        return _RESULT, result
    except MemoryError:
        return _NO_MEMORY, None
    except Exception as error:
        if isinstance(error.__cause__, MemoryError):
            return _NO_MEMORY, None
        error.__cause__ = error.__context__ = None
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return _ERROR, RuntimeError(f"{type(error).__name__}: {error}")
        return _ERROR, error


def _limit(memory: int) -> None:
    if sys.platform == "linux":
        import resource

        # Not the address space, most of which is mapped libraries and costs nothing.
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
