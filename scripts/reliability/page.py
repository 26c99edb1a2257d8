"""Serve the page to many visitors at once, some of them hostile: every request must get a clear answer from a living server.

python -m promag.scripts.reliability.page --record docs/results/reliability.jsonl

Visitors sample videos of one or two steps, compare legal uploads, and give forged, huge, cut off and misnamed ones, values that
the page does not offer, and paths outside the folder of uploads. Memory is that of all processes of the page.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from promag.data.video import write_video
from promag.scripts._memory import Memory, watched
from promag.scripts._options import check_writable, share
from promag.training.command_line import Parser, run_main
from promag.training.config import UserError
from promag.training.run import append_result

from .corpus import picture
from .damage import box, put

PATIENCE = 600  # seconds for one answer
START = 300  # seconds until the page is served
SECRET = "root:"  # what no answer may hold, of a file that no visitor gave
SHOWN, REFUSED, WRONG = "shown", "refused", "wrong"


@dataclass(frozen=True)
class Request:
    """Something that a visitor asks, and whether it is legal."""

    kind: str
    legal: bool
    ask: Callable[["Visitor"], str]


@dataclass(frozen=True)
class Answer:
    """What became of a request: shown, refused in words, or wrong; and in how many seconds."""

    request: Request
    result: str
    seconds: float
    reason: str = ""


class Visitor:
    """A client of the page at an address."""

    def __init__(self, address: str):
        import httpx
        from gradio_client import Client

        self.client = Client(address, verbose=False)
        self.http = httpx.Client(base_url=address, timeout=PATIENCE)

    def sample(self, prompt: str, steps: Any = 1, frames: Any = 17, ratio: Any = 16, guidance: Any = 1.0, seed: Any = 0) -> str:
        """Ask for a video; return the page's answer in HTML."""
        return self.client.submit(prompt, "", ratio, frames, steps, guidance, seed, api_name="/make").result(PATIENCE)

    def compare(self, path: Path, side: Any = 64) -> str:
        """Upload a file and ask for its comparison."""
        from gradio_client import handle_file

        return self.client.submit(handle_file(path), side, api_name="/compare").result(PATIENCE)

    def compare_there(self, path: str) -> str:
        """Ask for the comparison of a file on the server's disk, without uploading it as Gradio's client would."""
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        asked = self.http.post("/gradio_api/call/compare", json={"data": [file, 64]}).raise_for_status().json()
        answer = self.http.get(f"/gradio_api/call/compare/{asked['event_id']}").text
        if answer.startswith("event: error"):
            raise PermissionError(f"refused: {answer[:200]}")
        return answer

    def get(self, place: str) -> str:
        """Fetch a path of the server; raises PermissionError where it is refused."""
        return _text(self.http.get(place))

    def upload(self, name: str, data: bytes = b"no video") -> str:
        """Upload bytes under a name; return where they lie, or raise PermissionError where they are refused."""
        return f"uploaded: {_text(self.http.post('/gradio_api/upload', files={'files': (name, data, 'video/mp4')}))}"


def _text(response: Any) -> str:
    if response.status_code in (400, 403, 404, 413):
        raise PermissionError(f"status {response.status_code}: {response.text[:200]}")
    return response.raise_for_status().text


# -- what visitors give ----------------------------------------------------------------------------------------------


def legal_uploads(folder: Path) -> Iterator[Path]:
    """Write videos that the page takes, up to its limits."""
    for name, frames, height, width, fps in (
        ("small.mp4", 24, 64, 96, 12),
        ("longer.mp4", 65, 128, 160, 25),
        ("one.mp4", 1, 64, 64, 12),
        ("panorama.mp4", 9, 32, 1024, 12),
        ("tower \N{FLAG IN HOLE}.mp4", 9, 1024, 32, 12),
    ):
        write_video(folder / name, picture(frames, height, width), fps)
        yield folder / name


def largest_upload(folder: Path) -> Path:
    """Write the largest video that the page takes, in a file of some kilobytes."""
    path = folder / "largest.mp4"
    write_video(path, (np.full((1, 2048, 2048, 3), 90, np.uint8) for _ in range(319)), 31.95)
    return path


