"""Resolution modes: their sizes, and which one a page is read in."""
