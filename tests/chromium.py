"""A headless Chromium that is driven over its own debugging protocol, in real time: for pages of a server."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-port=0 "
    "--window-size=1500,1100 --site-per-process about:blank"
)


class Page:
    """One page, and the frames in it that are of another origin, such as sandboxed ones."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, session: str) -> None:
        self._socket = socket
        self._session = session
        self._number = 0
        self.said: list[str] = []
        """Errors and exceptions on the console, of the frames too."""

    async def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Return a command's result."""
        self._number += 1
        asked = {"id": self._number, "method": method, "params": params}
        target = self._session if session is None else session
        await self._socket.send_json(asked | ({"sessionId": target} if target else {}))
        while True:
            told = json.loads((await self._socket.receive()).data)
            if told.get("id") == self._number:
                assert "error" not in told, told["error"]
                return dict(told["result"])
            if told.get("method") == "Runtime.exceptionThrown":
                self.said.append(json.dumps(told["params"]["exceptionDetails"])[:500])
            if told.get("method") == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.said.append(json.dumps(told["params"]["entry"])[:500])

    async def value(self, script: str, session: str | None = None) -> Any:
        """Return what a script gives."""
        found = await self.ask("Runtime.evaluate", session, expression=script, returnByValue=True)
        return found["result"].get("value")

    async def go(self, address: str) -> None:
        """Open an address."""
        await self.ask("Page.navigate", url=address)

    async def wait(self, script: str, seconds: float = 120.0, session: str | None = None) -> None:
        """Wait until a script gives something true."""
        deadline = time.monotonic() + seconds
        while not await self.value(script, session):
            assert time.monotonic() < deadline, f"{script} did not come true in {seconds:g} s"
            await asyncio.sleep(0.3)

    async def frame(self, begins: str, seconds: float = 120.0) -> str:
        """Wait for a frame whose address begins so, and return its session."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for target in (await self.ask("Target.getTargets", ""))["targetInfos"]:
                if target["type"] == "iframe" and target["url"].startswith(begins):
                    to = {"targetId": target["targetId"], "flatten": True}
                    session = str((await self.ask("Target.attachToTarget", "", **to))["sessionId"])
                    for domain in ("Runtime", "Log"):
                        await self.ask(f"{domain}.enable", session)
                    return session
            await asyncio.sleep(0.3)
        raise AssertionError(f"no frame of {begins}")

    async def picture(self, path: Path) -> None:
        """Write what is seen, as a PNG."""
        path.write_bytes(base64.b64decode((await self.ask("Page.captureScreenshot"))["data"]))


def look(place: Path, visit: Callable[[Page], Coroutine[Any, Any, None]]) -> list[str]:
    """Let ``visit`` have a page of a fresh browser; return what the page wrote on its console as errors."""
    assert CHROMIUM
    profile = place / "profile"
    with subprocess.Popen(
        [CHROMIUM, *_FLAGS.split(), f"--user-data-dir={profile}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as browser:
        try:
            port, path = _address(profile / "DevToolsActivePort")
            return asyncio.run(_visited(f"ws://127.0.0.1:{port}{path}", visit))
        finally:
            browser.terminate()


def _address(file: Path, seconds: float = 120.0) -> tuple[str, str]:
    deadline = time.monotonic() + seconds
    while not file.exists() or len(lines := file.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline, "Chromium did not start"
        time.sleep(0.1)
    return lines[0], lines[1]


async def _visited(address: str, visit: Callable[[Page], Coroutine[Any, Any, None]]) -> list[str]:
    async with aiohttp.ClientSession() as client, client.ws_connect(address, max_msg_size=0) as socket:
        first = Page(socket, "")
        targets = (await first.ask("Target.getTargets"))["targetInfos"]
        (page,) = (each for each in targets if each["type"] == "page")
        session = (await first.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True))["sessionId"]
        mine = Page(socket, str(session))
        mine._number = first._number
        for domain in ("Page", "Runtime", "Log"):
            await mine.ask(f"{domain}.enable")
        await visit(mine)
        return mine.said
