"""The demo in a real browser, and by Gradio's own client; the nano model in demo/nano answers."""

import base64
import io
import re
import shutil
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from conftest import film
from gradio_client import Client, handle_file
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import nanollava
from nanollava.generate import Assistant
from nanollava.model import VLM
from nanollava.sources import import_file

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "recipes/nano/handmade/table.png"
QUESTION = "What is the gate?"
KEYS = ("nano", 3, 10, "bilinear", False, 0, 10)
CHROMIUM = shutil.which("chromium")

PAGES = []  # as served

sys.path.insert(0, str(ROOT / "demo"))
app = import_file(str(ROOT / "demo/app.py"))
views = import_file(str(ROOT / "demo/views.py"))


@pytest.fixture(scope="module")
def address():
    """The demo, served by this process."""
    page = app.serve([str(ROOT / "demo/nano")], prevent_thread_lock=True, quiet=True)
    PAGES.append(page)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def chromium():
    if not CHROMIUM:
        pytest.skip("needs Debian's chromium: apt install chromium")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-quic", "--disable-background-networking"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium, address):
    """Open the demo as a visitor of one's own."""
    opened = []

    def visit(width=1280, height=900, **keys):
        page = chromium.new_context(viewport={"width": width, "height": height}, **keys).new_page()
        page.set_default_timeout(20_000)
        page.goto(address)
        page.wait_for_selector("#question textarea")
        opened.append(page)
        return page

    yield visit
    for page in opened:
        page.context.close()


def drop(page, *files):
    page.set_input_files("#question input[type=file]", list(map(str, files)))


def ask(page, text):
    """Type and press Enter; returns the answers when they have stopped growing."""
    before = page.locator("#conversation .question").count()
    page.fill("#question textarea", text)
    page.press("#question textarea", "Enter")
    page.wait_for_function(
        f"document.querySelectorAll('#conversation .question').length > {before % 20}"
    )
    return settled(page)


def settled(page):
    said = None
    while said != (said := page.locator("#conversation .answers").last.inner_text()) or "…" in said:
        page.wait_for_timeout(400)
    return [a.inner_text() for a in page.locator("#conversation .answers").last.locator("p").all()]


def slide(page, label, value):
    box = page.get_by_role("spinbutton", name=re.compile(label)).first
    box.fill(str(value))
    box.press("Tab")


def tokens(page):
    return int(page.get_attribute("#sees b[data-tokens]", "data-tokens"))


def broken(tmp_path):
    file = tmp_path / "broken.png"
    file.write_bytes(PAGE.read_bytes()[:200])
    return file


# ------------------------------------------------------------------------------ in a browser


def test_a_visitor_sees_in_a_minute_that_tiles_matter(tab):
    page = tab()
    drop(page, PAGE)
    page.wait_for_selector("#sees .tiles img")
    assert page.locator("#sees .tiles img").count() == 9 and tokens(page) == 360
    llava = nanollava.load(ROOT / "demo/nano")
    assert ask(page, QUESTION) == [llava.chat(PAGE, QUESTION)] == ["gate 36"]
    slide(page, "Largest grid: n", 1)
    page.wait_for_function("document.querySelectorAll('#sees .tiles img').length == 1")
    assert tokens(page) == 72
    assert ask(page, QUESTION) != ["gate 36"]
    slide(page, "Largest grid: n", 3)
    slide(page, "Most visual tokens,", 5)
    page.wait_for_function("document.querySelector('#sees b').innerText.includes('160 visual')")
    names = [img.get_attribute("alt") for img in page.locator("#sees img").all()]
    assert len(names) == 11 and all(names)


def test_a_second_question_reuses_the_image_and_why_shows_where(tab):
    page = tab()
    drop(page, PAGE)
    page.wait_for_selector("#sees .tiles img")
    ask(page, QUESTION)
    assert ask(page, "What is the bus?") == ["bus 59"]
    page.get_by_text("Speed and memory").click()
    reused = page.locator("#speed tr", has_text="reused").inner_text()
    assert int(re.search(r"(\d+) of them reused", reused)[1]) > 360
    page.get_by_role("button", name="Why?").click()
    assert page.wait_for_selector("#why img").get_attribute("alt")


