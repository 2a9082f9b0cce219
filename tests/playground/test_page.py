"""The page in a browser, against a live server: what a person sees and does."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from e2e.live import LiveServer, a_picture, data_uri, download
from playground.conftest import MAX_QUEUE
from playground.driven import Page, open_page, seconds_in

AXE = "axe_playwright_python"
SERIOUS = ("serious", "critical")
FOCUSED = """(name) => document.activeElement.matches('button, a')
  && document.activeElement.textContent.includes(name)"""
LONG = {"num_inference_steps": 50, "num_images": 4, "size": "512*512"}  # four seconds


# --- from a picture to a variation ----------------------------------------------------------------


def test_a_picture_becomes_a_variation(page: Page) -> None:
    page.choose("teal")
    page.set(num_inference_steps=8, seed=7)
    page.generate()
    (shown,) = page.wait_for_images(1)
    assert page.wait_for_progress("^Done: 1 image in ")
    task = page.last_task()
    assert task["outputs"] == [shown]
    assert (task["seeds"], task["input"]["num_inference_steps"]) == ([7], 8)
    assert page.results.get_by_role("img", name="Variation, seed 7").is_visible()
    assert download(shown).size == (1024, 1024)


def test_the_sample_needs_three_presses_and_no_reading(page: Page) -> None:
    page.tab.get_by_role("button", name="Try a sample").click()
    page.tab.locator(".tile img").wait_for()
    page.generate()
    page.wait_for_images(1)


def test_steps_and_a_preview_are_told_while_it_forms(page: Page) -> None:
    page.choose("teal")
    page.set(num_inference_steps=50)
    page.count(2)
    page.generate()
    preview = page.results.get_by_role("img", name="Preview of the image as it forms").first
    preview.wait_for()
    assert preview.evaluate("(e) => e.decode().then(() => e.naturalWidth)") == 128
    said = page.wait_for_progress(r"Step \d+ of 100")
    bar = page.results.get_by_role("progressbar", name="Steps done")
    assert bar.is_visible(), said
    page.wait_for_images(2)
    assert preview.count() == 0


def test_several_pictures_have_weights_and_a_mask(page: Page) -> None:
    page.choose("teal", "orange")
    page.tab.get_by_role("slider", name="Weight of picture 2").fill("0.5")
    page.tab.get_by_role("button", name="Mask").click()
    canvas = page.tab.get_by_role("application")
    box = canvas.bounding_box()
    page.tab.mouse.move(box["x"] + box["width"] / 4, box["y"] + 5)
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] - 5, steps=4)
    page.tab.mouse.up()
    page.tab.get_by_role("button", name="Use this mask").click()
    page.set(num_inference_steps=2)
    page.generate()
    page.wait_for_images(1)
    given = page.last_task()["input"]
    assert given["image_weights"] == [1, 0.5]
    assert len(given["images"]) == 1
    mask = download(given["mask"]).convert("L")
    left, right = (
        mask.getpixel((mask.width // 4, mask.height // 2)),
        mask.getpixel((mask.width - 2, 2)),
    )
    assert (left, right) == (255, 0)


def test_eraser_and_undo_take_paint_away(page: Page) -> None:
    page.choose("teal")
    page.tab.get_by_role("button", name="Mask").click()
    painted = """(e) => e.getContext('2d').getImageData(0, 0, e.width, e.height).data
      .some((value, i) => i % 4 === 3 && value > 127)"""
    canvas = page.tab.get_by_role("application")
    canvas.press(" ")
    assert canvas.evaluate(painted)
    page.tab.get_by_role("button", name="Eraser").click()
    canvas.press(" ")
    assert not canvas.evaluate(painted)
    page.tab.get_by_role("button", name="Undo").click()
    assert canvas.evaluate(painted)
    page.tab.keyboard.press("Escape")
    assert page.tab.get_by_role("button", name="Mask").is_visible()


def test_strength_and_pooling_make_a_grid_of_one_seed(page: Page) -> None:
    page.choose("teal")
    page.set(num_inference_steps=1, seed=5)
    page.tab.get_by_role("button", name="Strength × pooling").click()
    page.wait_for_images(9)
    with page.server.client() as client:
        asked = {"page": 1, "page_size": 20}
        made = client.post("/api/v3/predictions", json=asked).json()["data"]["items"]
    pairs = {
        (each["input"].get("redux_strength", 1), each["input"].get("redux_pooling", 27))
        for each in made
    }
    assert len(pairs) == len(made) == 9
    assert {each["seeds"][0] for each in made} == {5}
    assert page.tab.get_by_role("heading", name="strength 0.25, pooling 6").is_visible()


# --- results --------------------------------------------------------------------------------------


def test_results_are_compared_reused_and_deleted(page: Page) -> None:
    page.choose("teal")
    page.set(num_inference_steps=1)
    page.count(2)
    page.generate()
    first, second = page.wait_for_images(2)
    page.results.get_by_role("button", name="Enlarge").first.click()
    viewer = page.tab.get_by_role("dialog", name="Image")
    viewer.get_by_role("button", name="Before and after").click()
    assert viewer.get_by_role("slider").get_attribute("aria-label").startswith("Left: Input.")
    viewer.get_by_role("button", name="Close").click()
    for button in page.results.get_by_role("button", name="Compare").all():
        button.click()
    shown = [each.get_attribute("src") for each in viewer.locator(".pictures img").all()]
    assert shown == [first, second]
    page.tab.keyboard.press("Escape")
    page.results.get_by_role("button", name="Use as input").nth(1).click()
    assert page.tab.locator(".tile img").get_attribute("src") == second
    page.results.get_by_role("button", name="Delete").click()
    page.results.get_by_role("button", name="Really delete?").click()
    page.wait_for_images(0)
    with page.server.client() as client:
        assert client.get(page_path(first)).status_code == 404


def page_path(url: str) -> str:
    return "/" + url.split("/", 3)[3]


def test_history_comes_back_and_restores_its_parameters(page: Page) -> None:
    asked = {"seed": 3, "num_inference_steps": 2, "prompt": "مرحبا", "size": "512*768"}
    picture = data_uri(a_picture())
    page.server.run({**asked, "image": picture, "enable_safety_checker": False})
    page.tab.reload()
    page.wait_for_form()
    page.wait_for_images(1)
    page.results.get_by_role("button", name="Restore").click()
    assert page.tab.get_by_label("Prompt").input_value() == "مرحبا"
    assert page.tab.get_by_label("Prompt").get_attribute("dir") == "auto"
    assert page.tab.get_by_label("Height").input_value() == "768"
    assert page.tab.get_by_label("Seed", exact=True).input_value() == "3"
    assert not page.tab.locator("#field-enable_safety_checker").is_checked()


def test_a_link_restores_parameters_without_key_and_picture(page: Page) -> None:
    page.tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.choose("teal")
    page.set(num_inference_steps=9, seed=11)
    page.tab.get_by_role("button", name="Link", exact=True).click()
    page.tab.get_by_text("Link copied").wait_for()
    link = page.tab.evaluate("navigator.clipboard.readText()")
    assert page.server.key not in link and "image" not in link
    page.tab.goto("about:blank")
    page.tab.goto(link)
    page.wait_for_form()
    assert page.tab.locator("#field-num_inference_steps").input_value() == "9"
    assert page.tab.get_by_label("Seed", exact=True).input_value() == "11"


def test_code_to_copy_is_what_was_asked_and_has_no_key(page: Page) -> None:
    page.choose("teal")
    page.set(num_inference_steps=3)
    page.tab.get_by_role("button", name="Code").click()
    dialog = page.tab.get_by_role("dialog", name="Code")
    for name, word in (("curl", "curl -X POST"), ("Python", "wavespeed.Client"),
                       ("JavaScript", "new Client"), ("CLI", "flux-redux submit")):  # fmt: skip
        dialog.get_by_role("tab", name=name).click()
        text = dialog.locator("pre").inner_text()
        assert word in text and page.server.key not in text
        assert f"{page.server.base_url}/files/" in text, "the picture is there already"
        assert "num_inference_steps" in text or "--num-inference-steps 3" in text


# --- keys -----------------------------------------------------------------------------------------


def test_the_key_in_the_address_is_taken_out_of_it(page: Page) -> None:
    assert page.tab.url == f"{page.server.base_url}/"
    stored = "[sessionStorage.length, localStorage.length]"
    assert page.tab.evaluate(stored) == [1, 0]
    assert page.tab.evaluate("history.length") <= 2


def test_a_missing_key_is_asked_for_and_remembered_if_wanted(
    chromium: Any, server: LiveServer
) -> None:
    with open_page(chromium, server, fragment="") as page:
        page.tab.get_by_label("API key").fill("frs_wrong-and-never-made")
        page.tab.get_by_label("API key").press("Enter")
        page.tab.get_by_text("This key is unknown").wait_for()
        page.tab.get_by_label("API key").fill(server.key)
        page.tab.get_by_label("Remember on this device").check()
        page.tab.get_by_label("API key").press("Enter")
        page.wait_for_form()
        assert not page.tab.get_by_label("API key").is_visible()
        other = Page(page.tab.context.new_page(), server)
        other.open("")
        other.wait_for_form()


def test_a_revoked_key_is_told_and_asked_for(page: Page) -> None:
    page.choose("teal")
    page.tab.evaluate("sessionStorage.setItem('flux-redux-key', 'frs_revoked-meanwhile')")
    page.generate()
    page.tab.get_by_label("API key").wait_for()
    assert "key" in page.tab.locator("#key-problem").inner_text()


# --- when things go wrong -------------------------------------------------------------------------


def test_a_failed_task_says_why(page: Page) -> None:
    page.choose("teal")
    page.set(num_inference_steps=1)
    page.tab.get_by_label("Prompt").fill("[spoiled]")
    page.generate()
    assert "Failed: told to make no picture" in page.wait_for_progress("^Failed")
    page.results.get_by_text("Failed: told to make no picture").wait_for()


def test_a_link_that_leads_nowhere_fails_with_its_reason(page: Page) -> None:
    page.tab.get_by_role("button", name="Use a link").click()
    page.tab.get_by_label("Link to a picture").fill("http://127.0.0.1:9/gone.png")
    page.tab.get_by_label("Link to a picture").press("Enter")
    page.generate()
    page.wait_for_progress("^Failed: ")
    assert page.last_task()["code"] == 1402


def test_a_bad_number_is_not_sent(page: Page) -> None:
    page.choose("teal")
    page.set(num_inference_steps=99)
    page.generate()
    assert page.tab.locator("#field-num_inference_steps:invalid").is_visible()
    assert page.images() == []


def test_cancel_ends_a_task_that_is_worked_on(page: Page) -> None:
    page.choose("teal")
    page.set(num_inference_steps=50)
    page.count(4)
    page.generate()
    page.wait_for_progress("^Step ")
    page.results.get_by_role("button", name="Cancel").click()
    page.wait_for_progress("^Cancelled")
    assert page.last_task()["status"] == "cancelled"


def test_several_tasks_wait_at_once_and_say_their_place(page: Page) -> None:
    page.choose("teal")
    page.set(num_inference_steps=50)
    page.count(4)  # four seconds each: while one runs, and one is made ready, others wait
    for _ in range(5):
        page.generate()
    page.results.get_by_text("before it").first.wait_for()
    assert page.wait_for_progress("other tasks? open")
    cards = page.results.get_by_role("article")
    assert cards.count() == 5
    for card in cards.all():
        card.get_by_role("button", name="Cancel").click()
    page.tab.wait_for_function(
        "() => document.querySelectorAll('[data-state=cancelled]').length === 5"
    )


def test_a_full_queue_is_told_with_its_wait_and_tried_again(page: Page) -> None:
    busy = [page.server.submit({**LONG, "image": data_uri(a_picture())}) for _ in range(MAX_QUEUE)]
    page.choose("teal")
    page.set(num_inference_steps=1)
    page.generate()
    said = page.wait_for_progress("Trying again in")
    assert "queue" in said.lower()
    with page.server.client() as client:
        reply = client.post("/api/v3/wavespeed-ai/flux-pro-redux", json={"image": "http://x/a.png"})
        assert reply.status_code == 429
        assert seconds_in(said) <= int(reply.headers["Retry-After"])
        client.post("/api/v3/predictions/delete", json={"ids": [each["id"] for each in busy]})
    page.wait_for_images(1)


def test_a_server_that_is_restarted_in_the_middle_loses_nothing(page: Page) -> None:
    before = number_of_tasks(page)
    page.choose("teal")
    page.set(num_inference_steps=50)
    page.count(2)
    page.generate()
    page.wait_for_progress("^Step ")
    page.server.kill()
    page.tab.get_by_text("The server does not answer").first.wait_for()
    page.tab.get_by_text("Not reachable").wait_for()
    page.server.start(wait=False)
    page.wait_for_images(2)
    page.wait_for_progress("^Done")
    page.server.wait_ready()
    page.tab.get_by_text("Ready", exact=True).wait_for()
    assert number_of_tasks(page) == before + 1, "sent twice"


def number_of_tasks(page: Page) -> int:
    with page.server.client() as client:
        answer = client.post("/api/v3/predictions", json={"page": 1, "page_size": 100})
    return len(answer.json()["data"]["items"])


# --- for everyone ---------------------------------------------------------------------------------


def test_the_keyboard_alone_is_enough(page: Page) -> None:
    tab = page.tab
    page.set(num_inference_steps=1)
    tab.locator("body").press("Home")
    tab.evaluate("document.activeElement.blur()")
    press_until(page, "Try a sample")
    tab.keyboard.press("Enter")
    tab.locator(".tile img").wait_for()
    press_until(page, "Generate")
    tab.keyboard.press("Enter")
    page.wait_for_images(1)
    press_until(page, "Enlarge")
    tab.keyboard.press("Enter")
    dialog = tab.get_by_role("dialog", name="Image")
    dialog.wait_for()
    tab.keyboard.press("+")
    tab.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert tab.evaluate("document.activeElement.className") == "open"


def press_until(page: Page, name: str, most: int = 80) -> None:
    """Press Tab until what has the focus is called ``name``."""
    for _ in range(most):
        page.tab.keyboard.press("Tab")
        if page.tab.evaluate(FOCUSED, name):
            return
    raise AssertionError(f"no {name} within {most} presses of Tab")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(chromium: Any, server: LiveServer, scheme: str) -> None:
    axe = Path(pytest.importorskip(AXE).__file__).with_name("axe.min.js").read_text()
    with open_page(chromium, server, color_scheme=scheme, reduced_motion="reduce") as page:
        reports = []
        page.tab.get_by_role("button", name="Key").click()
        reports.append(findings(page, axe))
        page.tab.get_by_label("API key").press("Escape")
        page.choose("teal", "orange")
        page.set(num_inference_steps=1)
        page.generate()
        page.wait_for_images(1)
        reports.append(findings(page, axe))
        page.results.get_by_role("button", name="Enlarge").click()
        reports.append(findings(page, axe))
        page.tab.keyboard.press("Escape")
        page.tab.get_by_role("button", name="Mask").click()
        page.tab.get_by_role("application").wait_for()
        reports.append(findings(page, axe))
        page.tab.get_by_role("button", name="Cancel").click()
        page.tab.get_by_role("button", name="Code").first.click()
        reports.append(findings(page, axe))
        for report in reports:
            bad = [each for each in report["violations"] if each["impact"] in SERIOUS]
            assert bad == [], json.dumps(bad, indent=1)[:4000]
            assert score(report) >= 0.95


def findings(page: Page, axe: str) -> dict[str, Any]:
    """What axe-core says of the page as it is now; the browser's own tools are under no policy."""
    page.tab.evaluate(axe)
    report: dict[str, Any] = page.tab.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return report


