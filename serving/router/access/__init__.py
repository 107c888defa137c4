"""Who may ask, and how much: keys, limits, and the control that every route goes through."""
