"""Who may ask, and how much: keys, limits, the door that every route goes through."""
