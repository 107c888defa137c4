"""The bundled nano checkpoint: page renderer, training, weights, and the builder that writes it to disk."""