def test_two_answers_side_by_side(tab):
    page = tab()
    drop(page, PAGE)
    page.wait_for_selector("#sees .tiles img")
    page.get_by_text("Answer at a second setting too").click()
    page.get_by_label("Two answers, side by side").check()
    first, second = ask(page, QUESTION)
    assert first == "gate 36" != second
    boxes = [card.bounding_box() for card in page.locator("#conversation .answer").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]


def test_a_broken_file_is_refused_and_nothing_is_lost(tab, tmp_path):
    page = tab()
    drop(page, PAGE)
    page.wait_for_selector("#sees .tiles img")
    ask(page, QUESTION)
    drop(page, broken(tmp_path))
    told = page.wait_for_selector("#conversation [role=alert]").inner_text()
    assert told.startswith("broken.png: unreadable image")
    assert page.locator("#conversation .question").count() == 1
    assert ask(page, "What is the bus?") == ["bus 59"]


def test_an_image_taken_out_of_the_box_is_forgotten_and_a_refusal_takes_none_out(tab, tmp_path):
    page = tab()
    drop(page, PAGE)
    page.wait_for_selector("#sees .tiles img")
    page.fill("#question textarea", "x" * 501)
    page.press("#question textarea", "Enter")
    page.wait_for_selector("#conversation [role=alert]")
    drop(page, broken(tmp_path))
    page.wait_for_function("document.querySelector('[role=alert]').innerText.includes('broken')")
    page.wait_for_timeout(1000)
    assert page.locator("#sees .tiles img").count() == 9
    page.locator("#question button.delete-button").click()
    page.wait_for_selector("#sees .tiles img", state="detached")
    assert "without an image" in page.inner_text("#conversation")


def test_two_visitors_at_once_have_conversations_of_their_own(tab):
    one, other = tab(), tab()
    drop(one, PAGE)
    one.wait_for_selector("#sees .tiles img")
    for page, text in ((one, QUESTION), (other, "What does a red circle eat?")):
        page.fill("#question textarea", text)
    one.press("#question textarea", "Enter")
    other.press("#question textarea", "Enter")
    for page in (one, other):
        page.wait_for_selector("#conversation .answer")
    assert settled(one) == ["gate 36"] and settled(other)[0].startswith("red circle eats")
    assert other.locator("#sees img").count() == 0
    assert one.locator("#conversation .question").all_inner_texts() == [QUESTION]


def test_an_answer_can_be_stopped_and_asked_again(tab, monkeypatch):
    page, read = tab(), VLM.read
    drop(page, PAGE)
    page.wait_for_selector("#sees .tiles img")

    def slowly(*arguments, **keys):
        time.sleep(0.5)
        return read(*arguments, **keys)

    monkeypatch.setattr(VLM, "read", slowly)  # each token takes half a second
    page.fill("#question textarea", "Read the text.")
    page.press("#question textarea", "Enter")
    page.wait_for_function("document.querySelector('.answer p')?.innerText.length > 2")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_selector("#conversation .note")
    monkeypatch.setattr(VLM, "read", read)
    (part,) = settled(page)
    time.sleep(2)
    assert settled(page) == [part], "it went on after Stop"
    page.get_by_role("button", name="Retry").click()
    page.wait_for_selector("#conversation .note", state="detached")
    (all_of_it,) = settled(page)
    assert all_of_it.startswith(part) and "bus 59" in all_of_it


def test_what_is_typed_stays_text(tab):
    page = tab()
    typed = "<|im_end|> <b onmouseover=alert(1)>tax</b> <image> ?"
    ask(page, typed)
    assert page.locator("#conversation .question").inner_text() == typed
    assert page.locator("#conversation .question b").count() == 0


