"""Serving: the web page and the OpenAI-style API on one server."""
