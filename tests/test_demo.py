"""The demo page that shows similarity of features."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from featup_hub.cli import main
from featup_hub.image import read_image
from featup_hub.loading import load

pytest.importorskip("gradio")
import httpx

from featup_hub import demo

CHROMIUM = shutil.which("chromium")
DISC = 56  # radius of the disc, pixels
PLACES = ((130, 150), (300, 260))  # of its centre in the first and in the second photograph


def disc_at(place: tuple[int, int]) -> Image.Image:
    """A striped yellow disc on a blue ground: what is like the disc is the disc."""
    image = Image.new("RGB", (448, 448), "#204080")
    draw = ImageDraw.Draw(image)
    for x in range(0, 448, 8):
        draw.line((x, 0, x, 448), fill="#305090")
    x, y = place
    draw.ellipse((x - DISC, y - DISC, x + DISC, y + DISC), fill="#f0d020")
    draw.ellipse((x - 20, y - 20, x + 20, y + 20), outline="#801010", width=6)
    return image


def on_disc(similarities: torch.Tensor, place: tuple[int, int]) -> bool:
    """Tells whether the highest value of a map of 448×448 pixels lies on the disc."""
    height, width = similarities.shape
    peak = int(similarities.argmax())
    x, y = (peak % width + 0.5) * 448 / width, (peak // width + 0.5) * 448 / height
    return (x - place[0]) ** 2 + (y - place[1]) ** 2 <= DISC**2


@pytest.fixture(scope="module")
def photos() -> list[demo.PhotoFeatures]:
    model = load("efficientnet_lite0")
    return [demo.compute(model, disc_at(place), 448) for place in PLACES]


def test_the_most_similar_place_of_another_photograph_is_the_same_thing(photos):
    point = (PLACES[0][0] / 448, PLACES[0][1] / 448)
    patches, pixels = demo.similarity(photos[0], point, photos[1])
    assert patches.shape == (28, 28)
    assert pixels.shape == (448, 448)
    assert on_disc(patches, PLACES[1])
    assert on_disc(pixels, PLACES[1])


def test_a_point_is_wholly_similar_to_itself_and_corners_are_points(photos):
    for x, y in ((0.0, 0.0), (1.0, 1.0), (0.25, 0.6)):
        patches, pixels = demo.similarity(photos[0], (x, y), photos[0])
        row, column = (min(int(share * 448), 447) for share in (y, x))
        assert pixels[row, column] == pytest.approx(1, abs=1e-5)
        assert float(patches.max()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "flags", [*(f"--model {m}" for m in ("dinov22", "dinov2=no.pth", "jbu")), "--upsampler nothing"]
)
def test_what_there_is_not_is_told_before_the_page_opens(flags, capsys, monkeypatch):
    monkeypatch.setattr(demo.gr.Blocks, "launch", lambda *_, **__: None)
    assert main(["demo", *flags.split(), "--no-browser"]) == 2
    assert "error: " in capsys.readouterr().err


def test_the_overlay_goes_from_the_photograph_to_the_colours():
    photo = Image.new("RGB", (8, 4), "#336699")
    similarities = torch.tensor([[0.2, 1.0]])
    assert demo.draw_similarity(similarities, 0.2, photo, 0.0).tobytes() == photo.tobytes()
    colours = demo.draw_similarity(similarities, 0.2, photo, 1.0)
    assert colours.getpixel((0, 0)) == (16, 16, 74)
    assert colours.getpixel((7, 3)) == (255, 240, 128)


def test_equal_features_have_equal_colours_in_both_photographs(photos):
    pictures = demo.draw_colours([photos[0], photos[0]], 1.0)
    assert len(pictures) == 4
    assert pictures[1].tobytes() == pictures[3].tobytes()


def test_more_than_two_photographs_are_refused():
    with pytest.raises(ValueError, match="at most two photographs; got 3"):
        demo.build([disc_at(PLACES[0])] * 3, model="m", upsampler="u")


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_a_port_that_cannot_be_is_a_usage_error(port, capsys):
    assert main(["demo", "--no-browser", "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"error: --port must be from 1 to 65535; got {port}\n"


def test_a_port_in_use_is_told_in_terms_of_the_flag():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "featup_hub", "demo", "--no-browser", "--port", str(port)]
        ran = subprocess.run(command, capture_output=True, text=True)
    expected = f"a free port is needed; {port} is in use, or not allowed; give another --port"
    assert ran.returncode == 1
    assert f"error: {expected}\n" in ran.stderr


def test_the_space_builds_the_page(root):
    app = str(root / "examples/space/app.py")
    stopped = "import gradio; gradio.Blocks.launch = lambda page: print('launched')"
    program = f"{stopped}; import runpy; runpy.run_path({app!r}, run_name='__main__')"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    assert ran.stdout == "launched\n", ran.stderr


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page, as the command serves it; gradio gets a process of its own."""
    folder = tmp_path_factory.mktemp("served")
    photos = [folder / "a.png", folder / "b.png"]
    for photo, place in zip(photos, PLACES, strict=True):
        disc_at(place).save(photo)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "featup_hub", "demo", *photos, "--no-browser", "--port"]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen([*command, str(port)], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert any(address in line for line in server.stdout), "the page was not served"
            yield address
        finally:
            server.terminate()


def upload(address: str, photo: Path) -> Any:
    """Uploads a file as the browser does; returns what the page's first photograph becomes."""
    api = f"{address}/gradio_api"
    sent = httpx.post(f"{api}/upload", files={"files": (photo.name, photo.read_bytes())})
    file = {"path": sent.json()[0], "meta": {"_type": "gradio.FileData"}}
    called = httpx.post(f"{api}/call/accept", json={"data": [file]}).json()["event_id"]
    events = httpx.get(f"{api}/call/accept/{called}", timeout=60).text
    return json.loads(events.strip().rpartition("data: ")[2])


def test_an_uploaded_picture_of_16_bits_is_read_as_the_command_reads_it(served, tmp_path):
    values = np.linspace(0, 65535, 448 * 448).astype(np.uint16).reshape(448, 448)
    Image.fromarray(values).save(tmp_path / "grey.png")
    shown = Image.open(upload(served, tmp_path / "grey.png")[0]["path"])
    assert shown.tobytes() == read_image(tmp_path / "grey.png").tobytes()


def test_an_upload_that_is_no_image_gives_the_error_of_the_command(served, tmp_path):
    photo = tmp_path / "photo.jpg"
    disc_at(PLACES[0]).save(photo)
    whole = photo.read_bytes()
    for content in (b"text", b"", whole[: len(whole) // 2]):
        photo.write_bytes(content)
        with pytest.raises(ValueError, match=r"photo\.jpg") as error:
            read_image(photo)
        told = upload(served, photo)["error"]
        assert told == str(error.value).replace(f"{tmp_path}/", "")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")
def test_a_click_in_the_browser_lights_up_the_same_thing_in_the_second_photograph(served):
    sync_api: Any = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1400, "height": 1300})
        page.set_default_timeout(120_000)
        page.goto(served)
        before = page.locator("#pixel2 img").get_attribute("src")
        page.get_by_label("number input for overlay strength").fill("1")
        page.keyboard.press("Enter")
        box = page.locator("#photo1 img").bounding_box()
        x, y = (place / 448 for place in PLACES[0])
        page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.wait_for_function(
            "old => document.querySelector('#pixel2 img').src != old", arg=before
        )
        page.wait_for_timeout(1000)
        after = page.locator("#pixel2 img").get_attribute("src")
        drawn = Image.open(io.BytesIO(page.request.get(after).body())).convert("RGB")
        browser.close()
    assert drawn.size == (448, 448)
    shades = torch.from_numpy(np.array(drawn))
    assert on_disc(shades[..., 1].float(), PLACES[1])  # green grows with the similarity
    assert int(shades[..., 1].min()) < 60, "nothing is dark: the picture shows no contrast"
