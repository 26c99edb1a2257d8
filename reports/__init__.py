"""What people look at: reports and pages, contact sheets, model cards, the web app."""
