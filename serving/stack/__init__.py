"""`serving up`: Ray's start, the run file, the supervisor, the Serve applications."""
