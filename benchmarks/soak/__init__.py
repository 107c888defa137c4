"""Load, departures and kills for a long time, and a verdict: nothing lost, nothing leaked, the books right."""
