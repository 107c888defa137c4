"""Documents in, text and boxes out: a client of the OpenAI API like any other."""
