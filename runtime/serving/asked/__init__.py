"""What a client asks for: bodies, what of them is refused, and the requests of the engine that they come to."""
