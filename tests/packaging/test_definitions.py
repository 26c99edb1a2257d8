""" "Go to definition" after `make setup`, asked from pyright's language server, leads to the real file."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.packaging.conftest import ENVIRONMENT

SERVER = Path(sys.executable).with_name("pyright-langserver")


class LanguageServer:
    """The part of the language server protocol that one query needs."""

    def __init__(self, folder: Path) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([SERVER, "--stdio"], cwd=folder, env=ENVIRONMENT, stdin=pipe, stdout=pipe)
        uri = folder.as_uri()
        folders = [{"uri": uri, "name": "promag"}]
        capabilities = {"workspace": {"configuration": True}}
        self.ask("initialize", processId=None, rootUri=uri, workspaceFolders=folders, capabilities=capabilities)
        self.send(method="initialized", params={})

    def send(self, **message: Any) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.process.stdin.flush()

    def messages(self) -> Iterator[dict[str, Any]]:
        while header := self.process.stdout.readline():
            if header.lower().startswith(b"content-length:"):
                length = int(header.split(b":")[1])
                while self.process.stdout.readline().strip():
                    pass
                yield json.loads(self.process.stdout.read(length))

    def ask(self, method: str, **params: Any) -> Any:
        self.send(id=method, method=method, params=params)
        for message in self.messages():
            if message.get("id") == method and "method" not in message:
                return message["result"]
            if "id" in message and message.get("method") == "workspace/configuration":
                self.send(id=message["id"], result=[{} for _ in message["params"]["items"]])
            elif "id" in message:
                self.send(id=message["id"], result=None)
        raise AssertionError(f"the server ended before it answered {method}")

    def definition(self, file: Path, name: str) -> list[str]:
        """Return the URIs of the files that define a name, at its first mention in the file."""
        text = file.read_text(encoding="utf-8")
        before = text[: text.index(name)]
        document = {"uri": file.as_uri(), "languageId": "python", "version": 1, "text": text}
        self.send(method="textDocument/didOpen", params={"textDocument": document})
        position = {"line": before.count("\n"), "character": len(before) - before.rfind("\n") - 1}
        locations = self.ask("textDocument/definition", textDocument={"uri": file.as_uri()}, position=position)
        return [place["uri"] for place in locations]


@pytest.mark.skipif(not SERVER.exists(), reason="pyright is not installed")
def test_definitions_in_other_subpackages_lead_to_real_files(places):
    place = places["editable"]
    place.run(place.root / ".ci" / "typing_stubs.py")
    server = LanguageServer(place.root)
    try:
        for file, name, home in (
            ("scripts/evaluate_tokenizer.py", "check_frames", "tokenizer/geometry.py"),
            ("pipelines/sampling.py", "UserError", "training/config.py"),
            ("scripts/compare_budgets.py", "BudgetCosts", "evaluation/cost.py"),
        ):
            assert server.definition(place.root / file, name) == [(place.root / home).as_uri()]
    finally:
        server.process.kill()
