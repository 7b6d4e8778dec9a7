"""Many jobs: their list, the record of what is done, and the page that shows it."""
