"""The scripted engine, a stand-in for vLLM: it answers in vLLM's formats according to a script."""