def hostile_uploads(folder: Path) -> Iterator[Path]:
    """Write files that are no videos, that lie, and that are beyond the limits."""
    write_video(folder / "good.mp4", picture(24, 64, 96), 12)
    good = (folder / "good.mp4").read_bytes()
    sizes, times = box(good, b"stsz"), box(good, b"stts")
    target = Path("/etc/passwd")
    files = {
        "forged-2-billion.mp4": put(good, sizes + 4, ">II", 1, 0x7FFFFFFF),
        "forged-100-million.mp4": put(put(good, sizes + 4, ">II", 1, 100_000_000), times + 8, ">I", 100_000_000),
        "forged-sample.mp4": put(good, sizes + 32, ">I", 0x7FFFFFFF),
        "playlist.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5.0,\nfile://{target}\n#EXT-X-ENDLIST\n".encode(),
        "concat.mp4": f"ffconcat version 1.0\nfile {target}\n".encode(),
        "truncated.mp4": good[: len(good) // 2],
        "text.mp4": b"This is no video.\n" * 200,
        "empty.mp4": b"",
        "text.txt": b"This is no video.\n",
        "<script>alert(1)</script>.mp4".replace("/", "\N{DIVISION SLASH}"): b"<script>alert(1)</script>",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
        yield folder / name
    yield huge(folder / "wide.gif", 20_000, 64)
    write_video(folder / "long.mp4", picture(330, 32, 32), 25)
    yield folder / "long.mp4"


def huge(path: Path, width: int, height: int) -> Path:
    """Write one huge frame."""
    Image.new("L", (width, height)).save(path)
    return path


def requests(folder: Path, outside: Path, count: int, seed: int, largest: bool) -> list[Request]:
    """Return `count` requests in an order that `seed` decides: about half of them legal."""
    outside.mkdir()
    secret = outside / "secret.mp4"
    write_video(secret, picture(9, 64, 96), 12)
    legal = [
        Request("sample at 1 step", True, lambda visitor: visitor.sample("a red disc moves left")),
        Request("sample at 2 steps", True, lambda visitor: visitor.sample("a blue square", steps=2, ratio=4)),
        *(_upload("legal upload", True, path, 64) for path in legal_uploads(folder)),
        _upload("legal upload", True, folder / "small.mp4", 128),
    ]
    hostile = [
        *(_upload(f"upload {path.name}", False, path, 64) for path in hostile_uploads(folder)),
        Request("huge prompt", False, lambda visitor: visitor.sample("x" * 2_000_000)),
        Request("a billion steps", False, lambda visitor: visitor.sample("a", steps=10**9)),
        Request("other ratio", False, lambda visitor: visitor.sample("a", ratio=3)),
        Request("other frames", False, lambda visitor: visitor.sample("a", frames=10**6)),
        Request("other seed", False, lambda visitor: visitor.sample("a", seed=-1)),
        Request("other side", False, lambda visitor: visitor.compare(folder / "small.mp4", side=4096)),
        Request("path of a video on the disk", False, lambda visitor: visitor.compare_there(str(secret))),
        Request("address of a video", False, lambda visitor: visitor.compare_there("https://example.com/video.mp4")),
        Request("path of a file on the disk", False, lambda visitor: visitor.compare_there("/etc/passwd")),
        *(
            Request("path in the address", False, lambda visitor, place=place: visitor.get(place))
            for place in (
                "/gradio_api/file=/etc/passwd",
                f"/gradio_api/file={secret}",
                "/gradio_api/file=../../../../../etc/passwd",
                "/gradio_api/file=%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
                "/file=/etc/passwd",
                "/static/..%2f..%2f..%2f..%2f..%2fetc/passwd",
            )
        ),
        Request("40 MB", False, lambda visitor: visitor.upload("large.mp4", bytes(40 * 2**20))),
        Request("name that climbs", False, lambda visitor: visitor.upload("../../../climbed.mp4")),
        Request("name that climbs", False, lambda visitor: visitor.upload("..%2f..%2fclimbed.mp4")),
    ]
    if largest:
        hostile.append(_upload("upload square.gif", False, huge(folder / "square.gif", 12_000, 12_000), 64))
    rng = np.random.default_rng(seed)
    chosen: list[Request] = [pool[int(k) % len(pool)] for pool in (legal, hostile) for k in range((count + 1) // 2)]
    if largest:
        at_limit = _upload("largest legal upload", True, largest_upload(folder), 64)
        chosen[: max(1, count // 100)] = [at_limit] * max(1, count // 100)
    return [chosen[int(k)] for k in rng.permutation(len(chosen))[:count]]


def _upload(kind: str, legal: bool, path: Path, side: int) -> Request:
    return Request(kind, legal, lambda visitor: visitor.compare(path, side))


# -- what they are answered ------------------------------------------------------------------------------------------


def answer(request: Request, visitor: Visitor) -> Answer:
    """Ask, and judge the answer."""
    from gradio_client.exceptions import AppError

    began = time.monotonic()
    try:
        text = request.ask(visitor)
    except (AppError, PermissionError) as error:
        text, result = str(error), REFUSED
    except Exception as error:
        return Answer(request, WRONG, time.monotonic() - began, f"{type(error).__name__}: {error}"[:300])
    else:
        result = REFUSED if 'role="alert"' in text or text.startswith("uploaded:") else SHOWN
    words = len(text.split()) > 1 and "Traceback" not in text and "std::" not in text
    wrong = result != (SHOWN if request.legal else REFUSED) or SECRET in text or (result == REFUSED and not words)
    return Answer(request, WRONG if wrong else result, time.monotonic() - began, text[:300] if wrong else "")


@contextlib.contextmanager
def served(tokenizer: str, pipeline: str, folder: Path) -> Iterator[tuple[str, int]]:
    """Serve the page in a process of its own, its uploads in `folder`; give its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "promag", "app", "--tokenizer", tokenizer, "--pipeline", pipeline, "--port", str(port)]
    log = open(folder / "page.log", "w+b")  # noqa: SIM115 (closed below)
    process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "GRADIO_TEMP_DIR": str(folder / "uploads")})
    try:
        ended = time.monotonic() + START
        while b"the page is at" not in (folder / "page.log").read_bytes():
            if process.poll() is not None or time.monotonic() > ended:
                raise UserError(
                    f"the page does not start: {(folder / 'page.log').read_text(encoding='utf-8', errors='replace')[-500:]}"
                )
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait()
        log.close()


def visit(address: str, asked: Sequence[Request], clients: int) -> list[Answer]:
    """Let so many clients ask the requests side by side."""
    visitors = threading.local()

    def ask(request: Request) -> Answer:
        if not hasattr(visitors, "own"):
            visitors.own = Visitor(address)
        return answer(request, visitors.own)

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, asked))


def main(argv: Sequence[str]) -> int:
    """Print what was asked and answered; the exit status is 1 where an answer is wrong or the server is not alive."""
    parser = Parser(__doc__)
    parser.add_argument("--tokenizer", default="checkpoints/tiny", help="folder of a tokenizer")
    parser.add_argument("--pipeline", default="checkpoints/tiny-video", help="folder of a pipeline")
    parser.add_argument("--clients", type=int, default=8, help="visitors at a time")
    parser.add_argument("--requests", type=int, default=200, help="requests of all visitors")
    parser.add_argument("--seed", type=int, default=0, help="seed of their order")
    share(parser, "--record", "--note")
    arguments = parser.parse_args(argv)
    check_writable("--record", arguments.record, appended=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "given").mkdir()
        asked = requests(folder / "given", folder / "outside", arguments.requests, arguments.seed, largest=True)
        before = {path for path in folder.rglob("*") if path.is_file()}
        with served(arguments.tokenizer, arguments.pipeline, folder) as (address, process), watched(process) as memory:
            began = time.monotonic()
            answers = visit(address, asked, arguments.clients)
            seconds = time.monotonic() - began
            checked = visit(address, [request for request in asked if request.legal][:2], 1)
        alive = all(one.result == SHOWN for one in checked)
        after = {path for path in folder.rglob("*") if path.is_file() and folder / "uploads" not in path.parents}
        written = sorted(str(path.relative_to(folder)) for path in after - before - {folder / "page.log"})
    figures = summary(answers, memory, seconds, arguments.clients, alive, written)
    for one in answers:
        if one.result == WRONG:
            print(f"{one.request.kind}: {one.reason!r}")
    print(json.dumps(figures))
    if arguments.record:
        append_result(arguments.record, {**figures, "note": arguments.note})
    return 0 if alive and not written and not figures["wrong"] else 1


def summary(
    answers: Sequence[Answer], memory: Memory, seconds: float, clients: int, alive: bool, written: Sequence[str]
) -> dict[str, Any]:
    """Return the figures to record."""
    results = Counter(one.result for one in answers)
    return {
        "what": "requests to the page",
        "clients": clients,
        "requests": len(answers),
        "legal": sum(one.request.legal for one in answers),
        **{result: results[result] for result in (SHOWN, REFUSED, WRONG)},
        "alive": alive,
        "written_elsewhere": list(written),
        "seconds": round(seconds, 1),
        "slowest_answer_seconds": round(max(one.seconds for one in answers), 1),
        "resident_mib": {
            "models": memory.first >> 20,
            "most": memory.most >> 20,
            "beside_models": (memory.most - memory.first) >> 20,
        },
        "kinds": dict(Counter(one.request.kind for one in answers)),
    }


if __name__ == "__main__":
    raise SystemExit(run_main(main))
