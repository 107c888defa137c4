"""The image pipeline: from an encoded image to the encoder's views."""
