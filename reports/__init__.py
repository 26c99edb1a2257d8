"""Reports and pages, contact sheets, model cards, and the web app."""