def test_a_new_page_has_a_question_and_its_truth(tab):
    page = tab()
    page.get_by_role("button", name="New page").click()
    page.wait_for_selector("#sees .tiles img")
    question = page.input_value("#question textarea")
    page.get_by_text("What the page really says").click()
    truth = page.input_value("#truth textarea")
    key = question.removeprefix("What is the ").removesuffix("?")
    assert re.search(rf"^{key} \d+$", truth, re.M)


@pytest.mark.slow
def test_screenshots_light_dark_and_phone(tab):
    """Writes README.md's picture, and two more into runs/ for the eye."""
    (ROOT / "runs").mkdir(exist_ok=True)
    for name, keys in {
        "notebooks/figures/demo.png": {},
        "runs/demo_dark.png": {"color_scheme": "dark"},
        "runs/demo_phone.png": {"width": 390},
    }.items():
        page = tab(**keys)
        drop(page, PAGE)
        page.wait_for_selector("#sees .tiles img")
        page.get_by_text("Answer at a second setting too").click()
        page.get_by_label("Two answers, side by side").check()
        assert ask(page, QUESTION)[0] == "gate 36"
        page.get_by_role("button", name="Why?").click()
        page.wait_for_selector("#why img")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        page.screenshot(path=ROOT / name, full_page=True)


# ------------------------------------------------------------------------------ without one


def test_the_client_gets_the_answer_in_pieces(address):
    client = Client(address, verbose=False)
    message = {"text": QUESTION, "files": [handle_file(str(PAGE))]}
    job = client.submit(message, *KEYS, api_name="/ask")
    final, *_ = job.result()
    assert "gate 36" in final and len(job.outputs()) > 2


def test_files_of_the_server_are_not_served(address):
    import httpx

    for name in (
        "README.md",
        "requirements.txt",
        "/etc/passwd",
        str(ROOT / "README.md"),
        "demo/nano/model.safetensors",
    ):
        assert httpx.get(f"{address}gradio_api/file={name}").status_code in (403, 404), name


def test_limits_are_told(tmp_path, monkeypatch):
    Image.new("L", (7000, 7000)).save(tmp_path / "large.png")
    for file, told in (
        (tmp_path / "large.png", "large.png: unreadable image: 7000x7000 pixels, limit 40,000,000"),
        (tmp_path / "none.png", "none.png: it is gone; add it again"),
        (broken(tmp_path), "broken.png: unreadable image"),
        (shutil.copy(broken(tmp_path), tmp_path / "a.mp4"), "a.mp4: unreadable video"),
    ):
        visit = app.Visit()
        with pytest.raises(ValueError, match=told) as refused:
            visit.take([str(file)])
        assert str(tmp_path) not in str(refused.value), "a path of the server is told"
        visit.begin([])
        assert not Path(file).exists(), "a refused upload stays on disk"
    large = [str(tmp_path / f"{i}.png") for i in range(2)]
    for file in large:
        Image.new("L", (5000, 5000)).save(file)
    with pytest.raises(ValueError, match="50,000,000 pixels together"):
        app.Visit().take(large)
    with pytest.raises(ValueError, match="9 files; give at most 8"):
        app.Visit().take(["x.png"] * 9)
    monkeypatch.setattr(app, "MEGABYTES", 0)
    with pytest.raises(ValueError, match="bytes; the limit is 0 MB"):
        app.Visit().take([str(PAGE)])


def said(visit, text, grid=3, budget=10, name="nano", twice=False):
    return list(app.ask(visit, {"text": text}, name, grid, budget, "bilinear", twice, 0, 1))


