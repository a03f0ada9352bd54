"""Takes the docs' pictures of pages that formix writes, with Debian's Chromium:
`python docs/screenshot.py PAGE.html PICTURE`, and `whole` behind them for the page to its end."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait


def main(page: str, picture: str, part: str = "top") -> None:
    options = Options()
    options.binary_location = "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as profile:
        for flag in (
            "headless",
            "no-sandbox",
            "disable-gpu",
            "hide-scrollbars",
            "no-first-run",
            "window-size=1100,1250",
        ):
            options.add_argument(f"--{flag}")
        options.add_argument("--disable-background-networking")
        options.add_argument(f"--user-data-dir={profile}")
        browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
        try:
            browser.get(Path(page).resolve().as_uri())
            drawn = "return document.documentElement.dataset.drawn === 'true'"
            WebDriverWait(browser, 60).until(lambda b: b.execute_script(drawn))
            if part == "whole":
                height = browser.execute_script("return document.documentElement.scrollHeight")
                browser.set_window_size(1100, height + 150)  # the frame of the window is part of its size
            browser.save_screenshot(picture)
        finally:
            browser.quit()


if __name__ == "__main__":
    main(*sys.argv[1:4])
