"""The pages in a real Chromium: links, filters, network, console, paper, narrow screens, contrast, time to render.

Needs selenium (tox -e browser brings it) and, from the distribution, Chromium with its driver.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import reports
from reports import html
from suites.selftest.test_history import accuracy
from suites.selftest.test_report import (
    DETAILS,
    VERDICTS,
    WAIVER,
    Event,
    case_event,
    claim_event,
    end_event,
    run_event,
    timed,
    write_record,
)

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: tox -e browser brings it")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="there is no Chromium with its driver here: apt-get install chromium chromium-driver",
)

CASES = 500
FAST = 2.0  # seconds until 500 cases stand on the screen
READABLE = 4.5  # WCAG 2.2, 1.4.3: contrast of text
NARROW = 390  # CSS pixels of a telephone held upright
Browser = Any
Check = Callable[[Browser, Path], None]

# When the page stood on the screen: the second frame after the load event has painted it.
PAINTED = """
addEventListener("load", () => requestAnimationFrame(() => requestAnimationFrame(() => {
  window.painted = performance.now();
})));
"""
AFTER_PAINT = """
const done = arguments[0], look = () => window.painted ? done(window.painted) : requestAnimationFrame(look);
look();
"""
# Whether an element comes into view within two seconds: what is unfolded before it takes some of them.
ARRIVED = """
const [name, done] = arguments, until = performance.now() + 2000;
const look = () => {
  const box = document.getElementById(name)?.getBoundingClientRect();
  if (box?.height && box.top < innerHeight && box.bottom > 0) done(true);
  else if (performance.now() > until) done(false);
  else requestAnimationFrame(look);
};
look();
"""
# Every text that is seen, by its contrast with the first opaque background behind it; the lowest first.
CONTRAST = """
const light = colour => {
  const [r, g, b] = colour.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const parts = text => text.match(/[\\d.]+/g).map(Number);
const opaque = text => text.startsWith("rgb(") && parts(text);
const white = [255, 255, 255];
const behind = node => node ? opaque(getComputedStyle(node).backgroundColor) || behind(node.parentElement) : white;
const lowest = new Map();
const walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const node = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
  if (!text || !node.checkVisibility() || node.closest("script, style")) continue;
  const style = getComputedStyle(node), colour = parts(node.closest("svg") ? style.fill : style.color).slice(0, 3);
  const back = behind(node), [a, b] = [light(colour), light(back)].sort((x, y) => y - x);
  const ratio = (a + .05) / (b + .05), pair = `${colour} on ${back}`;
  if (!lowest.has(pair)) lowest.set(pair, [ratio, pair, text.slice(0, 60)]);
}
return [...lowest.values()].sort((x, y) => x[0] - y[0]);
"""
# What the filters act on: where it stands, which case it is of, and whether it is seen.
ROWS = """
return Array.from(document.querySelectorAll("[data-row]")).map(node => [
  node.tagName === "TR" ? node.closest("table").className : node.tagName.toLowerCase(),
  node.dataset.row.trim(), !node.hidden && getComputedStyle(node).display !== "none"]);
"""


# ---- pages ---------------------------------------------------------------------------------------------------------


def names(count: int) -> list[str]:
    kinds = ("onnx-fp32-ort-cpu", "onnx-fp16-ort-cpu", "engine-fp16-trt-cuda", "engine-int8-trt-cuda")
    return [f"model{index // len(kinds)}-{kinds[index % len(kinds)]}" for index in range(count)]


def verdict(index: int, day: int = 1) -> str:
    """What a case's first claim ends with: every fifth with another word, on each day other ones."""
    return "PASS" if (index + day) % 5 else VERDICTS[(index + day) // 5 % len(VERDICTS)]


def many_cases(count: int, day: int = 1, slower: float = 1.0) -> list[Event]:
    """A run with the details of every verdict, in which each case is measured, judged by a metric and waived."""
    lines: list[Event] = [
        run_event(run=f"run-{day}", time=f"2026-11-{day:02}T17:05:01Z", machine={"id": f"machine-{day % 2}"})
    ]
    for index, case in enumerate(names(count)):
        lines.append(case_event(case))
        word = verdict(index, day)
        told = {"because": f"what {word} says"} | DETAILS.get(word, {})
        lines.append(claim_event(case, "test_outputs_match_reference", word, **told))
        lines += [claim_event(case, f"test_claim_{column}", "PASS", **DETAILS["PASS"]) for column in range(8)]
        lines.append(claim_event(case, "test_accuracy_against_labels", "PASS", **accuracy(0.9)))
        lines.append(claim_event(case, "test_names_are_kept", "WAIVED", waiver=WAIVER))
        lines.append(claim_event(case, "test_p50_within_baseline", "PASS", **timed(24.0 * slower, baseline=24.0)))
    return [*lines, end_event(1)]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three kinds of pages, and a small report that tests may damage."""
    root = tmp_path_factory.mktemp("pages")
    big = write_record(root / "big", many_cases(CASES))
    days = [write_record(root / f"day{day}", many_cases(60, day, 1 + day / 10)) for day in (1, 2, 3)]
    reports.write_comparison(days[0], write_record(root / "more", many_cases(80, 5, 1.5)), root)
    reports.write_history(days, root)
    return {
        "report": reports.write([big], root / "big")["html"],
        "small": reports.write([days[0]], root / "small")["html"],
        "comparison": root / "comparison.html",
        "history": root / "history.html",
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium that logs its console and every request."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # Chromium refuses its sandbox to root, as whom containers run; the small /dev/shm of a container would end it.
    flags = ["--headless=new", "--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": PAINTED})
    yield driver
    driver.quit()


def go(browser: Browser, page: Path, width: int = 1280, scheme: str = "light") -> None:
    """Opens a page anew, on a screen of this width and in this colour scheme; logs hold this page alone."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == NARROW}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    # Without motion: a click would come while a field still moves.
    wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wishes.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.as_uri())


