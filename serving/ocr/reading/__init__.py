"""From a document to its pages' texts, through the router."""