def score(report: dict[str, Any]) -> float:
    """The share of the rules that were tried and are kept."""
    broken, kept = len(report["violations"]), len(report["passes"])
    return kept / (kept + broken)


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_all_without_sideways_scrolling(
    chromium: Any, server: LiveServer, width: int
) -> None:
    phone = {"viewport": {"width": width, "height": 700}, "has_touch": True, "is_mobile": True}
    with open_page(chromium, server, **phone) as page:
        page.choose("teal", "orange")
        page.set(num_inference_steps=1)
        page.generate()
        page.wait_for_images(1)
        widest = "document.documentElement.scrollWidth"
        assert page.tab.evaluate(widest) <= width
        assert page.tab.get_by_role("button", name="Photograph").is_visible()
        page.results.get_by_role("button", name="Enlarge").click()
        page.tab.get_by_role("dialog", name="Image").wait_for()
        assert page.tab.evaluate(widest) <= width


def test_without_a_server_the_page_says_so_and_comes_back(page: Page) -> None:
    refuse = lambda route: route.abort()  # noqa: E731
    page.tab.route("**/api/**", refuse)
    page.tab.reload()
    page.tab.get_by_text("The server does not answer").wait_for()
    page.tab.unroute("**/api/**", refuse)
    started = time.monotonic()
    page.wait_for_form()
    assert time.monotonic() - started < 15


def test_a_task_is_sent_again_as_it_was(page: Page) -> None:
    page.choose("teal")
    page.set(num_inference_steps=2, seed=9)
    page.generate()
    (first,) = page.wait_for_images(1)
    page.set(num_inference_steps=30)
    page.results.get_by_role("button", name="Again", exact=True).click()
    second, _ = page.wait_for_images(2)
    assert second != first
    assert page.last_task()["input"]["num_inference_steps"] == 2
    assert download(second).tobytes() == download(first).tobytes()