def unfold(browser: Browser, cases: int = 30) -> None:
    """Opens what is folded, of that many cases: their details are what is widest and has most colours."""
    for what in ("details.case", "details"):
        browser.execute_async_script(
            "Array.from(document.querySelectorAll(arguments[0])).slice(0, arguments[1])"
            ".forEach(node => { node.open = true; });"
            "setTimeout(arguments[2], 100);",  # the page makes elements of the details when it hears of it
            what,
            cases,
        )


# ---- what holds for every page -------------------------------------------------------------------------------------


def console_is_empty(browser: Browser, page: Path) -> None:
    go(browser, page)
    assert browser.get_log("browser") == []


def nothing_is_requested(browser: Browser, page: Path) -> None:
    go(browser, page)
    logged = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in logged if e["method"] == "Network.requestWillBeSent"}
    resources = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert page.as_uri() in asked, "the log does not even hold the page"
    outside = {url for url in (*asked, *resources) if not url.startswith(("file://", "data:"))}
    assert not outside, f"the page asks for {sorted(outside)}"


def links_lead_somewhere(browser: Browser, page: Path) -> None:
    go(browser, page)
    unfold(browser, CASES)
    told = browser.execute_script(
        "return Array.from(document.querySelectorAll('[href]')).map(node => [node.getAttribute('href'), "
        "node.getAttribute('href').startsWith('#') && !!document.getElementById(node.getAttribute('href').slice(1))])"
    )
    print(f"{len(told)} links")
    dead = [href for href, is_anchor in told if not (is_anchor or leads_elsewhere(href, page))]
    assert not dead, f"{len(dead)} of {len(told)} links lead nowhere: {dead[:5]}"


def leads_elsewhere(href: str, page: Path) -> bool:
    """To a file beside the page, into the page itself (its empty icon), or to the issue that a waiver names."""
    return href in ("data:,", WAIVER["issue"]) or ("#" not in href and (page.parent / href).is_file())


def fits_a_narrow_screen(browser: Browser, page: Path) -> None:
    go(browser, page, NARROW)
    unfold(browser)
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= NARROW, f"the page is {width} px wide on a screen of {NARROW}"


def is_readable(browser: Browser, page: Path, scheme: str) -> None:
    go(browser, page, scheme=scheme)
    unfold(browser)
    ratio, pair, text = browser.execute_script(CONTRAST)[0]
    print(f"lowest contrast {ratio:.2f}, '{text}' ({pair})")
    assert ratio >= READABLE, f"'{text}' has a contrast of {ratio:.2f} ({pair})"
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark))) < 3 * 128) is (scheme == "dark"), f"the page is {dark}"


def is_readable_by_day(browser: Browser, page: Path) -> None:
    is_readable(browser, page, "light")


def is_readable_by_night(browser: Browser, page: Path) -> None:
    is_readable(browser, page, "dark")


CHECKS: tuple[Check, ...] = (
    console_is_empty,
    nothing_is_requested,
    links_lead_somewhere,
    fits_a_narrow_screen,
    is_readable_by_day,
    is_readable_by_night,
)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ["report", "comparison", "history"])
def test_page(browser: Browser, pages: dict[str, Path], name: str, check: Check) -> None:
    check(browser, pages[name])


# ---- what the report does ------------------------------------------------------------------------------------------


