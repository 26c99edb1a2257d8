"""A headless Chromium for tests of pages; what it needs is Debian's `chromium` and `chromium-driver`.

It resolves no host name: a page that asks for anything beyond this machine shows an error in its console.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
    "--window-size=1280,1000",
)


def start_chromium(profile: Path) -> Any:
    """Return a selenium driver of a Chromium with `profile` as its empty user folder; skip the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: no test of a page")
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        missing = "chromium" if browser is None else "chromedriver"
        pytest.skip(f"{missing} is not on the PATH (Debian: apt-get install chromium chromium-driver): no test of a page")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With both places given, selenium looks for no driver on the network.
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def console_errors(browser: Any) -> list[str]:
    """Return what the page's console has shown as an error since the last call."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