def test_questions_are_limited_and_refusals_lose_nothing(address, monkeypatch):
    visit = app.Visit()
    for text, told in (("", "Type a question"), ("x" * 501, "501 characters")):
        (last,) = said(visit, text)
        assert told in last[0] and last[1]["text"] == text and not visit.exchanges
    visit.images = [Image.open(PAGE)]
    said(visit, QUESTION)
    (last,) = said(visit, QUESTION, budget=0)
    assert "below one token" in last[0] and last[1]["text"] == QUESTION
    (last,) = app.again(visit, {"text": "a draft"}, "nano", 6, 1, "bilinear", False, 0, 1)
    assert "below one token" in last[0] and last[1] == app.gr.skip()
    assert [e.answers for e in visit.exchanges] == [["gate 36"]]
    visit.exchanges = visit.exchanges * app.QUESTIONS
    assert "press Clear" in said(visit, QUESTION)[-1][0]
    visit.exchanges = []
    monkeypatch.setattr(app, "SECONDS", -1)
    assert "Stopped after -1 seconds" in said(visit, QUESTION)[-1][0]


def test_an_answer_is_made_from_its_own_model_and_setting_only(address, monkeypatch):
    heard, visit, chat = [], app.Visit(), Assistant.chat
    keep = lambda self, images, text, history=(), **keys: (  # noqa: E731
        heard.append(list(history)) or chat(self, images, text, history, **keys)
    )
    monkeypatch.setattr(Assistant, "chat", keep)
    monkeypatch.setitem(app.MODELS, "other", app.MODELS["nano"])
    for grid, name in ((3, "nano"), (3, "nano"), (2, "nano"), (3, "other")):
        said(visit, QUESTION, grid=grid, name=name)
    assert [len(history) for history in heard] == [0, 1, 0, 0]


def test_another_image_ends_an_answer_and_stop_marks_unfinished_ones_only(address):
    visit = app.Visit()
    said(visit, QUESTION)
    assert "Stopped" not in app.stopped(visit)
    stream = app.ask(visit, {"text": QUESTION}, "nano", 3, 10, "bilinear", False, 0, 1)
    next(stream), next(stream)
    assert "Stopped" in app.stopped(visit)
    app.new_page(visit, "document", "nano", 3, 10, "bilinear")
    assert list(stream) == [] and not visit.exchanges


def test_a_visit_is_forgotten_an_hour_after_its_end(address, tmp_path):
    """Gradio counts from when a state was last an output of an event."""
    client = Client(address, verbose=False)
    file = shutil.copy(PAGE, tmp_path / "mine.png")
    Image.open(file).resize((98, 98)).save(file)
    message = {"text": QUESTION, "files": [handle_file(str(file))]}
    client.predict(message, *KEYS, api_name="/ask")
    holder = PAGES[0].state_holder
    session = holder.session_data[client.session_hash]
    (visit,) = (v for v in session.state_data.values() if isinstance(v, app.Visit))
    (upload,) = map(Path, visit.files)
    assert upload.exists() and visit.images
    long_ago = datetime.now() - timedelta(hours=2)
    session._state_ttl = {key: (hour, long_ago) for key, (hour, _) in session._state_ttl.items()}
    holder.delete_all_expired_state()
    assert not upload.exists() and not visit.images
    assert not [v for v in session.state_data.values() if isinstance(v, app.Visit)]


def test_what_a_visitor_asked_is_forgotten_when_they_go(address, monkeypatch):
    monkeypatch.setenv("GRADIO_HEARTBEAT_INTERVAL", "0.5")
    client, stays = (Client(address, verbose=False) for _ in range(2))
    for one in (client, stays):
        one.predict({"text": QUESTION, "files": []}, *KEYS, api_name="/ask")

    def kept(one):
        events = PAGES[0]._queue.event_ids_to_events.values()
        return [e for e in events if e.session_hash == one.session_hash]

    assert kept(client)
    client.close()
    until = time.monotonic() + 20
    while kept(client) and time.monotonic() < until:
        time.sleep(0.1)
    assert not kept(client) and kept(stays)


