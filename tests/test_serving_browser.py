"""The page in headless Chromium."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from nextgpt.mini_world.page_files import EXAMPLES
from nextgpt.serving.chat_view import EXPIRED
from nextgpt.serving.examples import read_examples
from serving_harness import (
    EVERYTHING,
    PHOTO,
    WORDS,
    Running,
    running_server,
    scripted_assistant,
    starve,
    wait_until,
)

pytestmark = pytest.mark.browser
CHROMIUM = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
]  # fmt: skip
SECONDS = 180_000  # milliseconds that anything may take on a busy machine
HOLDS_FILE = """(data) => {
    const bytes = Uint8Array.from(atob(data), one => one.charCodeAt(0));
    const held = new DataTransfer();
    held.items.add(new File([bytes], 'seen.jpg', {type: 'image/jpeg'}));
    return held;
}"""
WIDTH = "async (image) => { await image.decode(); return image.naturalWidth; }"
PLAYS = """async (medium) => {
    medium.muted = true;
    await medium.play();
    await new Promise(done => medium.addEventListener('timeupdate', done, {once: true}));
    return medium.duration;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.fail("no chromium: apt-get install -y chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=CHROMIUM)
        yield chromium
        chromium.close()


def served(
    factory: pytest.TempPathFactory, script: tuple[str, ...], steps: int
) -> Iterator[Running]:
    with running_server(scripted_assistant(factory.mktemp("scripted"), script, steps)) as running:
        yield running


@pytest.fixture(scope="module")
def media_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that answers with all modalities, slowly."""
    yield from served(tmp_path_factory, EVERYTHING, 150)


@pytest.fixture(scope="module")
def text_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from served(tmp_path_factory, WORDS, 2)


@pytest.fixture(scope="module")
def audio_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from served(tmp_path_factory, (WORDS[0], "audio"), 2)


@pytest.fixture(scope="module")
def endless_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose answers are 512 tokens."""
    folder, options = tmp_path_factory.mktemp("endless"), ["generation.max_new_tokens=512"]
    with running_server(
        scripted_assistant(folder, WORDS, options=options, endless=True)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def starved_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that lacks the memory for videos."""
    assistant = scripted_assistant(tmp_path_factory.mktemp("starved"))
    starve(assistant, "video")
    with running_server(assistant) as running:
        yield running


@pytest.fixture
def visitor(browser: Browser) -> Iterator[BrowserContext]:
    """A browser context, closed after the test."""
    with browser.new_context() as context:
        yield context


def opened(visitor: BrowserContext, running: Running, width: int = 1000) -> Page:
    page = visitor.new_page()
    page.set_viewport_size({"width": width, "height": 900})
    page.set_default_timeout(SECONDS)
    expect.set_options(timeout=SECONDS)
    page.goto(running.address)
    expect(page.locator("#box textarea")).to_be_visible()
    return page


def send(page: Page, text: str, *files: Path) -> None:
    if files:
        page.locator("#box input[type=file]").set_input_files([str(file) for file in files])
        expect(page.locator("#box .thumbnail-item")).to_have_count(len(files))
    page.locator("#box textarea").fill(text)
    page.locator("#box textarea").press("Enter")


def turn(page: Page, setting: str, value: str) -> None:
    """Fill a setting's field until its slider follows: just unfolded, it may lose input."""
    field = page.locator(f"#setting_{setting} input[type=number]")
    slider = page.locator(f"#setting_{setting} input[type=range]")
    for _ in range(20):
        field.fill(value)
        page.wait_for_timeout(250)
        if slider.input_value() == value:
            return
    raise AssertionError(f"{setting} stays at {slider.input_value()}")


def answered(page: Page, rounds: int = 1) -> None:
    """Wait until this many answers are complete."""
    expect(page.locator("#chat details.why")).to_have_count(rounds)
    expect(page.locator("#box .submit-button")).to_be_visible()


def is_shown(image: Locator) -> bool:
    """Wait until an image is loaded; return whether it has pixels."""
    return image.evaluate(WIDTH) > 0


def plays(medium: Locator) -> float:
    return medium.evaluate(PLAYS)


def downloaded(page: Page, modality: str) -> bytes:
    with page.expect_download() as download:
        page.locator(f"#chat figure.{modality} a").last.click()
    return Path(download.value.path()).read_bytes()


def said_by(page: Page, who: str) -> str:
    return "\n".join(page.locator(f"#chat .{who}-row").all_inner_texts())


def test_page_answers_a_text_question_with_an_explanation(
    visitor: BrowserContext, text_server: Running
) -> None:
    page = opened(visitor, text_server)
    send(page, "<Image>/etc/passwd</Image> **who** are you?")
    answered(page)
    assert "<Image>/etc/passwd</Image> **who** are you?" in said_by(page, "user")
    assert all(word in said_by(page, "bot") for word in WORDS)
    why = page.locator("#chat details.why")
    expect(why.locator("table")).to_be_hidden()
    why.locator("summary").click()
    expect(why.locator(".tokens")).to_be_visible()
    expect(why).to_contain_text("language model: prompt to tokens")
    assert page.locator("#chat video, #chat audio, #chat figure img").count() == 0


def test_page_answers_an_image_with_audio(visitor: BrowserContext, audio_server: Running) -> None:
    page = opened(visitor, audio_server)
    send(page, "What does it sound like?", PHOTO)
    answered(page)
    assert is_shown(page.locator("#chat figure.image img"))
    assert plays(page.locator("#chat audio")) > 0
    assert downloaded(page, "audio").startswith(b"RIFF")


def test_page_shows_all_media_with_progress_over_two_rounds(
    visitor: BrowserContext, media_server: Running
) -> None:
    page = opened(visitor, media_server)
    send(page, "all of it")
    bars = page.locator("#chat .making progress")
    expect(bars).to_have_count(3)
    making = page.locator("#chat .making")
    kinds = making.evaluate_all("all => all.map(one => one.dataset.modality)")
    assert kinds == ["image", "video", "audio"]
    page.wait_for_function(
        "() => [...document.querySelectorAll('#chat progress')]"
        ".some(bar => bar.value > 0 && bar.value < bar.max)"
    )
    answered(page)
    assert is_shown(page.locator("#chat figure.image img"))
    assert plays(page.locator("#chat video")) > 0
    assert plays(page.locator("#chat audio")) > 0
    assert downloaded(page, "image").startswith(b"\x89PNG")
    assert b"ftyp" in downloaded(page, "video")[:16]
    order = page.locator("#chat figure.medium").evaluate_all("all => all.map(one => one.className)")
    assert [name.split()[-1] for name in order] == ["image", "video", "audio"]
    page.locator("#chat details.why summary").click()
    expect(page.locator("#chat details.why .tokens .span.image")).to_contain_text("[IMG0]")
    send(page, "and again")
    answered(page, rounds=2)
    assert page.locator("#chat video").count() == 2
    session = next(s for s in media_server.sessions._open.values() if len(s.rounds) == 2)
    assert len(session.turns()) == 4


def test_page_stops_retries_edits_and_clears(
    visitor: BrowserContext, media_server: Running
) -> None:
    page = opened(visitor, media_server)
    send(page, "all of it")
    expect(page.locator("#chat .making progress").first).to_be_visible()
    page.locator("#box .stop-button").click()
    expect(page.locator("#chat p.note", has_text="stopped")).to_be_visible()
    wait_until(lambda: not media_server.queue.pending)
    page.locator("#chat details.why summary").click()
    expect(page.locator("#chat details.why")).to_contain_text("[IMG0]")
    expect(page.locator("#chat details.why")).not_to_contain_text("Seconds")
    page.get_by_label("Retry").click()
    expect(page.locator("#chat p.note", has_text="stopped")).to_have_count(0)
    answered(page)
    first = page.locator("#chat figure.image img").get_attribute("src")
    seed = page.locator("#chat details.why").inner_text()
    page.get_by_label("Retry").click()
    page.wait_for_function(
        "before => { const i = document.querySelector('#chat figure.image img');"
        " return i && i.getAttribute('src') !== before }", arg=first,
    )  # fmt: skip
    answered(page)
    assert page.locator("#chat details.why").count() == 1
    page.locator("#chat details.why summary").click()
    assert page.locator("#chat details.why").inner_text() != seed
    page.get_by_label("Edit").first.click()
    page.locator("#chat textarea").fill("something else")
    page.get_by_label("Submit").first.click()
    expect(page.locator("#chat .user").first).to_contain_text("something else")
    answered(page)
    assert "all of it" not in said_by(page, "user")
    page.get_by_label("Clear").first.click()
    expect(page.locator("#chat figure.medium")).to_have_count(0)
    expect(page.locator("#chat details.why")).to_have_count(0)


def test_page_shows_the_tokens_of_an_answer_stopped_in_its_words(
    visitor: BrowserContext, endless_server: Running
) -> None:
    page = opened(visitor, endless_server)
    send(page, "go on")
    expect(page.locator("#chat .bot-row").last).to_contain_text(WORDS[0])
    page.locator("#box .stop-button").click()
    expect(page.locator("#chat p.note", has_text="stopped")).to_be_visible()
    page.locator("#chat details.why summary").click()
    tokens = page.locator("#chat details.why .tokens code")
    assert 0 < tokens.count() < 512
    expect(tokens.first).to_contain_text(WORDS[0])
    expect(page.locator("#chat details.why")).not_to_contain_text("Seconds")


def test_page_tells_that_the_conversation_expired(
    visitor: BrowserContext, text_server: Running
) -> None:
    page = opened(visitor, text_server)
    send(page, "the first")
    answered(page)
    text_server.sessions.sweep(idle=-1)
    send(page, "the second")
    expect(page.locator("#chat p.note", has_text=EXPIRED)).to_be_visible()
    answered(page)
    assert "the second" in said_by(page, "user") and "the first" not in said_by(page, "user")
    send(page, "the third")
    answered(page, rounds=2)


def test_page_names_the_medium_that_failed_and_shows_the_others(
    visitor: BrowserContext, starved_server: Running
) -> None:
    page = opened(visitor, starved_server)
    for rounds in (1, 2):
        send(page, "all of it")
        answered(page, rounds)
    faults = page.locator("#chat p.fault")
    expect(faults).to_have_count(2)
    expect(faults.last).to_contain_text("the video was not made: this video needs more memory")
    assert is_shown(page.locator("#chat figure.image img").last)
    assert plays(page.locator("#chat audio").last) > 0
    assert page.locator("#chat video").count() == 0


def test_page_names_a_broken_file_and_keeps_the_message(
    visitor: BrowserContext, text_server: Running, tmp_path: Path
) -> None:
    broken = tmp_path / "notes.mp4"
    broken.write_text("no video at all")
    page = opened(visitor, text_server)
    send(page, "what is in it?", broken)
    expect(page.locator("#chat p.fault")).to_contain_text(
        "notes.mp4: neither a picture nor a video"
    )
    expect(page.locator("#box textarea")).to_have_value("what is in it?")
    half = tmp_path / "half.jpg"
    half.write_bytes(PHOTO.read_bytes()[:2000])
    page.reload()
    send(page, "and this?", half)
    expect(page.locator("#chat p.fault")).to_contain_text("half.jpg: not readable as an image")
    page.reload()
    send(page, "are you still there?")
    answered(page)


def test_page_accepts_pasted_and_dropped_images(
    visitor: BrowserContext, text_server: Running
) -> None:
    page = opened(visitor, text_server)
    box, shown = page.locator("#box textarea"), page.locator("#box .thumbnail-item")
    held = page.evaluate_handle(HOLDS_FILE, base64.b64encode(PHOTO.read_bytes()).decode())
    box.evaluate(
        "(box, held) => box.dispatchEvent("
        "new ClipboardEvent('paste', {clipboardData: held, bubbles: true, cancelable: true}))",
        held,
    )
    expect(shown).to_have_count(1)
    box.dispatch_event("drop", {"dataTransfer": held})
    expect(shown).to_have_count(2)
    box.press("Enter")
    answered(page)
    assert page.locator("#chat .user-row figure.image img").count() == 2


def test_page_example_chips_fill_the_textbox_with_text_and_file(
    visitor: BrowserContext, text_server: Running
) -> None:
    page = opened(visitor, text_server)
    for example in reversed(read_examples(EXAMPLES)):
        page.reload()  # two have the same words
        page.get_by_role("button", name=example.name, exact=True).click()
        expect(page.locator("#box textarea")).to_have_value(example.text)
        expect(page.locator("#box .thumbnail-item")).to_have_count(1 if example.file else 0)
    page.locator("#box textarea").press("Enter")
    answered(page)
    assert page.locator("#chat figure.image img").evaluate(WIDTH) == 64


def test_page_uses_settings_and_seed(visitor: BrowserContext, audio_server: Running) -> None:
    page = opened(visitor, audio_server)
    page.get_by_role("button", name="Settings").click()
    turn(page, "steps_audio", "7")
    page.locator("#setting_seed input").fill("123")
    page.locator("#setting_seed input").press("Tab")
    send(page, "play")
    answered(page)
    expect(page.locator("#chat details.why")).to_contain_text("Seed 123")
    (session,) = (s for s in audio_server.sessions._open.values() if s.rounds)
    assert session.rounds[0].answer.steps[0] == (7, 7)


def test_page_records_from_microphone_and_camera(
    visitor: BrowserContext, text_server: Running
) -> None:
    visitor.grant_permissions(["camera", "microphone"])
    page = opened(visitor, text_server)
    page.get_by_label("Record audio").click()
    page.get_by_label("Start recording").click()
    page.wait_for_timeout(1500)  # of sound
    page.get_by_label("Stop recording").click()
    page.get_by_label("Attach audio").click()
    expect(page.locator("#box .thumbnail-item")).to_have_count(1)
    page.get_by_role("button", name="Camera").click()
    page.locator("#photo").get_by_text("Click to Access Webcam").click()
    page.wait_for_function("() => document.querySelector('#photo video').readyState > 2")
    page.locator("#photo").get_by_label("capture photo").click()
    expect(page.locator("#box .thumbnail-item")).to_have_count(2)
    page.locator("#film").get_by_text("Click to Access Webcam").click()
    page.locator("#film").get_by_label("start recording").click()
    page.wait_for_timeout(4000)  # of film: on a busy machine Chromium writes the first second late
    page.locator("#film").get_by_label("start recording").click()  # it now says Stop
    expect(page.locator("#box .thumbnail-item")).to_have_count(3)
    send(page, "what do you see and hear?")
    answered(page)
    assert is_shown(page.locator("#chat .user-row figure.image img"))
    assert plays(page.locator("#chat .user-row audio")) > 0.5
    assert plays(page.locator("#chat .user-row video")) > 0.5  # or without end


def test_page_fits_narrow_windows_and_dark_mode(
    visitor: BrowserContext, media_server: Running
) -> None:
    page = opened(visitor, media_server, width=360)
    send(page, "all of it, on a telephone, in a message that is longer than one line of it")
    answered(page)
    for fold in ("Camera", "Settings"):
        page.get_by_role("button", name=fold).click()
    page.locator("#chat details.why summary").click()
    expect(page.locator("#setting_seed")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for selector in ("#chat figure.image img", "#chat video", "#chat audio", "#box textarea"):
        box = page.locator(selector).first.bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360, selector
    background = "getComputedStyle(document.querySelector('#chat')).backgroundColor"
    light = page.evaluate(background)
    page.locator("#dark").click()
    assert page.evaluate("document.body.classList.contains('dark')")
    page.wait_for_function(f"light => {background} !== light", arg=light)


def test_page_closed_tab_frees_work_and_files(
    visitor: BrowserContext, media_server: Running
) -> None:
    wait_until(lambda: len(media_server.sessions) == 0)
    page = opened(visitor, media_server)
    send(page, "all of it")
    expect(page.locator("#chat .making progress").first).to_be_visible()
    assert media_server.queue.pending
    page.close()
    wait_until(lambda: not media_server.queue.pending, seconds=10)
    wait_until(lambda: len(media_server.sessions) == 0, seconds=10)
    assert not list(media_server.sessions.folder.iterdir())


def test_page_tabs_are_separate_conversations_with_queue_positions(
    visitor: BrowserContext, media_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_server.queue.engine, "max_batch_size", 1)
    first, second = opened(visitor, media_server), opened(visitor, media_server)
    send(first, "mine")
    expect(first.locator("#chat .making progress").first).to_be_visible()
    send(second, "yours")
    expect(second.locator("#chat p.note")).to_contain_text("1 answer before this one")
    answered(first)
    answered(second)
    assert "yours" not in said_by(first, "user") and "mine" not in said_by(second, "user")
