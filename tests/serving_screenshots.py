"""Take the README's screenshots of a server: `python tests/serving_screenshots.py [ADDRESS]`."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

ASSETS = Path(__file__).resolve().parent.parent / "assets"
CHROMIUM = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-sync"]
MOST = 120_000  # milliseconds of an answer


def send_example(page: Page, name: str, answers: int) -> None:
    """Send an example, and wait until its answer is complete."""
    page.get_by_role("button", name=name, exact=True).click()
    expect(page.locator("#box textarea")).not_to_have_value("")
    page.locator("#box textarea").press("Enter")
    expect(page.locator("#chat details.why")).to_have_count(answers, timeout=MOST)


def main() -> None:
    """Take a finished conversation, a running answer in dark mode, and a narrow window."""
    address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7860"
    ASSETS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM)
        page = browser.new_page(viewport={"width": 920, "height": 1250})
        page.goto(address)
        send_example(page, "T→T+I+V+A", 1)
        page.locator("#chat details.why summary").click()
        page.wait_for_timeout(1000)
        page.add_style_tag(content="#chat { height: 1900px !important; max-height: none; }")
        page.wait_for_timeout(500)
        page.locator("#chat .bubble-wrap").evaluate("one => one.scrollTo(0, 0)")
        page.screenshot(path=ASSETS / "demo.png", full_page=True)
        page = browser.new_page(viewport={"width": 920, "height": 760}, color_scheme="dark")
        page.goto(f"{address}/?__theme=dark")
        page.get_by_role("button", name="T+I→T+I+V", exact=True).click()
        expect(page.locator("#box textarea")).not_to_have_value("")
        page.locator("#box textarea").press("Enter")
        page.wait_for_function(
            "() => [...document.querySelectorAll('#chat progress')].some(b => b.value > 0)",
            timeout=MOST,
        )
        page.screenshot(path=ASSETS / "demo_dark.png")
        expect(page.locator("#chat details.why")).to_have_count(1, timeout=MOST)
        page = browser.new_page(viewport={"width": 375, "height": 760})
        page.goto(address)
        send_example(page, "T+I→T+A", 1)
        page.screenshot(path=ASSETS / "demo_phone.png")
        browser.close()


if __name__ == "__main__":
    main()
