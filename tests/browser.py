"""A headless Chromium for tests of pages; it needs Debian's packages `chromium` and `chromium-driver`.

It resolves no host name: a page that requests anything from another machine logs an error in its console.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 60  # seconds, on busy machines
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


def until(browser: Any, condition: str | Callable[[Any], Any], *arguments: Any) -> Any:
    """Wait until a JavaScript expression of `arguments`, or a function of the browser, is true and return its value.

    A page decodes, lays out, renders and reloads in its own time: nothing that depends on it is read without this.
    Elements that are missing, covered, hidden or replaced meanwhile count as not yet; after PATIENCE the last one is named.
    """
    from selenium.common import exceptions
    from selenium.webdriver.support.ui import WebDriverWait

    passing = (
        exceptions.NoSuchElementException,
        exceptions.StaleElementReferenceException,
        exceptions.ElementNotInteractableException,
        exceptions.ElementClickInterceptedException,
        exceptions.JavascriptException,
    )
    last: Any = None

    def holds(driver: Any) -> Any:
        nonlocal last
        try:
            last = condition(driver) if callable(condition) else driver.execute_script(f"return {condition}", *arguments)
        except passing as error:
            last = error
            return None
        return last

    try:
        return WebDriverWait(browser, PATIENCE, 0.05).until(holds)
    except exceptions.TimeoutException:
        raise AssertionError(f"not true within {PATIENCE} s: {condition}; last: {last!r}") from None
