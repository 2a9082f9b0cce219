"""The least an MCP host does: start a server, shake hands, call tools; JSON-RPC over its stdio."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from clients.sandbox import Sandbox
from e2e.live import terminate

PROTOCOL = "2025-03-26"


@dataclass(frozen=True)
class Said:
    """What a tool answered."""

    text: str
    is_error: bool

    @property
    def json(self) -> Any:
        """The answer of a tool that did not fail."""
        assert not self.is_error, self.text
        return json.loads(self.text)


class McpServer:
    """An MCP server in a sandbox, for as long as the ``with`` block runs."""

    def __init__(self, sandbox: Sandbox, *command: str) -> None:
        self._sandbox = sandbox
        self._command = command
        self._count = 0

    def __enter__(self) -> Self:
        errors = self._sandbox.home / "mcp-stderr.txt"
        with errors.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._sandbox.home,
                env=self._sandbox.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        host = {"name": "test-host", "version": "1"}
        hello = {"protocolVersion": PROTOCOL, "capabilities": {}, "clientInfo": host}
        try:
            self.info = self._request("initialize", hello)
        except BaseException:
            self._stop()
            raise
        self._send({"method": "notifications/initialized"})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def tools(self) -> set[str]:
        """The names of its tools."""
        return {tool["name"] for tool in self._request("tools/list", {})["tools"]}

    def call(self, tool: str, **arguments: Any) -> Said:
        """Call a tool and wait for what it says."""
        result = self._request("tools/call", {"name": tool, "arguments": arguments})
        text = "\n".join(part.get("text", "") for part in result["content"])
        return Said(text, bool(result.get("isError")))

    def _request(self, method: str, params: Mapping[str, Any]) -> Any:
        self._count += 1
        self._send({"id": self._count, "method": method, "params": dict(params)})
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith("{"):
                continue  # the Python server greets in plain text
            message = json.loads(line)
            if message.get("id") == self._count:
                assert "result" in message, message
                return message["result"]
        raise AssertionError((self._sandbox.home / "mcp-stderr.txt").read_text()[-3000:])

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        self._process.stdin.flush()

    def _stop(self) -> None:
        terminate(self._process, 10)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