def rows(browser: Browser) -> dict[str, dict[str, bool]]:
    """Of each place that the filters act on, the cases there and whether they are seen."""
    found: dict[str, dict[str, bool]] = {}
    for place, case, seen in browser.execute_script(ROWS):
        found.setdefault(place, {})[case] = found.get(place, {}).get(case, False) or seen
    return found


def set_filters(browser: Browser, words: str, only: bool) -> str:
    """Types and clicks as a person does; returns what the page says of how many cases are shown."""
    search, box = browser.find_element("id", "search"), browser.find_element("id", "only")
    search.send_keys(webdriver.Keys.CONTROL, "a")
    search.send_keys(webdriver.Keys.BACKSPACE, words)
    if box.is_selected() is not only:
        box.click()
    return browser.find_element("id", "shown").text


UNCLEAR = {case for index, case in enumerate(names(CASES)) if verdict(index) == "INCONCLUSIVE"}
FAILED = {case for index, case in enumerate(names(CASES)) if html.tone(verdict(index)) == "bad"}


def filters_hide_what_does_not_fit(browser: Browser, page: Path) -> None:
    go(browser, page)
    before = rows(browser)
    there = {"article": len(FAILED), "matrix": CASES, "figures": CASES, "details": CASES}
    assert {place: len(found) for place, found in before.items()} == there
    for words, only in [("onnx fp16", False), ("CUDA", False), ("", True), ("engine model7", True), ("nothing", False)]:
        said = set_filters(browser, words, only)
        fitting = {case for case in names(CASES) if all(word in case for word in words.lower().split())}
        fitting &= FAILED if only else fitting
        for place, found in rows(browser).items():
            # A row of the tables of figures fails where its own figure does.
            wanted = fitting & (UNCLEAR if place == "figures" and only else set(found))
            seen = {case for case, is_seen in found.items() if is_seen}
            assert seen == wanted, f"'{words}' {only}: {place} shows {len(seen)} cases and not {len(wanted)}"
        assert said == f"{len(fitting)} of {CASES} cases shown"
    assert set_filters(browser, "", False) == "" and rows(browser) == before


def fields_lead_to_details(browser: Browser, page: Path) -> None:
    go(browser, page)
    fields = browser.find_elements("css selector", ".matrix td a")
    assert len(fields) == CASES * 12
    for number in (0, len(fields) // 2, len(fields) - 1):
        target = fields[number].get_attribute("href").partition("#")[2]
        browser.execute_script("arguments[0].click()", fields[number])
        assert browser.execute_async_script(ARRIVED, target), f"a click on the field of {target} does not lead there"


def stands_on_the_screen_in_time(browser: Browser, page: Path) -> None:
    taken: list[float] = []
    for _ in range(3):  # the machine has other things to do as well
        go(browser, page)
        taken.append(browser.execute_async_script(AFTER_PAINT) / 1000)
    told = ", ".join(f"{seconds:.2f}" for seconds in taken)
    print(f"{CASES} cases stand on the screen after {told} s")
    assert min(taken) < FAST, f"{CASES} cases take {told} s"
    assert browser.execute_script("return document.querySelectorAll('.matrix tbody tr').length") == CASES


def paper_has_what_is_folded(browser: Browser, page: Path) -> None:
    go(browser, page)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = browser.execute_script(
        "return ['#tools', '.case'].map(s => getComputedStyle(document.querySelector(s)))"
        ".map(style => style.display + ' ' + style.contentVisibility);"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert shown == ["none visible", "block visible"], "paper has the tools of the screen, or lacks what it leaves out"
    folded = "return document.querySelectorAll('details:not([open])').length"
    before = browser.execute_script(folded)
    browser.execute_script(
        "addEventListener('beforeprint', () => { window.onPaper = ["
        "document.querySelectorAll('details:not([open])').length, "
        "document.querySelectorAll('section.claim').length]; });"
    )
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    printed = len(re.findall(rb"/Type\s*/Page\b", pdf))
    print(f"{printed} pages")
    assert before > 0 and browser.execute_script("return window.onPaper") == [0, 60 * 12], (
        "details are missing on paper"
    )
    assert printed > 60, f"{printed} pages hold no details of 60 cases"
    assert browser.execute_script(folded) >= before, "what was folded stays unfolded after printing"


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("report", filters_hide_what_does_not_fit),
        ("report", fields_lead_to_details),
        ("report", stands_on_the_screen_in_time),
        ("small", paper_has_what_is_folded),
    ],
)
def test_report(browser: Browser, pages: dict[str, Path], name: str, check: Check) -> None:
    check(browser, pages[name])


