"""What routing traces say: which experts tokens choose, which policy suits them, what can be guessed."""
