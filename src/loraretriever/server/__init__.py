"""The HTTP server: OpenAI's API over a pool, which chooses the adapters itself."""
