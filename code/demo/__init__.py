"""The demo: a chat in the browser, and the same by API, on one server."""
