"""Who may send requests, and how many: keys, limits, and the checks that every route makes."""
