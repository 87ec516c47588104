"""The page at /ui in a real browser: content, keyboard use, and no script from ids or prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from memserve.scheduling.context import Prompt
from memserve.testing.fake_worker import FakeWorker
from memserve.wire.messages import Role

from ..harness import Stage, info_of, staged
from .browser import CHROMIUM, WHY_NOT, Page, new_page, running_browser
from .test_ui import decision, log

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)

HOSTILE = "<img src=x onerror=\"document.title='owned'\">'\"><script>document.title='owned'</script>"
TAB = ("Tab", 9)
ENTER = ("Enter", 13)
ESCAPE = ("Escape", 27)
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const colour = (text) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (let one = node; one; one = one.parentElement) {
      const rgb = colour(getComputedStyle(one).backgroundColor);
      if (rgb[3] === 255) return rgb;
    }
    return [255, 255, 255, 255];
  };
  const poor = [];
  for (const node of document.querySelectorAll('body *')) {
    const said = [...node.childNodes].some((one) => one.nodeType === 3 && one.textContent.trim());
    if (!said || !node.checkVisibility() || node.closest('.skip, noscript')) continue;
    const [a, b] = [light(colour(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) poor.push([node.tagName, node.className, node.textContent.slice(0, 20), ratio]);
  }
  return poor;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with running_browser(tmp_path_factory.mktemp("profile")) as port:
        yield port


@asynccontextmanager
async def shown(browser: int, **settings: Any) -> AsyncIterator[tuple[Stage, Page]]:
    """The page of a router with a pair, an instance whose id is an attack, requests and a prefix."""
    workers = [FakeWorker(role) for role in (Role.PREFILL, Role.DECODE)]
    async with (
        staged(*workers, ui_show_prompts=True, **settings) as stage,
        FakeWorker() as other,
    ):
        stage.router.cluster.register(info_of(other, name=HOSTILE))
        await stage.until(lambda: len(stage.router.cluster.snapshot.all()) == 3)
        for number in range(3):
            log(stage, f"rid-{number}", decision=decision(stage), cached_tokens=16)
        log(stage, HOSTILE, 502)
        prompt = Prompt(64, ([bytes([7] * 32)],))  # type: ignore[list-item]
        for _ in range(3):
            stage.router.state.telemetry.prefixes.note(prompt, HOSTILE)
        async with new_page(browser) as page:
            await page.look(1280, 900)
            await page.open(stage.url("/ui"))
            await page.until("document.querySelectorAll('#requests tr').length === 4")
            yield stage, page


async def text_of(page: Page, selector: str) -> str:
    return str(await page.value(f"document.querySelector({selector!r}).textContent"))


async def test_dashboard_shows_the_cluster_and_follows_its_changes(browser: int) -> None:
    async with shown(browser) as (stage, page):
        assert await page.value("document.querySelectorAll('#instances tr').length") == 3
        assert "serving" in await text_of(page, "#health")
        await page.until("document.querySelectorAll('#prefixes tr').length === 1")
        log(stage, "later")
        await page.until("document.querySelectorAll('#requests tr').length === 5")
        stage.router.cluster.drain(stage.router.cluster.members()[0])
        await page.until("document.querySelector('#instances').textContent.includes('draining')")
        assert page.complaints == []


async def test_dashboard_shows_names_and_prompts_as_text(browser: int) -> None:
    async with shown(browser) as (_, page):
        await page.until("document.querySelectorAll('#prefixes tr').length === 1")
        for place in ("#instances", "#prefixes"):
            assert HOSTILE in await text_of(page, place)
        await page.value("document.querySelector('#requests button').click()")
        await page.until("document.querySelector('#why-body dl')")
        assert HOSTILE in await text_of(page, "#why")
        assert not await page.value("document.querySelectorAll('main img, main script, dialog img').length")
        inline = "Object.assign(document.createElement('script'), { textContent: 'document.title = 5' })"
        await page.value(f"document.body.append({inline})")
        assert await page.value("document.title") == "MemServe"


async def test_dashboard_can_be_used_by_keyboard(browser: int) -> None:
    async with shown(browser) as (stage, page):
        reached = []
        for _ in range(40):
            await page.press(*TAB)
            focused = await page.value("document.activeElement.id || document.activeElement.className")
            reached.append(focused)
            outline = "getComputedStyle(document.activeElement).outlineStyle"
            assert await page.value(outline) != "none", focused
            if focused == "link":
                break
        assert reached[:2] == ["skip", "pause"]
        assert "faults" in reached
        name = await page.value("document.activeElement.title")
        log(stage, "newer")
        await page.until("document.querySelectorAll('#requests tr').length === 5")
        assert await page.value("document.activeElement.title") == name  # news do not take it
        await page.press(*ENTER)
        await page.until("document.querySelector('#why').open && document.querySelector('#why-body dl')")
        await page.press(*ESCAPE)
        await page.until("!document.querySelector('#why').open")
        assert await page.value("document.activeElement.title") == name


async def test_dashboard_shortens_long_ids_to_different_texts(browser: int) -> None:
    async with shown(browser) as (stage, page):
        for end in ("1", "2"):
            log(stage, "a" * 31 + end)
        await page.until("document.querySelectorAll('#requests tr').length === 6")
        names = "[...document.querySelectorAll('#requests button')].map((one) => one.textContent)"
        told = await page.value(names)
        assert len(set(told)) == 6
        assert max(map(len, told)) <= 16


async def test_dashboard_shows_the_decision_of_a_request(browser: int) -> None:
    async with shown(browser) as (stage, page):
        await page.value("document.querySelector('#requests button[title=x-rid-1]').click()")
        await page.until("document.querySelector('#why-body tbody tr')")
        _, told = await stage.get("/requests/rid-1")
        assert told["decision"]["reason"] in await text_of(page, "#why-body")
        assert "chosen" in await text_of(page, "#why-body tr.chosen")


async def test_dashboard_does_not_poll_while_paused(browser: int) -> None:
    async with shown(browser) as (stage, page):
        await page.value("document.querySelector('#pause').click()")
        assert await page.value("document.querySelector('#pause').getAttribute('aria-pressed')") == "true"
        asked = "performance.getEntriesByType('resource').length"
        before = await page.value(asked)
        log(stage, "unseen")
        await asyncio.sleep(1.5)  # longer than it waits between two looks
        assert await page.value(asked) <= before + 1
        await page.value("document.querySelector('#pause').click()")
        await page.until("document.querySelector('#requests').textContent.includes('x-unseen')")


async def test_dashboard_can_show_only_failed_requests(browser: int) -> None:
    async with shown(browser) as (_, page):
        await page.value("document.querySelector('#faults').click()")
        await page.until("document.querySelectorAll('#requests tr').length === 1")
        assert "502" in await text_of(page, "#requests")


async def test_dashboard_reports_a_router_that_does_not_answer(browser: int) -> None:
    async with new_page(browser) as page:
        async with staged(FakeWorker(Role.PREFILL), FakeWorker(Role.DECODE)) as stage:
            await page.open(stage.url("/ui"))
            await page.until("document.querySelectorAll('#instances tr').length === 2")
        await page.until("!document.querySelector('#trouble').hidden")
        assert "does not answer" in await text_of(page, "#trouble")


async def test_dashboard_loads_with_basic_authentication(browser: int) -> None:
    async with staged(FakeWorker(), api_key="open sesame") as stage, new_page(browser) as page:
        await page.log_in("anybody", "open sesame")
        await page.open(stage.url("/ui"))
        await page.until("document.querySelectorAll('#instances tr').length === 1")
        assert "serving" in await text_of(page, "#health")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
async def test_dashboard_is_readable_at_any_width_in_light_and_dark_mode(
    browser: int, width: int, dark: bool
) -> None:
    async with shown(browser) as (_, page):
        await page.look(width, 800, dark=dark)
        await page.until("document.querySelectorAll('#prefixes tr').length === 1")
        assert await page.value("document.documentElement.scrollWidth") <= width
        assert await page.value(CONTRAST) == []
        await page.value("document.querySelector('#requests button[title=x-rid-1]').click()")
        await page.until("document.querySelector('#why-body tbody tr')")
        assert await page.value(CONTRAST) == []
        assert await page.value("document.querySelector('#why').getBoundingClientRect().right") <= width


async def test_dashboard_elements_have_accessible_names(browser: int) -> None:
    """Screen readers need a name for each control and table."""

    async with shown(browser) as (_, page):
        tree = (await page.send("Accessibility.getFullAXTree"))["nodes"]
        named: dict[str, list[str]] = {}
        for node in tree:
            if not node.get("ignored"):
                role = node["role"]["value"]
                named.setdefault(role, []).append(node.get("name", {}).get("value", ""))
        assert {"main", "banner", "table", "columnheader", "rowheader", "status"} <= named.keys()
        for role in ("button", "region", "checkbox", "heading", "columnheader"):
            assert all(named[role]), (role, named[role])
        assert await page.value("document.documentElement.lang") == "en"
        assert await page.value("document.querySelectorAll('h1').length") == 1
