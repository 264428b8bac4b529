"""The HTTP side of a session: OpenAI's API, a page to chat in, and figures for monitoring."""
