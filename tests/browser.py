"""A headless Chromium for tests of pages; it needs Debian's packages `chromium` and `chromium-driver`.

It resolves no host name: a page that requests anything from another machine logs an error in its console.
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
    """Return a selenium driver of a Chromium with the empty user folder `profile`; skip the test if Chromium is missing."""
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
    # With both paths given, selenium does not search the network for a driver.
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def console_errors(browser: Any) -> list[str]:
    """Return the errors in the page's console since the last call."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
