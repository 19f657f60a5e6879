"""The server: an OpenAI-compatible API with weights per request, and a page with sliders."""
