"""What Chromium shows of a file: drawn on a white canvas in sRGB, and read back."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pictures.case import Array, Skip

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
_TYPES = {
    "png": "image/png", "jpeg": "image/jpeg", "gif": "image/gif", "bmp": "image/bmp",
    "webp": "image/webp", "avif": "image/avif",
}  # fmt: skip
_DRAW = """async url => {
  const image = new Image();
  image.src = url;
  try { await image.decode(); } catch { return null; }
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext('2d', {colorSpace: 'srgb'});
  context.fillStyle = 'white';
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0);
  const bytes = context.getImageData(0, 0, canvas.width, canvas.height).data;
  let text = '';
  for (let at = 0; at < bytes.length; at += 8192)
    text += String.fromCharCode(...bytes.subarray(at, at + 8192));
  return [canvas.width, canvas.height, btoa(text)];
}"""


@contextmanager
def chromium_page() -> Iterator[Any]:
    """An empty page of a Chromium of its own. Raises ``Skip`` where there is none."""
    import shutil

    path = next((found for name in CHROMIUMS if (found := shutil.which(name))), None)
    if path is None:
        raise Skip("no Chromium (Debian, Ubuntu: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser.new_page()
        finally:
            browser.close()


def shown_in(page: Any, family: str, data: bytes) -> Array | None:
    """(height, width, 3) of uint8; None where Chromium shows nothing, or a broken picture."""
    url = f"data:{_TYPES[family]};base64,{base64.b64encode(data).decode()}"
    answer = page.evaluate(_DRAW, url)
    if answer is None:
        return None
    width, height, text = answer
    pixels = np.frombuffer(base64.b64decode(text), np.uint8)
    return pixels.reshape(height, width, 4)[..., :3]
