"""An OpenAI-compatible HTTP server over the engine. An extra: ``pip install "moec[serve]"``; see docs/serving.md."""
