"""The playground: one page that shows a document being read."""
