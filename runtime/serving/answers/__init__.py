"""From tokens to responses: pieces of text as they become certain, laid out whole or as a stream of events."""
