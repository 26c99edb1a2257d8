"""The browser of the page tests runs scripts and detects requests to other machines."""

from selenium.webdriver.common.by import By

from tests.browser import console_errors, until


def test_a_page_runs_scripts_and_requests_to_elsewhere_are_errors(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<title>a</title><link rel="icon" href="data:,"><script>document.title += "b"</script>')
    browser.get(page.as_uri())
    assert browser.title == "ab"
    assert console_errors(browser) == []
    page.write_text('<link rel="icon" href="data:,"><img src="http://example.org/a.png">')
    browser.get(page.as_uri())
    browser.find_element(By.TAG_NAME, "img")
    (error,) = until(browser, console_errors)
    assert "example.org" in error
