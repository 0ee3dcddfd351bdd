"""Pages of HTML that need nothing beside themselves: no scripts, fonts or pictures from elsewhere."""
