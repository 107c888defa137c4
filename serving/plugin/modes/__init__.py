"""Resolution modes: their sizes, and the choice of one for a page."""