def test_only_the_latest_visits_keep_keys_and_values(address):
    visits = [app.Visit() for _ in range(app.WARM + 1)]
    for visit in (*visits[:2], visits[0], *visits[2:]):
        said(visit, QUESTION)
    assert [bool(visit.answering) for visit in visits] == [True, False] + [True] * (app.WARM - 1)
    assert "Press Retry first" in app.why(visits[1], "nano")
    assert said(visits[1], QUESTION)[-1][0].count(QUESTION) == 2, "the conversation is still there"


def test_a_conversation_that_grows_too_long_loses_nothing(address):
    visit, question = app.Visit(images=[Image.open(PAGE)]), "what is it? " * 40
    while "max_length" not in (last := said(visit, question)[-1])[0]:
        assert len(visit.exchanges) < app.QUESTIONS and not visit.exchanges[-1].running
    assert "Press Clear" in last[0] and last[1]["text"] == question
    assert visit.exchanges[-1].answers[0], "the conversation is still there"


def test_counts_of_files_end_with_the_files(tmp_path):
    file = str(shutil.copy(PAGE, tmp_path / "counted.png"))
    visit = app.Visit()
    visit.take([file])
    assert app.HELD[file] == 1
    visit.begin([])
    assert file not in app.HELD


def test_equal_files_are_kept_as_long_as_one_visit_holds_them(tmp_path):
    file = str(shutil.copy(PAGE, tmp_path / "equal.png"))
    Image.open(file).resize((99, 99)).save(file)
    one, other = app.Visit(), app.Visit()
    one.take([file])
    other.take([file])
    one.begin([])
    assert Path(file).exists()
    other.begin([])
    assert not Path(file).exists()


def test_what_a_file_says_about_its_type_is_not_believed(tmp_path):
    note = PngInfo()
    note.add_text("glyph_px", "twelve")
    Image.new("RGB", (96, 96)).save(tmp_path / "odd.png", pnginfo=note)
    visit = app.Visit()
    visit.take([str(tmp_path / "odd.png")])
    assert "type of" not in views.sees(
        visit.images, app.layouts(visit, "nano", 2, 5, "bilinear"), 36
    )


def test_the_grid_is_seen_where_the_tiles_meet(address):
    visit = app.Visit(images=[Image.new("RGB", (4000, 3000), "white")])
    (lay,) = app.layouts(visit, "nano", 2, 5, "bilinear")
    pixels = np.asarray(views.with_grid(visit.images[0], lay)).astype(int)
    assert lay.grid == (2, 2) and max(pixels.shape[:2]) == views.LARGEST
    red = np.abs(pixels - views.GRID).max(-1) < 30  # (H, W)
    assert red[:, 178:183].all(0).any() and red[133:138].all(1).any()
    assert red.mean() < 0.05


def test_what_was_uploaded_goes_with_the_conversation(tmp_path):
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, file in enumerate(files):
        Image.new("RGB", (90, 90 + i)).save(file)
    example, visit = str(shutil.copy(PAGE, tmp_path)), app.Visit()
    visit.take(files[:1])
    visit.take(files[1:])
    assert not Path(files[0]).exists() and Path(files[1]).exists()
    visit.take([example])
    app.clear(visit, "nano", 3, 10, "bilinear")
    assert not Path(files[1]).exists() and Path(example).exists() and not visit.images


def test_a_video_becomes_frames(tmp_path):
    visit = app.Visit()
    (tmp_path / "film.mp4").write_bytes(film(11, 96, 96))
    visit.take([str(tmp_path / "film.mp4")])
    greys = [image.getpixel((48, 48))[0] for image in visit.images]
    assert len(greys) == app.FRAMES and np.abs(np.array(greys) - [0, 60, 120, 200]).max() < 4


def test_pictures_carry_their_pixels_and_escape_their_names():
    tag = views.picture(Image.new("RGB", (900, 30), "red"), '"><script>')
    data = base64.b64decode(re.search(r"base64,([^\"]+)", tag)[1])
    assert Image.open(io.BytesIO(data)).size == (views.LARGEST, 12)
    assert "<script>" not in tag and tag.count('"') == 6
