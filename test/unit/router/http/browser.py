"""A headless Chromium, controlled over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

DEADLINE_S = 30.0
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
WHY_NOT = "no Chromium is installed (Debian: apt-get install chromium)"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-port=0", "--mute-audio", "--no-proxy-server", "--disable-extensions",
)  # fmt: skip


class Page:
    """One tab, or the browser itself."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._credentials = ("", "")
        self._tasks: set[asyncio.Task[object]] = set()
        self.complaints: list[str] = []
        """Messages of the console, of the content policy, and of uncaught errors."""

    async def listen(self) -> None:
        """Handle messages of the browser until it is closed."""
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told)
            elif told["method"] == "Fetch.requestPaused":
                self._later(self.send("Fetch.continueRequest", requestId=told["params"]["requestId"]))
            elif told["method"] == "Fetch.authRequired":
                name, password = self._credentials
                answer = {"response": "ProvideCredentials", "username": name, "password": password}
                asked = told["params"]["requestId"]
                self._later(
                    self.send("Fetch.continueWithAuth", requestId=asked, authChallengeResponse=answer)
                )
            elif told["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(told["params"]["exceptionDetails"]))
            elif told["method"] == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.complaints.append(json.dumps(told["params"]["entry"]))

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command; its result."""
        number = next(self._ids)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(DEADLINE_S):
            answer = await self._answers[number]
        assert "error" not in answer, (method, answer)
        result: dict[str, Any] = answer["result"]
        return result

    def _later(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def log_in(self, name: str, password: str) -> None:
        """Answer the browser's authentication dialog with these credentials."""
        self._credentials = (name, password)
        await self.send("Fetch.enable", handleAuthRequests=True)

    async def open(self, url: str) -> None:
        await self.send("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def value(self, script: str) -> Any:
        """The value of an expression; promises are awaited."""
        told = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, (script, told["exceptionDetails"])
        return told["result"].get("value")

    async def until(self, script: str) -> None:
        """Wait until an expression is true."""
        async with asyncio.timeout(DEADLINE_S):
            while not await self.value(f"!!({script})"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def press(self, key: str, code: int) -> None:
        """Press a key."""
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        for kind in ("keyDown", "keyUp"):
            await self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text
            )

    async def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the window size and the light or dark colour scheme."""
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])

    async def picture(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the window."""
        shot = await self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(shot["data"]))


@contextmanager
def running_browser(profile: Path) -> Iterator[int]:
    """A browser, as the port of its DevTools; `profile` is its own folder."""
    assert CHROMIUM, WHY_NOT
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={profile}"], **quiet) as process:
        try:
            yield _port_of(profile / "DevToolsActivePort", process)
        finally:
            process.kill()


@asynccontextmanager
async def new_page(port: int) -> AsyncIterator[Page]:
    """An empty tab that shares nothing with other tabs of the browser at `port`."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/version") as response:
            url = (await response.json())["webSocketDebuggerUrl"]
        async with _connected(session, url) as browser:
            context = await browser.send("Target.createBrowserContext", disposeOnDetach=True)
            tab = await browser.send("Target.createTarget", url="about:blank", **context)
            url = f"ws://127.0.0.1:{port}/devtools/page/{tab['targetId']}"
            async with _connected(session, url) as page:
                for domain in ("Page", "Runtime", "Log"):
                    await page.send(f"{domain}.enable")
                yield page


@asynccontextmanager
async def _connected(session: aiohttp.ClientSession, url: str) -> AsyncIterator[Page]:
    async with session.ws_connect(url, max_msg_size=1 << 28) as socket:
        page = Page(socket)
        listening = asyncio.create_task(page.listen())
        yield page
        listening.cancel()


def _port_of(path: Path, process: subprocess.Popen[bytes]) -> int:
    """The DevTools port, which the browser writes to a file."""
    end = time.monotonic() + DEADLINE_S
    while not (path.exists() and path.read_text()):
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        assert time.monotonic() < end, "the browser does not start"
        time.sleep(0.02)
    return int(path.read_text().splitlines()[0])
