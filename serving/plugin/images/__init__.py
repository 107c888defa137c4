"""From an encoded image to the views that the encoder takes."""
