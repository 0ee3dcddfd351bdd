"""From records to the calls of a step: where everything lies, which kernel gets it, in which order."""
