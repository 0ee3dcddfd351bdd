"""The memory behind the key-value cache and the states of sequences; whose page is whose is the engine's to say."""