@pytest.mark.parametrize("lines", [[run_event(), end_event(5)], many_cases(1)], ids=["no case", "one case"])
def test_the_script_stands_few_cases(browser: Browser, tmp_path: Path, lines: list[Event]) -> None:
    console_is_empty(browser, reports.write([write_record(tmp_path, lines)], tmp_path)["html"])


def test_without_a_script_all_details_are_there(browser: Browser, pages: dict[str, Path]) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        go(browser, pages["small"])
        root = browser.execute_cdp_cmd("DOM.getDocument", {"depth": 0})["root"]["nodeId"]
        found = browser.execute_cdp_cmd("DOM.querySelectorAll", {"nodeId": root, "selector": "section.claim"})
        assert len(found["nodeIds"]) == 60 * 12
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_nothing_of_a_record_is_markup_when_it_is_unfolded(browser: Browser, tmp_path: Path) -> None:
    hostile = "</noscript></details><img src=x onerror=alert(1)><script>alert(1)</script> &lt;img src=y&gt;"
    lines = [run_event()]
    for case in names(60):
        lines += [case_event(case, artifact=hostile), claim_event(case, "test_x", "FAIL", hostile + case)]
    page = reports.write([write_record(tmp_path, [*lines, end_event(1)])], tmp_path)["html"]
    console_is_empty(browser, page)
    unfold(browser, 60)
    assert browser.execute_script("return document.querySelectorAll('section.claim').length") == 60
    assert browser.execute_script("return document.querySelectorAll('img, script').length") == 1  # the report's own
    assert browser.get_log("browser") == []


# ---- every check fails once ----------------------------------------------------------------------------------------


def damaged(old: str, new: str) -> Callable[[str], str]:
    """The page with one place changed, and without the policy that would refuse what is put there."""

    def apply(text: str) -> str:
        assert old in text
        return re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text.replace(old, new, 1))

    return apply


@pytest.mark.parametrize(
    ("name", "check", "old", "new"),
    [
        ("small", console_is_empty, '"use strict";', '"use strict"; console.warn("something is odd");'),
        ("small", console_is_empty, '"use strict";', '"use strict"; setTimeout(() => nowhere());'),
        ("history", nothing_is_requested, "</main>", '<img src="http://127.0.0.1:9/pixel.png" alt=""></main>'),
        ("small", nothing_is_requested, '"use strict";', '"use strict"; fetch("http://127.0.0.1:9/").catch(() => 0);'),
        ("small", links_lead_somewhere, 'href="#r0"', 'href="#r999"'),
        ("small", links_lead_somewhere, f'href="{WAIVER["issue"]}"', 'href="issues.html"'),
        ("history", links_lead_somewhere, "</main>", '<a href="report.html">report</a></main>'),
        ("history", fits_a_narrow_screen, "</main>", '<p style="width: 400px">A wide line</p></main>'),
        ("small", fits_a_narrow_screen, ".tools input[type=search] {", ".tools input[type=search] { min-width: 400px;"),
        ("comparison", fits_a_narrow_screen, ".scroll { overflow-x: auto; }", ""),
        ("small", is_readable_by_day, "--neutral: #4d5966", "--neutral: #8d99a6"),
        ("small", is_readable_by_night, "--good: #7fd3a0", "--good: #2f6340"),
        ("history", is_readable_by_night, "svg .tick { fill: var(--soft); }", ""),
        ("comparison", is_readable_by_night, "prefers-color-scheme: dark", "prefers-color-scheme: none"),
        ("report", filters_hide_what_does_not_fit, "words.every(", "words.some("),
        ("report", filters_hide_what_does_not_fit, "(only.checked &&", "(false &&"),
        ("report", fields_lead_to_details, "if (holder) fill(holder);", ""),
        ("report", fields_lead_to_details, 'addEventListener("hashchange", reveal);', ""),
        ("report", stands_on_the_screen_in_time, '"use strict";', '"use strict"; while (performance.now() < 2100);'),
        ("small", paper_has_what_is_folded, '"beforeprint"', '"beforehand"'),
        ("small", paper_has_what_is_folded, 'all("details.case").forEach(fill);', ""),
        ("small", paper_has_what_is_folded, ".case { content-visibility: visible; }", ""),
    ],
)
def test_a_page_that_is_broken_fails_its_check(
    browser: Browser, pages: dict[str, Path], name: str, check: Check, old: str, new: str
) -> None:
    page = pages[name].with_name("broken.html")
    page.write_text(damaged(old, new)(pages[name].read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(AssertionError) as caught:
        check(browser, page)
    print(str(caught.value).splitlines()[0])
